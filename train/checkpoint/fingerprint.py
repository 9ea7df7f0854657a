"""A 128-bit fingerprint of a tensor that does not depend on how the tensor is sharded.

    F_lane(T) = sum over rows r, columns c of  rho_lane(r) * alpha_lane(c) * bits(r, c)    mod 2^64,  lane = 0, 1

The last dimension counts as columns, the others, flattened, as rows; `bits` is an element as an unsigned integer (8-byte
elements count as two columns). rho (64 bits) and alpha (32 bits) are odd and come from splitmix64 of their coordinate in
the *whole* tensor (Steele, Lea, Flood 2014). So the sum of a part does not depend on the rank or file that contains it, and the
sums of all parts add up to the tensor's. This is multilinear hashing mod 2^64 (Lemire, Kaser, arXiv 1202.4961): a change of a
single element is always detected; any other change made without knowledge of the coefficients is missed with a probability of
about 2^-64. It does not protect against deliberate forgery.

The same pass counts NaN and infinite elements, because a checkpoint that contains them is useless even if it is intact.

On a CPU a compiled kernel computes it at memory speed. Elsewhere torch operations on the tensor's device give the same result.
"""

import ctypes
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from train.native.fingerprint import kernels

LANES = 2
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_DIGITS = re.compile(r"[0-9a-f]{32}")
_CHUNK = 1 << 20
"""Elements per block in the torch version, whose temporaries take 8 bytes an element."""

_EXPONENT = {
    torch.float64: 0x7FF0 << 48, torch.float32: 0x7F80 << 16, torch.bfloat16: 0x7F80, torch.float16: 0x7C00,
    torch.float8_e5m2: 0x7C, torch.float8_e4m3fn: 0x7F,
}  # fmt: skip
"""Bits that are all ones only in NaN and infinity: the exponent; for E4M3, which has no infinity, the bits of its NaN
(arXiv 2209.05433, table 1). Formats that are not listed are integers."""


class Sums(NamedTuple):
    """A partial fingerprint: a sum in each lane, 0 <= s < 2^64, and how many elements are NaN or infinite."""

    first: int
    second: int
    not_finite: int = 0


ZERO = Sums(0, 0)
"""The fingerprint of an empty box, and of zeros."""


def of_box(
    data: torch.Tensor, *, whole: Sequence[int], offset: Sequence[int], shape: Sequence[int], copy_to: int | None = None
) -> Sums:
    """The contribution of a box of a tensor to the tensor's fingerprint.

    data: the box's elements in order; contiguous, of any shape. whole: shape of the whole tensor. offset, shape: the box.
    copy_to: address to which the same pass copies the box's bytes (CPU only).
    """
    assert data.is_contiguous() and data.numel() == math.prod(shape), "a box's elements, in order"
    if data.numel() == 0:
        return ZERO
    assert len(whole) == len(offset) == len(shape), "as many numbers for each"
    width = data.element_size()
    if data.device.type == "cpu" and (kernel := kernels()) is not None:
        sums = (ctypes.c_uint64 * (LANES + 1))()
        kernel.stratum_fingerprint(
            data.data_ptr(), width, *_numbers(whole, offset, shape), copy_to, *_exponent_words(data.dtype), sums
        )
        return Sums(*sums)
    if copy_to is not None:
        ctypes.memmove(copy_to, data.data_ptr(), data.numel() * width)
    return _in_torch(data, whole=whole, offset=offset, shape=shape)


def of_stored_box(
    handle: int,
    start: int,
    *,
    dtype: torch.dtype,
    whole: Sequence[int],
    offset: Sequence[int],
    shape: Sequence[int],
    scratch: torch.Tensor,
) -> Sums | None:
    """`of_box` for a box of any size in an open file, starting at byte `start`. None without compiled kernels.

    scratch: uint8 CPU buffer of at least 8 bytes; its size is the size of a read. Raises OSError if a read fails or the
    file ends too early.
    """
    kernel = kernels()
    if kernel is None:
        return None
    assert len(whole) == len(offset) == len(shape), "as many numbers for each"
    sums = (ctypes.c_uint64 * (LANES + 1))()
    box, exponent = _numbers(whole, offset, shape), _exponent_words(dtype)
    problem = kernel.stratum_fingerprint_file(
        handle, start, scratch.data_ptr(), scratch.numel(), dtype.itemsize, *box, *exponent, sums
    )
    if problem:
        raise OSError(problem, os.strerror(problem)) if problem > 0 else OSError("the file ends too early")
    return Sums(*sums)


def add(a: Sums, b: Sums) -> Sums:
    """The fingerprint of two parts together."""
    return Sums((a.first + b.first) % 2**64, (a.second + b.second) % 2**64, a.not_finite + b.not_finite)


def times(a: Sums, count: int) -> Sums:
    """The sum of `count` copies."""
    return Sums(a.first * count % 2**64, a.second * count % 2**64, a.not_finite * count)


def text(sums: Sums) -> str:
    """32 hexadecimal digits."""
    return f"{sums.first:016x}{sums.second:016x}"


def from_text(digits: str) -> Sums:
    """The inverse of `text`; `not_finite` is 0, because the text does not contain it. Raises ValueError."""
    if not isinstance(digits, str) or not _DIGITS.fullmatch(digits):
        raise ValueError(f"{digits!r} is not a fingerprint of 32 digits")
    return Sums(int(digits[:16], 16), int(digits[16:], 16))


def to_tensor(sums: list[Sums]) -> torch.Tensor:
    """[len, 3] int64 whose wrapping sums over ranks are the sums of fingerprints."""
    return torch.tensor([[_signed(number) for number in each] for each in sums], dtype=torch.int64).reshape(
        -1, LANES + 1
    )


def from_tensor(values: torch.Tensor) -> list[Sums]:
    """The inverse of `to_tensor`."""
    return [Sums(a % 2**64, b % 2**64, count) for a, b, count in values.tolist()]


def _exponent_words(dtype: torch.dtype) -> tuple[int, int]:
    """`Sick` in fingerprint.c: mask and lowest bit of the exponent, repeated through 64 bits."""
    mask = _EXPONENT.get(dtype, 0)
    repeated = sum(1 << shift for shift in range(0, 64, 8 * dtype.itemsize))
    return mask * repeated, (mask & -mask) * repeated


def _numbers(*of_each: Sequence[int]) -> tuple[Any, ...]:
    """The number of dimensions, and whole, offset and shape as C arrays."""
    numbers = ctypes.c_int64 * len(of_each[0])
    return (len(of_each[0]), *(numbers(*each) for each in of_each))


def _rows(whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Index in the whole tensor of each row of a box, int64."""
    rows = torch.zeros(1, dtype=torch.int64)
    for size, start, length in zip(whole[:-1], offset[:-1], shape[:-1], strict=True):
        rows = (rows[:, None] * size + torch.arange(start, start + length)[None, :]).reshape(-1)
    return rows


def _in_torch(data: torch.Tensor, *, whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> Sums:
    """The torch version, on the tensor's own device. int64 products wrap modulo 2^64, which is what the formula needs."""
    columns, first = (shape[-1], offset[-1]) if shape else (1, 0)
    width, rows = data.element_size(), _rows(whole, offset, shape)
    if width == 8:
        columns, first, width = 2 * columns, 2 * first, 4
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
    bits = data.reshape(-1).view(kind).reshape(len(rows), columns)
    rows = rows.to(data.device)
    column = torch.arange(first, first + columns, device=data.device)
    totals = [torch.zeros((), dtype=torch.int64, device=data.device) for _ in range(LANES)]
    step = max(1, _CHUNK // columns)
    alphas = [(_shifted(_mix(LANES * column + lane), 32)) | 1 for lane in range(LANES)]
    for start in range(0, len(rows), step):
        part = bits[start : start + step].to(torch.int64) & ((1 << (8 * width)) - 1)
        for lane in range(LANES):
            rho = _mix(~(LANES * rows[start : start + step] + lane)) | 1
            totals[lane] += ((part * alphas[lane]).sum(1) * rho).sum()
    first_lane, second_lane, not_finite = torch.stack([*totals, _count_not_finite(data)]).tolist()
    return Sums(first_lane % 2**64, second_lane % 2**64, not_finite)


def _count_not_finite(data: torch.Tensor) -> torch.Tensor:
    """int64, on the tensor's device. Tests the bits, because torch has no `isfinite` for every format."""
    mask = _EXPONENT.get(data.dtype, 0)
    if not mask:
        return torch.zeros((), dtype=torch.int64, device=data.device)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    parts = data.reshape(-1).view(kind).split(_CHUNK)
    return torch.stack([((part & mask) == mask).sum() for part in parts]).sum()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 of int64 values, arithmetic modulo 2^64."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift; torch's `>>` of int64 is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
