"""Binding of the compiled fingerprint in `fingerprint.c`. `train.checkpoint.fingerprint` is the definition."""

import ctypes
from pathlib import Path

from data.native import build_c


@build_c.Cached
def kernels() -> ctypes.CDLL | None:
    library = build_c.load_if_possible(Path(__file__).with_name("fingerprint.c"), what="fingerprints are")
    if library is None:
        return None
    pointer, number, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    numbers, sums, u64 = ctypes.POINTER(i64), ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint64
    library.stratum_fingerprint.restype = None
    library.stratum_fingerprint.argtypes = [
        pointer, number, number, numbers, numbers, numbers, pointer, u64, u64, sums,
    ]  # fmt: skip
    library.stratum_fingerprint_file.restype = number
    library.stratum_fingerprint_file.argtypes = [
        number, i64, pointer, i64, number, number, numbers, numbers, numbers, u64, u64, sums,
    ]  # fmt: skip
    return library
