"""The compiled forms of the scan and of attention: `scan.c`, `attention.c`, built on first use (and `passes.c`, which
`train.native.passes` calls).

Plain torch (`train.model.ssd`, `train.model.capped`) is the definition and takes over where there is no compiler, on other
devices and in float64; tests hold both to the same tolerances. STRATUM_NATIVE=0 turns the compiled forms off.
"""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.native import build_c

if TYPE_CHECKING:
    from train.model.ssd import ScanSizes

FOLDER = Path(__file__).parent
ATTENTION = "pairs lines keys width groups per_group queries offset stretches"


class Shape(ctypes.Structure):
    """Mirror of `Shape` in scan.c."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in [
            "rows",
            "length",
            "width",
            "heads",
            "head_dim",
            "state",
            "groups",
            "chunk",
            "splits",
            "parts",
            "taps",
        ]
    ]


class Attention(ctypes.Structure):
    """Mirror of `Attention` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ATTENTION.split()),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.c, or None where that is not possible here (said once, at info level)."""
    loaded = build_c.load_if_possible(FOLDER / f"{name}.c", FOLDER / "simd.h", what=f"{name}.c is")
    if loaded is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    arguments = {
        "stratum_scan_forward": 9, "stratum_scan_backward": 15, "stratum_scan_finish": 4,
        "stratum_conv_forward": 5, "stratum_conv_backward": 7,
        "stratum_capped_forward": 7, "stratum_capped_backward": 11,
        "stratum_norm_forward": 4, "stratum_norm_backward": 7,
        "stratum_activation_forward": 2, "stratum_activation_backward": 3,
        "stratum_loss_forward": 4, "stratum_loss_backward": 4,
    }  # fmt: skip
    for function, tensors in arguments.items():
        if hasattr(loaded, function):
            getattr(loaded, function).argtypes = [pointer] * (tensors + 1) + [number]
    loaded.stratum_lanes.restype = number
    return loaded


def attention_usable(query: torch.Tensor) -> bool:
    """Whether the compiled attention takes heads like these [..., width]: on a CPU, not float64, filling its vectors."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return False
    kernels = library("attention")
    return kernels is not None and query.shape[-1] % kernels.stratum_lanes() == 0


def scan_usable(zxbcdt: torch.Tensor, sizes: "ScanSizes") -> bool:
    """Whether the compiled scan takes this input: on a CPU, not float64, widths that fill its vectors."""
    if zxbcdt.device.type != "cpu" or zxbcdt.dtype == torch.float64:
        return False
    kernels = library("scan")
    return kernels is not None and not (
        sizes.head_dim % kernels.stratum_lanes() or sizes.state % kernels.stratum_lanes()
    )


def _call(function: Any, head: ctypes.Structure, *tensors: torch.Tensor | None) -> None:
    """Call a kernel with its leading struct and pointers; every tensor is contiguous where the kernel assumes it."""
    assert all(x is None or x.is_contiguous() for x in tensors)
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    if function(ctypes.byref(head), *pointers, torch.get_num_threads()):
        raise MemoryError("no memory for the scan's scratch space")


# ---- capped attention

TASKS = 16
"""Tasks that a backward pass over attention is cut into at least, whatever the threads."""


def _attention(q: torch.Tensor, k: torch.Tensor, first_key_BQ: torch.Tensor, plan: Any) -> Attention:
    pairs, lines, width = q.shape
    queries = first_key_BQ.shape[1]
    return Attention(
        pairs=pairs, lines=lines, keys=k.shape[1], width=width, groups=plan.groups, per_group=lines // queries,
        queries=queries, offset=plan.offset, stretches=max(1, min(-(-TASKS // pairs), lines // 128)), scale=plan.scale,
        softcap=plan.softcap,
    )  # fmt: skip


def _turned(k: torch.Tensor, times: int) -> torch.Tensor:
    kernels = library("attention")
    assert kernels is not None
    block = kernels.stratum_keys()
    return torch.empty(times * k.shape[0] * -(-k.shape[1] // block) * block * k.shape[2])


def capped_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_key_BQ: torch.Tensor, plan: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [pairs, lines, D], k, v [pairs, keys, D], fp32 and contiguous. -> (out like q, sums of p [pairs, lines]; without a cap
    (plan.softcap 0) their logarithms)."""
    kernels = library("attention")
    assert kernels is not None
    out, sums = torch.empty_like(q), torch.empty(q.shape[:2])
    head = _attention(q, k, first_key_BQ, plan)
    _call(kernels.stratum_capped_forward, head, q, k, v, first_key_BQ, _turned(k, 1), out, sums)
    return out, sums


def capped_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key_BQ: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
    constant: torch.Tensor,
    plan: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad: of out, with a cap divided by the sums; constant: <grad, out>. -> gradients of q, k, v."""
    kernels = library("attention")
    assert kernels is not None
    head = _attention(q, k, first_key_BQ, plan)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.empty(2, head.stretches, *k.shape).unbind()
    _call(
        kernels.stratum_capped_backward, head, q, k, v, first_key_BQ, sums, grad, constant, _turned(k, 2), grad_q, grad_k, grad_v
    )  # fmt: skip
    return grad_q, grad_k.sum(0), grad_v.sum(0)


# ---- the scan

MOST_PARTS = 8
"""Parts of a group's heads at most, and so tasks of a row and group."""


def scan_shape(zxbcdt_LBD: torch.Tensor, sizes: "ScanSizes", taps: int) -> Shape:
    """The kernels' view of the sizes. Heads of a group are split until all threads have as many tasks; the bits do not
    depend on that (scan.c says why)."""
    length, rows, width = zxbcdt_LBD.shape
    per_group = sizes.heads_per_group
    parts = min(per_group & -per_group, MOST_PARTS)
    tasks, threads, splits = rows * sizes.groups, torch.get_num_threads(), 1
    while splits < parts and tasks * splits % threads and tasks * splits < 4 * threads:
        splits *= 2
    return Shape(
        rows=rows, length=length, width=width, heads=sizes.heads, head_dim=sizes.head_dim, state=sizes.state,
        groups=sizes.groups, chunk=sizes.chunk, splits=splits, parts=parts, taps=taps,
    )  # fmt: skip


def scan_forward(
    zxbcdt_LBD: torch.Tensor,
    *,
    conv_weight_CW: torch.Tensor,
    conv_bias_C: torch.Tensor,
    dt_BLH: torch.Tensor,
    A_H: torch.Tensor,
    D_H: torch.Tensor,
    first_BL: torch.Tensor | None,
    sizes: "ScanSizes",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolution, scan and gate. All fp32 and contiguous. -> (out [L, B, HP], pre [B, L, C], y [B, L, HP], states)."""
    kernels = library("scan")
    assert kernels is not None
    length, rows, _ = zxbcdt_LBD.shape
    shape = scan_shape(zxbcdt_LBD, sizes, conv_weight_CW.shape[1])
    pre = torch.empty(rows, length, sizes.conv_channels)
    y = torch.empty(rows, length, sizes.inner)
    out = torch.empty(length, rows, sizes.inner)
    states = torch.empty(rows, -(-length // sizes.chunk), sizes.heads, sizes.state, sizes.head_dim)
    weight_WC = conv_weight_CW.t().contiguous()
    _call(kernels.stratum_conv_forward, shape, zxbcdt_LBD, weight_WC, conv_bias_C, first_BL, pre)
    _call(kernels.stratum_scan_forward, shape, zxbcdt_LBD, pre, dt_BLH, A_H, D_H, first_BL, y, out, states)
    return out, pre, y, states


def scan_backward(
    grad_out_LBI: torch.Tensor,
    zxbcdt_LBD: torch.Tensor,
    *,
    conv_weight_CW: torch.Tensor,
    dt_BLH: torch.Tensor,
    A_H: torch.Tensor,
    D_H: torch.Tensor,
    first_BL: torch.Tensor | None,
    pre: torch.Tensor,
    y: torch.Tensor,
    states: torch.Tensor,
    grad_zxbcdt: torch.Tensor,
    sizes: "ScanSizes",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes all of `grad_zxbcdt` but dt. -> gradients of (conv weight [C, W], conv bias, dt [B, L, H], A, D)."""
    kernels = library("scan")
    assert kernels is not None
    length, rows, _ = zxbcdt_LBD.shape
    shape = scan_shape(zxbcdt_LBD, sizes, conv_weight_CW.shape[1])
    grad_pre = torch.empty_like(pre)
    chunks, padded = -(-length // sizes.chunk), -(-sizes.chunk // kernels.stratum_lanes()) * kernels.stratum_lanes()
    shared = torch.empty(
        shape.splits, rows, sizes.groups, chunks, sizes.chunk, padded + 2 * sizes.state
    )  # gradients of scores, B and C
    grad_dt = torch.empty(rows, length, sizes.heads)
    grad_A, grad_D = torch.empty(2, rows, sizes.heads).unbind()
    weight_WC = conv_weight_CW.t().contiguous()
    grad_weight, grad_bias = torch.empty_like(weight_WC), torch.empty(sizes.conv_channels)
    _call(
        kernels.stratum_scan_backward, shape, zxbcdt_LBD, pre, dt_BLH, A_H, D_H, first_BL, y, states, grad_out_LBI,
        grad_zxbcdt, grad_pre, shared, grad_dt, grad_A, grad_D,
    )  # fmt: skip
    _call(kernels.stratum_scan_finish, shape, pre, first_BL, shared, grad_pre)
    _call(
        kernels.stratum_conv_backward,
        shape,
        zxbcdt_LBD,
        weight_WC,
        first_BL,
        grad_pre,
        grad_zxbcdt,
        grad_weight,
        grad_bias,
    )
    return grad_weight.t(), grad_bias, grad_dt, grad_A.sum(0), grad_D.sum(0)
