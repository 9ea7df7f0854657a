"""mamba-ssm's Triton kernels on a machine without a GPU, through Triton's interpreter. For tests and benchmarks only.

The kernels themselves run unchanged, program by program, in fp32 (the interpreter does its arithmetic in numpy, and
computes on the bit patterns of bf16: so bf16 is not tested this way). What is stood in for, before mamba_ssm is imported:

    TRITON_INTERPRET, MAMBA_DETERMINISTIC    interpret; one launch configuration, no atomics (mamba-ssm's own switch)
    torch.cuda.device, device properties     the launch code asks for a device and its number of processors
    selective_scan_cuda, causal_conv1d_cuda  compiled extensions: imported at the top, the second one also called
    the autotuner                            keeps its smallest configuration: timing needs a driver
"""

import contextlib
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ORACLE = Path(__file__).resolve().parents[2] / ".oracle"


def install() -> None:
    """Make `mamba_ssm` importable from .oracle. ImportError with the remedy where it is not there."""
    if not (ORACLE / "mamba_ssm").is_dir():
        raise ImportError(
            f"{ORACLE.name}/ holds no mamba_ssm: run `bash tests/parity/install.sh` (or make test-oracle)"
        )
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
    if str(ORACLE) not in sys.path:
        sys.path.insert(0, str(ORACLE))
    torch.cuda.device = lambda *_args: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_args: types.SimpleNamespace(  # type: ignore[assignment]
        multi_processor_count=4, name="interpreter", gcnArchName="", major=9, minor=0, total_memory=1 << 34
    )
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    convolution = types.ModuleType("causal_conv1d_cuda")
    convolution.causal_conv1d_fwd = _conv_forward  # type: ignore[attr-defined]
    convolution.causal_conv1d_bwd = _conv_backward  # type: ignore[attr-defined]
    convolution.causal_conv1d_update = _not_needed  # type: ignore[attr-defined]
    sys.modules.setdefault("causal_conv1d_cuda", convolution)
    _keep_one_configuration()


def _keep_one_configuration() -> None:
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def smallest_only(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        def tile(config: Any) -> int:
            return math.prod(value for name, value in config.kwargs.items() if name.startswith("BLOCK"))

        original(self, fn, arg_names, [min(configs, key=tile)] if configs else configs, *args, **kwargs)

    Autotuner.__init__ = smallest_only


def _not_needed(*_args: object) -> None:
    raise NotImplementedError("the single-step convolution kernel is not stood in for")


def _taps(x: torch.Tensor, seq_idx: torch.Tensor | None, width: int) -> list[torch.Tensor]:
    """x [B, C, L] seen by each tap, oldest first; zero before the start and in other documents."""
    length = x.shape[-1]
    seen = []
    for shift in range(width - 1, -1, -1):
        part = F.pad(x, (shift, 0))[..., :length]
        if seq_idx is not None:
            earlier = F.pad(seq_idx, (shift, 0), value=-1)[:, :length]
            part = part * (earlier == seq_idx).unsqueeze(1)
        seen.append(part)
    return seen


def _before_activation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: Any) -> torch.Tensor:
    taps = _taps(x.float(), seq_idx, weight.shape[-1])
    y = sum(tap * weight[:, k, None].float() for k, tap in enumerate(taps))
    return y if bias is None else y + bias[:, None].float()  # type: ignore[return-value]


def _conv_forward(
    x: Any, weight: Any, bias: Any, seq_idx: Any, initial: Any, out: torch.Tensor, final: Any, silu: bool
) -> None:
    assert initial is None and final is None
    y = _before_activation(x, weight, bias, seq_idx)
    out.copy_(F.silu(y) if silu else y)


def _conv_backward(
    x: Any, weight: Any, bias: Any, grad: Any, seq_idx: Any, initial: Any, grad_final: Any,
    grad_x: torch.Tensor, grad_weight: torch.Tensor, grad_bias: Any, grad_initial: Any, silu: bool,
) -> None:  # fmt: skip
    """Written out: inside the package's custom operator torch's own autograd is switched off."""
    assert initial is None and grad_final is None and grad_initial is None
    grad = grad.float()
    if silu:
        y = _before_activation(x, weight, bias, seq_idx)
        sigmoid = torch.sigmoid(y)
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    width, length = weight.shape[-1], x.shape[-1]
    total = torch.zeros_like(grad)
    for k, tap in enumerate(_taps(x.float(), seq_idx, width)):
        shift = width - 1 - k
        grad_weight[:, k] = (grad * tap).sum((0, 2))
        part = grad * weight[:, k, None].float()
        if seq_idx is not None:
            part = part * (F.pad(seq_idx, (shift, 0), value=-1)[:, :length] == seq_idx).unsqueeze(1)
        total += F.pad(part, (0, shift))[..., shift:]
    grad_x.copy_(total)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum((0, 2)))
