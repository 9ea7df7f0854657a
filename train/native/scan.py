"""Binding of the compiled Mamba-2 scan in `scan.c`. `train.model.ssd` has the formulas, `train.model.chunked` the definition."""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch

from train.native.kernels import call, library_for


@dataclass(frozen=True)
class ScanSizes:
    """Sizes of the scan on this rank."""

    heads: int
    head_dim: int
    state: int
    groups: int
    chunk: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups


class ScanWeights(NamedTuple):
    """Parameters of the convolution and the scan on this rank."""

    conv_weight_CW: torch.Tensor
    conv_bias_C: torch.Tensor
    dt_bias_H: torch.Tensor
    A_log_H: torch.Tensor
    D_H: torch.Tensor


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
            "stepwise",
        ]
    ]


STEPWISE_TOKENS = 16
"""New tokens of a text up to here run token by token, so that a text has the same bits however it is cut into such steps."""


def scan_usable(zxbcdt: torch.Tensor, sizes: ScanSizes) -> bool:
    """Whether the compiled scan supports this input: on a CPU, not float64, widths that are multiples of the lanes."""
    if zxbcdt.device.type != "cpu" or zxbcdt.dtype == torch.float64:
        return False
    return _library(sizes) is not None


def _library(sizes: ScanSizes) -> ctypes.CDLL | None:
    return library_for("scan", sizes.head_dim, sizes.state)


MOST_PARTS = 8
"""A group's heads are split into at most this many parts, and so a row and group into at most as many tasks."""


def scan_shape(zxbcdt_LBD: torch.Tensor, sizes: ScanSizes, taps: int) -> Shape:
    """The sizes as the kernels need them. The heads of a group are split until tasks divide evenly among threads; the bits
    do not depend on the split (scan.c says why)."""
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
    sizes: ScanSizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolution, scan and gate. All fp32 and contiguous. -> (out [L, B, HP], pre [B, L, C], y [B, L, HP], states)."""
    kernels = _library(sizes)
    assert kernels is not None
    length, rows, _ = zxbcdt_LBD.shape
    shape = scan_shape(zxbcdt_LBD, sizes, conv_weight_CW.shape[1])
    pre = torch.empty(rows, length, sizes.conv_channels)
    y = torch.empty(rows, length, sizes.inner)
    out = torch.empty(length, rows, sizes.inner)
    states = torch.empty(rows, -(-length // sizes.chunk), sizes.heads, sizes.state, sizes.head_dim)
    weight_WC = conv_weight_CW.t().contiguous()
    call(kernels.stratum_conv_forward, shape, zxbcdt_LBD, weight_WC, conv_bias_C, first_BL, pre)
    call(kernels.stratum_scan_forward, shape, zxbcdt_LBD, pre, dt_BLH, A_H, D_H, first_BL, y, out, states)
    return out, pre, y, states


def scan_steps(
    zxbcdt_LBD: torch.Tensor, weights: ScanWeights, *, first_BL: torch.Tensor | None, sizes: ScanSizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`scan_forward` token by token: bit by bit what `scan_segments` gives the tokens of a text one at a time."""
    kernels = _library(sizes)
    assert kernels is not None
    length, rows, _ = zxbcdt_LBD.shape
    shape = scan_shape(zxbcdt_LBD, sizes, weights.conv_weight_CW.shape[1])
    pre = torch.empty(rows, length, sizes.conv_channels)
    dt, y = torch.empty(rows, length, sizes.heads), torch.empty(rows, length, sizes.inner)
    out = torch.empty(length, rows, sizes.inner)
    states = torch.empty(rows, -(-length // sizes.chunk), sizes.heads, sizes.state, sizes.head_dim)
    weight_WC = weights.conv_weight_CW.t().contiguous()
    call(kernels.stratum_conv_forward, shape, zxbcdt_LBD, weight_WC, weights.conv_bias_C, first_BL, pre)
    call(
        kernels.stratum_scan_steps, shape, zxbcdt_LBD, pre, weights.dt_bias_H, weights.A_log_H, weights.D_H, first_BL,
        dt, y, out, states,
    )  # fmt: skip
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
    sizes: ScanSizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes `grad_zxbcdt` except its dt channels. -> gradients of (conv weight [C, W], conv bias, dt [B, L, H], A, D)."""
    kernels = _library(sizes)
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
    call(
        kernels.stratum_scan_backward, shape, zxbcdt_LBD, pre, dt_BLH, A_H, D_H, first_BL, y, states, grad_out_LBI,
        grad_zxbcdt, grad_pre, shared, grad_dt, grad_A, grad_D,
    )  # fmt: skip
    call(kernels.stratum_scan_finish, shape, pre, first_BL, shared, grad_pre)
    call(
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


def scan_segments(
    zxbcdt_TD: torch.Tensor,
    table_S4: torch.Tensor,
    *,
    weights: ScanWeights,
    conv_pool: torch.Tensor,
    scan_pool: torch.Tensor,
    sizes: ScanSizes,
    trial_S: torch.Tensor | None = None,
    is_stepwise: bool = False,
) -> torch.Tensor:
    """Convolution, scan and gate of the texts of a step of inference, which update their slots. All fp32 and contiguous; table:
    (begin, tokens, tokens before, slot) of each text; trial_S: 1 for a text that leaves its slot as it is; is_stepwise: token by
    token for texts of any length. -> [T, HP]."""
    kernels = _library(sizes)
    assert kernels is not None
    tokens, width = zxbcdt_TD.shape
    taps = weights.conv_weight_CW.shape[1]
    texts = len(table_S4)
    splits = 1
    while texts * sizes.groups * splits < torch.get_num_threads() and not sizes.heads_per_group % (2 * splits):
        splits *= 2
    head = Shape(
        rows=texts, length=tokens, width=width, heads=sizes.heads, head_dim=sizes.head_dim, state=sizes.state,
        groups=sizes.groups, chunk=sizes.chunk, splits=splits, parts=splits, taps=taps,
        stepwise=tokens if is_stepwise else STEPWISE_TOKENS,
    )  # fmt: skip
    out = torch.empty(tokens, sizes.inner)
    scratch = torch.empty(taps * sizes.conv_channels + tokens * (sizes.conv_channels + sizes.heads + sizes.inner))
    turned, pre, dt, y = scratch.split(
        [taps * sizes.conv_channels, tokens * sizes.conv_channels, tokens * sizes.heads, tokens * sizes.inner]
    )
    call(
        kernels.stratum_scan_segments,
        head,
        zxbcdt_TD,
        table_S4,
        *weights,
        conv_pool,
        scan_pool,
        turned,
        pre,
        dt,
        y,
        out,
        trial_S,
    )
    return out
