"""Copies pieces of the live state to host memory, and fingerprints them in the same pass. Saves and copies in memory use it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from train.checkpoint.files import Piece
from train.checkpoint.fingerprint import Sums


class Staging:
    """Host memory that a save copies to. It is reused, so that its pages are already mapped at the next save."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def of_size(self, size: int, device: torch.device) -> torch.Tensor:
        """A buffer of `size` bytes, page-locked if the source is a GPU."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old buffer before the larger one is allocated
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return self._buffer[:size]


class Source:
    """The device whose state is copied, as it is when this object is made: at a step boundary, in the training thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ready = torch.cuda.current_stream().record_event() if device.type == "cuda" else None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """In another thread: work in the block sees that state, and is finished after it. On a GPU it has a separate stream. Not
        tested there: needs a GPU."""
        if self._ready is None:
            yield
            return
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream()
        stream.wait_event(self._ready)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def copy_pieces(pieces: Sequence[Piece], buffer: torch.Tensor) -> list[Sums]:
    """Copy the bytes of all pieces to a buffer of host memory, one after the other. -> the fingerprint of each.

    Call it within `Source.stream`.
    """
    sums, at = [], 0
    for piece in pieces:
        if piece.data.device.type == "cpu":
            sums.append(piece.sums(copy_to=buffer.data_ptr() + at))
        else:
            sums.append(piece.sums())
            buffer[at : at + piece.bytes].copy_(piece.data.reshape(-1).view(torch.uint8), non_blocking=True)
        at += piece.bytes
    return sums
