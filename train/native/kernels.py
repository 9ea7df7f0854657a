"""The C kernels of the model (`scan.c`, `attention.c`, `passes.c`, `few_rows.c`), compiled on first use, for CPU tensors.

Each has a definition in plain torch, which is used without a compiler, on other devices and in float64; the tests use the
same tolerances for both. STRATUM_NATIVE=0 turns the compiled versions off.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from data.native import build_c

FOLDER = Path(__file__).parent


def library_for(name: str, *widths: int) -> ctypes.CDLL | None:
    """The compiled `name`.c with the most lanes that divide all of these widths; None if no count of lanes does."""
    wide = library(name)
    if wide is None or not any(width % wide.stratum_lanes() for width in widths):
        return wide
    if wide.stratum_lanes() <= _NARROW_LANES or any(width % _NARROW_LANES for width in widths):
        return None
    return library(name, is_narrow=True)


_NARROW_LANES = 8
"""Of AVX2, which every processor with AVX-512 has too."""


@build_c.Cached
def library(name: str, *, is_narrow: bool = False) -> ctypes.CDLL | None:
    """The compiled `name`.c, or None if it cannot be compiled here (logged once, at info level). is_narrow: without AVX-512."""
    flags = ("-mno-avx512f",) if is_narrow else ()
    loaded = build_c.load_if_possible(FOLDER / f"{name}.c", FOLDER / "simd.h", flags=flags, what=f"{name}.c is")
    if loaded is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    arguments = {
        "stratum_scan_forward": 9, "stratum_scan_backward": 15, "stratum_scan_finish": 4,
        "stratum_scan_segments": 15, "stratum_scan_steps": 10, "stratum_conv_forward": 5, "stratum_conv_backward": 7,
        "stratum_few_rows": 7, "stratum_pack": 2, "stratum_line_sums": 3,
        "stratum_paged_step": 9, "stratum_paged_parts": 6, "stratum_capped_forward": 7, "stratum_capped_backward": 11,
        "stratum_norm_forward": 4, "stratum_norm_backward": 7,
        "stratum_activation_forward": 2, "stratum_activation_backward": 3,
        "stratum_loss_forward": 4, "stratum_loss_backward": 4,
    }  # fmt: skip
    for function, tensors in arguments.items():
        if hasattr(loaded, function):
            getattr(loaded, function).argtypes = [pointer] * (tensors + 1) + [number]
    for function in ("stratum_packed", "stratum_few_scratch"):
        if hasattr(loaded, function):
            getattr(loaded, function).argtypes, getattr(loaded, function).restype = [pointer], ctypes.c_int64
    loaded.stratum_lanes.restype = number
    return loaded


def call(function: Any, head: ctypes.Structure, *tensors: torch.Tensor | None) -> None:
    """Call a kernel with its leading struct and the tensors' pointers. Kernels assume contiguous tensors."""
    assert all(x is None or x.is_contiguous() for x in tensors)
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    if function(ctypes.byref(head), *pointers, torch.get_num_threads()):
        raise MemoryError("not enough memory for the kernel's scratch space")
