"""Binding of the compiled norms, activations and loss in `passes.c`: each a single pass over memory.

The definition is plain torch in `train.model.norm`, `.activation` and `.cross_entropy`, which is used without a compiler,
on other devices and in float64.
"""

import ctypes

import torch

from train.native.kernels import library

FUNCTIONS = ("squared_relu", "gelu", "silu")
"""Their numbers in passes.c."""
STRETCHES, STRETCH_LINES = 16, 128
"""A norm's lines are split into at least so many stretches, of at most so many lines each, for any number of threads."""

i64, i32, f32 = ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Norm(ctypes.Structure):
    """Mirror of `Norm` in passes.c."""

    _fields_ = [
        ("lines", i64), ("width", i64), ("groups", i64), ("stretch", i64), ("bf16", i32), ("eps", f32), ("offset", f32),
    ]  # fmt: skip


class Activation(ctypes.Structure):
    """Mirror of `Activation` in passes.c."""

    _fields_ = [("lines", i64), ("width", i64), ("bf16", i32), ("function", i32), ("gated", i32)]


class Loss(ctypes.Structure):
    """Mirror of `Loss` in passes.c."""

    _fields_ = [("lines", i64), ("width", i64), ("pitch", i64), ("bf16", i32), ("cap", f32)]


def usable(x: torch.Tensor) -> bool:
    """Whether the compiled versions support this tensor: fp32 or bf16 on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and library("passes") is not None


def _call(name: str, head: ctypes.Structure, *tensors: torch.Tensor, apart: torch.Tensor | None = None) -> None:
    """apart: the one tensor whose lines may be apart, if there is one."""
    assert all(x.is_contiguous() or x is apart for x in tensors) and (apart is None or apart.stride(-1) == 1)
    failed = getattr(library("passes"), name)(
        ctypes.byref(head), *(x.data_ptr() for x in tensors), torch.get_num_threads()
    )
    assert not failed, f"{name}: unknown activation function"


def _is_bf16(x: torch.Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


# ---- norms


def _norm(x: torch.Tensor, *, eps: float, offset: float, groups: int) -> Norm:
    lines = x.numel() // x.shape[-1]
    rows = max(1, min(STRETCH_LINES, -(-lines // STRETCHES)))
    return Norm(
        lines=lines * groups, width=x.shape[-1] // groups, groups=groups, stretch=rows * groups, bf16=_is_bf16(x),
        eps=eps, offset=offset,
    )  # fmt: skip


def norm_forward(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x contiguous. -> (normed x, 1 / root mean square of each group [..., groups, 1])."""
    out = torch.empty_like(x)
    roots = torch.empty(*x.shape[:-1], groups, 1)
    head = _norm(x, eps=eps, offset=offset, groups=groups)
    _call("stratum_norm_forward", head, x, weight.float().contiguous(), out, roots)
    return out, roots


def norm_backward(
    x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor, grad: torch.Tensor, *, offset: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of (x, weight in fp32)."""
    head = _norm(x, eps=0.0, offset=offset, groups=groups)
    grad_x, grad_weight = torch.empty_like(x), torch.empty(x.shape[-1])
    sums = torch.empty(-(-head.lines // head.stretch), x.shape[-1])
    _call(
        "stratum_norm_backward", head, x, weight.float().contiguous(), roots, grad, grad_x, sums, grad_weight
    )  # fmt: skip
    return grad_x, grad_weight


# ---- activations


def _activation(x: torch.Tensor, function: str, *, gated: bool) -> Activation:
    width = x.shape[-1] // (2 if gated else 1)
    return Activation(
        lines=x.numel() // x.shape[-1], width=width, bf16=_is_bf16(x), function=FUNCTIONS.index(function),
        gated=int(gated),
    )  # fmt: skip


def activation_forward(x: torch.Tensor, function: str, *, gated: bool) -> torch.Tensor:
    """x contiguous, [..., width] or [..., gate | up] -> [..., width]."""
    head = _activation(x, function, gated=gated)
    out = x.new_empty(*x.shape[:-1], head.width)
    _call("stratum_activation_forward", head, x, out)
    return out


def activation_backward(x: torch.Tensor, grad: torch.Tensor, function: str, *, gated: bool) -> torch.Tensor:
    """-> gradient of x."""
    grad_x = torch.empty_like(x)
    _call("stratum_activation_backward", _activation(x, function, gated=gated), x, grad, grad_x)
    return grad_x


# ---- loss


def _loss(logits: torch.Tensor, cap: float | None) -> Loss:
    return Loss(
        lines=logits.shape[0], width=logits.shape[1], pitch=logits.stride(0), bf16=_is_bf16(logits), cap=cap or 0.0
    )


def loss_forward(logits: torch.Tensor, labels: torch.Tensor, *, cap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [lines, vocabulary], lines may be apart; labels int64 [lines], negative if the label is in another rank's slice.

    -> (log-sum-exp of each line, (capped) logit at its label or zero), fp32.
    """
    log_sums, targets = torch.empty(2, logits.shape[0]).unbind()
    _call("stratum_loss_forward", _loss(logits, cap), logits, labels, log_sums, targets, apart=logits)
    return log_sums, targets


def loss_backward_(
    logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor, grad: torch.Tensor, *, cap: float | None
) -> None:
    """Overwrite the logits with their gradients. grad: fp32 [lines]."""
    _call("stratum_loss_backward", _loss(logits, cap), logits, labels, log_sums, grad, apart=logits)
