"""Our scan against the mamba-ssm package: its torch reference, and its real Triton kernels, forward and backward, fp32.

Run by `make test-oracle`, in a separate process (Triton must be told to interpret before it is imported).
"""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from train.model import ssd
from train.native.scan import ScanSizes, ScanWeights

pytestmark = pytest.mark.oracle
HEADS, WIDTH, STATE, CHUNK = 4, 16, 16, 32
INNER = HEADS * WIDTH


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent))
    import triton_on_cpu

    triton_on_cpu.install()


def tensors(groups: int, length: int, rows: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    channels = INNER + 2 * groups * STATE
    made = {
        "zxbcdt": torch.randn(length, rows, INNER + channels + HEADS, generator=g),
        "conv_weight_CW": torch.randn(channels, 4, generator=g) / 2,
        "conv_bias_C": torch.randn(channels, generator=g) / 2,
        "dt_bias_H": torch.randn(HEADS, generator=g),
        "A_log_H": torch.rand(HEADS, generator=g) * 2,
        "D_H": torch.randn(HEADS, generator=g),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def ours(t: dict[str, torch.Tensor], groups: int, documents: torch.Tensor | None = None) -> torch.Tensor:
    rest = {name: value for name, value in t.items() if name != "zxbcdt"}
    sizes = ScanSizes(heads=HEADS, head_dim=WIDTH, state=STATE, groups=groups, chunk=CHUNK)
    return ssd.mamba_core(t["zxbcdt"], ScanWeights(**rest), sizes=sizes, document_BL=documents)


def agree(t: dict[str, torch.Tensor], mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Values and every gradient, relative to the largest entry."""
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    pairs = {"value": (mine, theirs)}
    a, b = (torch.autograd.grad(y, list(t.values()), weights, retain_graph=True) for y in (mine, theirs))
    pairs |= {f"gradient of {name}": pair for name, pair in zip(t, zip(a, b, strict=True), strict=True)}
    errors = {name: float((x - y).abs().max() / y.abs().max()) for name, (x, y) in pairs.items()}
    assert max(errors.values()) < tolerance, errors


def reference(t: dict[str, torch.Tensor], groups: int) -> torch.Tensor:
    """mamba-ssm's torch reference of the scan behind a plain torch convolution."""
    from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref

    z, xbc, dt = t["zxbcdt"].transpose(0, 1).split([INNER, INNER + 2 * groups * STATE, HEADS], dim=-1)
    weight, length = t["conv_weight_CW"], xbc.shape[1]
    conv = F.conv1d(xbc.transpose(1, 2), weight.unsqueeze(1), t["conv_bias_C"], padding=3, groups=weight.shape[0])
    xbc = F.silu(conv[..., :length]).transpose(1, 2)
    x, B, C = xbc.split([INNER, groups * STATE, groups * STATE], dim=-1)
    y = ssd_chunk_scan_combined_ref(
        x.unflatten(-1, (HEADS, WIDTH)),
        dt,
        -torch.exp(t["A_log_H"]),
        B.unflatten(-1, (groups, STATE)),
        C.unflatten(-1, (groups, STATE)),
        CHUNK,
        D=t["D_H"],
        z=z.unflatten(-1, (HEADS, WIDTH)),
        dt_bias=t["dt_bias_H"],
        dt_softplus=True,
    )
    return y.flatten(-2).transpose(0, 1)


def fused_kernels(t: dict[str, torch.Tensor], groups: int, documents: torch.Tensor | None = None) -> torch.Tensor:
    """The fused convolution-scan-gate kernels that Megatron trains with on a GPU, interpreted."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    arguments: dict[str, Any] = {"chunk_size": CHUNK, "D": t["D_H"], "headdim": WIDTH, "ngroups": groups}
    y = mamba_split_conv1d_scan_combined(
        t["zxbcdt"].transpose(0, 1).contiguous(),
        t["conv_weight_CW"],
        t["conv_bias_C"],
        t["dt_bias_H"],
        -torch.exp(t["A_log_H"]),
        activation="silu",
        norm_before_gate=False,
        seq_idx=documents,
        **arguments,
    )
    return y.transpose(0, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_scan_equals_the_packages_torch_reference(groups: int) -> None:
    t = tensors(groups, length=96, rows=2)
    agree(t, ours(t, groups), reference(t, groups), 2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_scan_equals_the_packages_kernels(groups: int) -> None:
    t = tensors(groups, length=64)
    agree(t, ours(t, groups), fused_kernels(t, groups), 2e-5)


def test_documents_reset_as_in_the_packages_kernels() -> None:
    t = tensors(1, length=96)
    documents = torch.tensor([[0] * 20 + [1] * 44 + [2] * 32], dtype=torch.int32)
    agree(t, ours(t, 1, documents), fused_kernels(t, 1, documents), 2e-5)


def test_the_mixer_for_gpus_resets_at_documents_as_ours_does() -> None:
    """Megatron's mixer with mamba-ssm's kernels (interpreted), as the `te` backend builds it, against the plain torch one."""
    from megatron.core.ssm import mamba_mixer
    from tiny import engine_of, recipe_with

    from train.build import build_engine
    from train.model.backend import ReferenceBackend
    from train.model.context import RowContext
    from train.model.mixer import KernelMixer, ReferenceMixer

    assert mamba_mixer.HAVE_MAMBA_SSM
    recipe = recipe_with(**{"model.pattern": "M", "model.mamba_chunk": 16})
    with engine_of(recipe, rank=0, world=1) as engine:
        with mock.patch.object(ReferenceBackend, "mixer", lambda _self: KernelMixer):
            other = build_engine(recipe, engine.mesh)
        (ours,) = [part for part in engine.chunks[0].modules() if isinstance(part, ReferenceMixer)]
        (theirs,) = [part for part in other.chunks[0].modules() if isinstance(part, KernelMixer)]
        documents = torch.tensor([[0] * 20 + [1] * 44, [0] * 64]).sort(dim=1).values
        x = torch.randn(64, 2, recipe.model.hidden, generator=torch.Generator().manual_seed(2))
        rows = RowContext(documents=documents)
        got = {}
        for name, mixer in (("ours", ours), ("theirs", theirs)):
            mixer.zero_grad()
            hidden = x.clone().requires_grad_()
            y, _ = mixer(hidden, packed_seq_params=rows)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
            got[name] = (y.detach(), hidden.grad)
        plain, _ = theirs(x)
    for a, b in zip(got["ours"], got["theirs"], strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 2e-5
    assert float((plain.detach() - got["theirs"][0]).abs().max()) > 1e-3, "documents make a difference"
