"""The Mamba-2 mixer: Megatron's, with this project's scan (`train.model.ssd`), which runs on any device.

Megatron's MambaMixer owns the projections, the sharding over tensor and context ranks and the checkpoint layout; it
takes convolution, scan and gated norm from the mamba-ssm package, which needs a GPU. `ReferenceMixer` replaces these
three only. The `te` backend uses `KernelMixer`: the stock mixer on mamba-ssm (`train.model.backend`).
"""

from typing import Any
from unittest import mock

import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from train.model import ssd
from train.model.context import RowContext, Segments
from train.model.norm import rms_norm
from train.native.scan import ScanSizes, ScanWeights


class GroupedRMSNorm(nn.Module):
    """RMSNorm over each channel group of the mixer's output, after the gate was applied.

    Same arguments as the mamba-ssm class that Megatron uses for it; weight [channels of this tensor rank].
    """

    def __init__(
        self, channels: int, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "norm_before_gate is not supported: the gate is applied before the norm"
        self.eps = eps
        self.group_size = group_size
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y: [..., channels] -> the same shape."""
        return rms_norm(y, self.weight, groups=y.shape[-1] // self.group_size, eps=self.eps)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded over the tensor ranks along its only dim, as Megatron's own class does."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _finish(mixer: MambaMixer) -> None:
    """Set what Megatron's constructor does not: the recipe's epsilon, and fp32 for dt_bias (A_log and D are fp32 already).

    Small values of dt need more digits than bf16 has (0.001 is rounded by up to 0.4 %).
    """
    mixer.norm.eps = mixer.config.layernorm_epsilon
    mixer.dt_bias.data = mixer.dt_bias.data.float()


class KernelMixer(MambaMixer):
    """Megatron's mixer on mamba-ssm's kernels; documents in a row are given by index (`RowContext.seq_idx`).

    Under context parallelism Megatron treats every packed row as its "thd" format. Our rows are whole "sbhd" rows, so the
    all-to-all around the scan must not see the packing; only the kernels receive the index. **Not run on a GPU**; in
    Triton's interpreter it equals `ReferenceMixer` (tests/parity/test_mamba_ssm.py).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _finish(self)
        before, after = self.cp.pre_conv_ssm, self.cp.post_conv_ssm
        self.cp.pre_conv_ssm = lambda rows, _row_context=None: before(rows)
        self.cp.post_conv_ssm = lambda rows, _row_context=None: after(rows)


class ReferenceMixer(MambaMixer):
    """Mamba-2 mixer in plain torch: in-projection, causal convolution, chunked scan, gate, grouped norm, out-projection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Megatron's constructor refuses to run without mamba-ssm and builds its norm: replace both while it runs.
        with mock.patch.multiple(mamba_mixer, HAVE_MAMBA_SSM=True, ExtendedRMSNorm=GroupedRMSNorm):
            super().__init__(*args, **kwargs)
        _finish(self)

    def forward(
        self,
        hidden_SBH: torch.Tensor,
        inference_context: None = None,
        *,
        inference_params: None = None,
        packed_seq_params: RowContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden: [sequence, rows, hidden] (this tensor and context rank's part of the sequence) -> the same shape.

        Collective over the tensor group (projections) and the context group (all-to-all around the scan).
        """
        zxbcdt, _ = self.in_proj(hidden_SBH)
        if packed_seq_params is not None and packed_seq_params.segments is not None:
            y = self.continued(zxbcdt[:, 0], packed_seq_params.segments)[:, None]
        else:
            zxbcdt = self.cp.pre_conv_ssm(zxbcdt, None)
            documents = packed_seq_params.documents if packed_seq_params is not None else None
            y = ssd.mamba_core(
                zxbcdt,
                self.scan_weights(),
                sizes=self.scan_sizes(),
                document_BL=documents,
                is_stepwise=packed_seq_params is not None and packed_seq_params.is_stepwise,
            )
            y = self.cp.post_conv_ssm(y, None)
        return self.out_proj(self.norm(y))

    def continued(self, zxbcdt_TD: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Convolution, scan and gate of the texts of a step of inference, which update their states. -> [T, H*P]."""
        pool = segments.mamba_pools[self.layer_number]
        return ssd.mamba_core_segments(
            zxbcdt_TD, self.scan_weights(), sizes=self.scan_sizes(), segments=segments, pool=pool
        )

    def scan_weights(self) -> ScanWeights:
        """Parameters of the scan on this rank (context ranks use a slice of the tensor rank's heads)."""
        return ScanWeights(
            conv_weight_CW=self.cp.get_conv1d_weight().squeeze(1),
            conv_bias_C=self.cp.get_conv1d_bias(),
            dt_bias_H=self.cp.get_dt_bias(),
            A_log_H=self.cp.get_A_log(),
            D_H=self.cp.get_D(),
        )

    def scan_sizes(self) -> ScanSizes:
        return ScanSizes(
            heads=self.cp.nheads_local_tpcp,
            head_dim=self.headdim,
            state=self.d_state,
            groups=self.cp.ngroups_local_tpcp,
            chunk=self.chunk_size,
        )
