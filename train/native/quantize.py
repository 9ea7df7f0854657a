"""Binding of the compiled quantisers in `quantize.c`, built once for this machine with its C compiler.

Without a compiler `train.precision.quantize` computes the same bits, several times slower. STRATUM_NATIVE=0 turns the
compiled version off.
"""

import ctypes
from pathlib import Path

import torch

from data.native import build_c

SOURCE = Path(__file__).with_name("quantize.c")
FLAGS = ("-ffp-contract=off",)
"""No fused multiply-add: these kernels must give the same bits as the plain torch version."""


class Spec(ctypes.Structure):
    """Mirror of `Spec` in quantize.c."""

    _fields_ = [
        ("mantissa", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32),
        ("max", ctypes.c_float),
        ("rule", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("tensor_multiplier", ctypes.c_float),
        ("tensor_decode", ctypes.c_float),
    ]


@build_c.Cached
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if needed; None if they cannot be built here (logged once, at info level)."""
    loaded = build_c.load_if_possible(SOURCE, flags=FLAGS, what="low-precision kernels are")
    if loaded is None:
        return None
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    spec = ctypes.POINTER(Spec)
    loaded.stratum_amax.restype = loaded.stratum_tensor.restype = ctypes.c_float
    loaded.stratum_amax.argtypes = [pointer, i64, i32, i32]
    loaded.stratum_tensor.argtypes = [pointer, i64, i32, ctypes.c_float, spec, pointer, i32]
    loaded.stratum_blocks.argtypes = [pointer, i64, i64, i32, i64, i64, spec, pointer, i32]
    loaded.stratum_rotate.argtypes = [pointer, i64, i64, i32, pointer, pointer, i32]
    loaded.stratum_compare.restype = i32
    loaded.stratum_compare.argtypes = [pointer, pointer, i64, i32, ctypes.c_float, ctypes.c_float, pointer, i32]
    return loaded


def usable(x: torch.Tensor) -> bool:
    """Whether the compiled kernels support this matrix."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous()
        and library() is not None
    )


def amax(x: torch.Tensor) -> float:
    """Largest magnitude of a matrix, NaN ignored."""
    kernels = library()
    assert kernels is not None
    return kernels.stratum_amax(x.data_ptr(), x.numel(), _kind(x), torch.get_num_threads())


def tensor(x: torch.Tensor, spec: Spec, *, encode: float) -> tuple[torch.Tensor, float]:
    """Round x * encode. -> (rounded values [rows, columns] fp32, amax of x)."""
    kernels = library()
    assert kernels is not None
    out = torch.empty(x.shape, dtype=torch.float32)
    threads = torch.get_num_threads()
    seen = kernels.stratum_tensor(
        x.data_ptr(), x.numel(), _kind(x), encode, ctypes.byref(spec), out.data_ptr(), threads
    )
    return out, seen


def blocks(x: torch.Tensor, spec: Spec, *, height: int, width: int) -> torch.Tensor:
    """Quantise and decode by blocks of height x width. -> [rows, columns] fp32."""
    kernels = library()
    assert kernels is not None
    out = torch.empty(x.shape, dtype=torch.float32)
    rows, columns = x.shape
    kernels.stratum_blocks(
        x.data_ptr(),
        rows,
        columns,
        _kind(x),
        height,
        width,
        ctypes.byref(spec),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def rotate(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """matrix^T times every 16 rows of x, matrix: [16, 16] fp32. -> fp32, rounded to bf16 if x is bf16."""
    kernels = library()
    assert kernels is not None
    out = torch.empty(x.shape, dtype=torch.float32)
    rows, columns = x.shape
    kernels.stratum_rotate(
        x.data_ptr(), rows, columns, _kind(x), matrix.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def compare(x: torch.Tensor, values: torch.Tensor, *, factor: float, limit: float) -> tuple[float, float, int, int]:
    """Compare values * factor with x, over finite elements. -> sum of x^2, sum of squared differences, number of elements
    that became zero, number of elements with |x| > limit. values: contiguous fp32, x's shape."""
    kernels = library()
    assert kernels is not None
    sums = (ctypes.c_double * 4)()
    failed = kernels.stratum_compare(
        x.data_ptr(), values.data_ptr(), x.numel(), _kind(x), factor, limit, sums, torch.get_num_threads()
    )
    if failed:
        raise MemoryError("not enough memory to measure quantisation errors")
    return sums[0], sums[1], int(sums[2]), int(sums[3])


def _kind(x: torch.Tensor) -> int:
    return 1 if x.dtype == torch.bfloat16 else 0
