"""The compiled form of packing and reading rows: `rows.c`, built once for this machine with its C compiler, or not used.

Without a compiler `data.rows.packing` and `data.rows.reader` do the same work in numpy, several times slower; the rows are the
same. STRATUM_NATIVE=0 turns the compiled form off.
"""

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.native import build_c

LONGEST_ROW = (1 << 24) - 1
"""Tokens of the longest row that is packed by compiled code."""


class ShardRecord(ctypes.Structure):
    """Mirror of `Shard` in rows.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("fd", "size", "mtime_ns", "may_vanish")),
        *((name, ctypes.c_int64) for name in ("first_byte", "shift", "is_signed", "documents")),
        ("starts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("index_fd", "index_size", "index_mtime_ns", "index_at")),
    ]


class Stretch(NamedTuple):
    """Rows that are packed together."""

    shard: int
    """Address of the record of their entry."""
    low: int
    """Token of the entry they begin at."""
    rows: int
    guess: int
    """Documents they may hold."""


@build_c.Cached
def library() -> ctypes.CDLL | None:
    """The compiled code, built if need be; None if that is not possible here (logged once, at info level)."""
    source = Path(__file__).with_name("rows.c")
    loaded = build_c.load_if_possible(source, what="the reading of rows is", instead="numpy")
    if loaded is None:
        return None
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    loaded.stratum_pack.restype = loaded.stratum_read.restype = i64
    loaded.stratum_pack.argtypes = [pointer, i64, i64, pointer, i64]
    loaded.stratum_read.argtypes = [pointer, i64, i64, i64, pointer, pointer, i64, pointer, pointer]
    return loaded


def address_of(numbers: np.ndarray) -> int:
    """Address of an array that is not empty; in a third of the time that `numbers.ctypes.data` takes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(numbers))  # type: ignore[arg-type]


def pack(stretches: Sequence[Stretch], *, row_tokens: int) -> list[np.ndarray | None]:
    """Stretches of rows, packed as `data.rows.packing.Packed` says; None for those that the plain form must do."""
    native = library()
    if native is None or row_tokens > LONGEST_ROW or not stretches:
        return [None] * len(stretches)
    numbers = array("q")
    for stretch in stretches:
        numbers.extend((stretch.shard, stretch.low, stretch.rows, 0, 0))
    room = sum(2 * stretch.guess + 512 for stretch in stretches)
    while True:
        out = np.empty(room, dtype=np.int32)
        wanted = native.stratum_pack(numbers.buffer_info()[0], len(stretches), row_tokens, address_of(out), room)
        if not wanted:
            break
        room = wanted
    found = list(zip(numbers[3::5], numbers[4::5], strict=True))
    out = out[: sum(size for _, size in found)].copy()  # one piece of memory: those packed together go together
    return [out[at : at + size] if size else None for at, size in found]


class Plan:
    """Rows that one call is to read."""

    def __init__(self) -> None:
        self.numbers = array("q")
        """Six a row, `Row` in rows.c: address of the shard's record; token of its entry that is the row's first label, or its
        stretch's; address of the packed stretch, or 0; rows of the stretch, and which it is; row of the batch."""
        self.shards: list[Any] = []
        """The open shard of each row."""
        self.keep: list[Any] = []
        """What else must live until the rows are read."""
        self._current = ctypes.c_int64(0)

    def __str__(self) -> str:
        """What is waited for, when someone asks while it is read."""
        return self.shards[self._current.value].reading

    def read(
        self, *, vocab_size: int, tokens: np.ndarray, labels: np.ndarray | None, documents: np.ndarray | None
    ) -> bool:
        """Read them, without the GIL. False where anything is wrong: read again by the plain form, which says what.

        tokens, labels: [rows, row_tokens] int64 each, or without labels [rows, row_tokens + 1], labels one further.
        documents: [rows, row_tokens] int32 or None.
        """
        native = library()
        assert native is not None
        stride = tokens.shape[1]
        return not native.stratum_read(
            self.numbers.buffer_info()[0],
            len(self.shards),
            stride - (labels is None),
            vocab_size,
            address_of(tokens),
            None if labels is None else address_of(labels),
            stride,
            None if documents is None else address_of(documents),
            ctypes.addressof(self._current),
        )
