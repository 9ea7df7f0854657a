"""The compiled forms of the scan and of capped attention's elementwise work: `scan.c`, `attention.c`, built on first use.

Plain torch (`train.model.ssd`, `train.model.capped`) is the definition and takes over where there is no compiler, on other
devices and in float64; tests hold both to the same tolerances. STRATUM_NATIVE=0 turns the compiled forms off.
"""

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data import build_c

if TYPE_CHECKING:
    from train.model.ssd import ScanSizes

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SHAPE = "rows length width heads head_dim state groups chunk splits taps"
BLOCK = "pairs lines keys first_pair first_query first_key groups per_group queries offset sums_row"


class Shape(ctypes.Structure):
    """Mirror of `Shape` in scan.c."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ["rows", "length", "width", "heads", "head_dim", "state", "groups", "chunk", "splits", "taps"]
    ]


class Block(ctypes.Structure):
    """Mirror of `Block` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in BLOCK.split()),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.c, or None where that is not possible here (said once, at info level)."""
    if not build_c.wanted():
        return None
    try:
        loaded = build_c.load(FOLDER / f"{name}.c", FOLDER / "simd.h")
    except (OSError, subprocess.CalledProcessError) as error:
        log.info(
            "%s.c is not compiled (%s); plain torch is used instead", name, getattr(error, "stderr", None) or error
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    arguments = {
        "stratum_scan_forward": 9, "stratum_scan_backward": 15, "stratum_scan_finish": 3,
        "stratum_conv_forward": 5, "stratum_conv_backward": 7,
        "stratum_capped_exponentials": 3, "stratum_capped_gradients": 4,
    }  # fmt: skip
    for function, tensors in arguments.items():
        if hasattr(loaded, function):
            getattr(loaded, function).argtypes = [pointer] * (tensors + 1) + [number]
    loaded.stratum_lanes.restype = number
    return loaded


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the compiled forms take tensors like these: fp32 on a CPU."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and library("attention") is not None
    )


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
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    if function(ctypes.byref(head), *pointers, torch.get_num_threads()):
        raise MemoryError("no memory for the scan's scratch space")


# ---- capped attention


def capped_block(
    block: Any, plan: Any, scores: torch.Tensor, per_line: torch.Tensor, first_key_BQ: torch.Tensor
) -> Block:
    """The kernels' view of a block (`train.model.capped`)."""
    pairs, lines, keys = scores.shape
    return Block(
        pairs=pairs, lines=lines, keys=keys,
        first_pair=block.pairs.start, first_query=block.queries.start, first_key=block.keys.start,
        groups=plan.groups, per_group=lines // (block.queries.stop - block.queries.start), queries=first_key_BQ.shape[1],
        offset=plan.offset, sums_row=per_line.stride(0), scale=plan.scale, softcap=plan.softcap,
    )  # fmt: skip


def capped_exponentials(
    block: Any, plan: Any, scores: torch.Tensor, sums: torch.Tensor, first_key_BQ: torch.Tensor
) -> None:
    """`train.model.capped._exponentials_`. sums: [pairs, lines], lines contiguous; first_key_BQ contiguous."""
    kernels = library("attention")
    assert kernels is not None and scores.is_contiguous() and first_key_BQ.is_contiguous() and sums.stride(1) == 1
    _call(
        kernels.stratum_capped_exponentials,
        capped_block(block, plan, scores, sums, first_key_BQ),
        first_key_BQ, scores, sums,
    )  # fmt: skip


def capped_gradients(
    block: Any,
    plan: Any,
    scores: torch.Tensor,
    grad_p: torch.Tensor,
    constant: torch.Tensor,
    first_key_BQ: torch.Tensor,
) -> None:
    """`train.model.capped._gradients_`; scores become p."""
    kernels = library("attention")
    assert kernels is not None and scores.is_contiguous() and grad_p.is_contiguous() and constant.stride(1) == 1
    _call(
        kernels.stratum_capped_gradients,
        capped_block(block, plan, scores, constant, first_key_BQ),
        first_key_BQ, scores, grad_p, constant,
    )  # fmt: skip


# ---- the scan


def scan_shape(zxbcdt_LBD: torch.Tensor, sizes: "ScanSizes", taps: int) -> Shape:
    """The kernels' view of the sizes. Heads of a group are split until there are eight tasks, whatever the threads."""
    length, rows, width = zxbcdt_LBD.shape
    per_group = sizes.heads_per_group
    wanted = -(-8 // (rows * sizes.groups))
    splits = next(s for s in range(1, per_group + 1) if per_group % s == 0 and (s >= wanted or s == per_group))
    return Shape(
        rows=rows, length=length, width=width, heads=sizes.heads, head_dim=sizes.head_dim, state=sizes.state,
        groups=sizes.groups, chunk=sizes.chunk, splits=splits, taps=taps,
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
    grad_BC = torch.empty(shape.splits, rows, length, 2 * sizes.groups * sizes.state)
    grad_dt = torch.empty(rows, length, sizes.heads)
    grad_A, grad_D = torch.empty(2, rows, sizes.heads).unbind()
    weight_WC = conv_weight_CW.t().contiguous()
    grad_weight, grad_bias = torch.empty_like(weight_WC), torch.empty(sizes.conv_channels)
    _call(
        kernels.stratum_scan_backward, shape, zxbcdt_LBD, pre, dt_BLH, A_H, D_H, first_BL, y, states, grad_out_LBI,
        grad_zxbcdt, grad_pre, grad_BC, grad_dt, grad_A, grad_D,
    )  # fmt: skip
    _call(kernels.stratum_scan_finish, shape, pre, grad_BC, grad_pre)
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
