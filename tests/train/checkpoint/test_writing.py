"""A file that is verified while it is written: safetensors reads it, and writer or verifier may stop early in every way."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crashes import Act, acts_of_saves
from safetensors.torch import load_file

from data.system import disk
from recipes.schema.errors import CheckpointError
from train.checkpoint import files
from train.checkpoint.files import Piece, bytes_of
from train.checkpoint.writing import plan_file, write_verified


def pieces() -> list[Piece]:
    """A matrix's lower rows, a vector, a scalar, bytes: about 46 KB."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(90, 121, generator=g)
    return [
        Piece("a", (100, 121), (10, 0), (90, 121), matrix),
        Piece("b", (301,), (0,), (301,), torch.randn(301, generator=g).bfloat16()),
        Piece("c", (), (), (), torch.tensor(3.5, dtype=torch.float64)),
        Piece("d", (777,), (0,), (777,), torch.arange(777).to(torch.uint8)),
    ]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps of writing and reading that do not end with a piece."""
    monkeypatch.setattr(disk, "STEP", 1999)
    monkeypatch.setattr(files, "_CHUNK", 1000)


def write(path: Path, made: list[Piece], *, known: bool = False) -> list[tuple[int, int]]:
    plan = plan_file(made)
    live = [piece.sums() for piece in plan.pieces] if known else None
    verified = write_verified(path, plan, [bytes_of(piece.data) for piece in plan.pieces], live=live)
    assert verified.sums == [piece.sums() for piece in plan.pieces]
    return verified.sums


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("hint", [False, True])
def test_the_file_is_what_the_pieces_are(
    known: bool, hint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hint:  # a system without sync_file_range
        monkeypatch.setattr(disk, "_sync_file_range", lambda: None)
    made = pieces()
    write(tmp_path / "f", made, known=known)
    read = load_file(tmp_path / "f")
    assert len(read) == len(made)
    for piece in made:
        assert torch.equal(read[piece.label], piece.data), piece.label


def refuse(name: str, number: int) -> Callable[[Act], None]:
    """Operation `number` (from 0) of this name fails."""
    seen = iter(range(1000))

    def before(act: Act) -> None:
        if act.name == name and next(seen) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return before


@pytest.mark.parametrize(("name", "number"), [("writev", 0), ("writev", 1), ("writev", 20), ("fsync", 0)])
def test_what_the_system_refuses_ends_both_threads(name: str, number: int, tmp_path: Path) -> None:
    before = threading.active_count()
    with acts_of_saves(refuse(name, number)), pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "f", pieces())
    assert threading.active_count() == before


@pytest.mark.parametrize("label", ["a[10:100,0:121]", "b[0:301]", "c[]", "d[0:777]"])
def test_a_byte_that_changes_on_its_way_is_named(label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of each piece differs in the file."""
    made = pieces()
    plan = plan_file(made)
    at = next(start for piece, start in zip(plan.pieces, plan.starts, strict=True) if piece.label == label) + 5
    real = disk.write

    def write_wrong(handle: int, parts: list[memoryview]) -> int:
        begin = os.fstat(handle).st_size
        joined = bytearray(b"".join(parts))
        if begin <= at < begin + len(joined):
            joined[at - begin] ^= 1
        return real(handle, [memoryview(joined)])

    monkeypatch.setattr(disk, "write", write_wrong)
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "f", made)
    assert f"{label} on disk differs from the model" in str(caught.value)
