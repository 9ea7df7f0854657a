"""What a run's stream of microbatches needs to continue, in addition to its position: tensors `stream.NAME` of a checkpoint.

A stream of prepared rows needs nothing. One that draws answers saves those that are left. Rank 0 saves; every rank reads all.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint
from train.checkpoint.files import Piece, Reader, whole_tensor

STREAM = "stream."


def stream_pieces(state: Mapping[str, torch.Tensor], *, rank: int) -> list[Piece]:
    """The state that this rank saves: tensors of one dimension, at least one element each."""
    if rank != 0:
        return []
    return [Piece(f"{STREAM}{name}", tuple(x.shape), (0,), tuple(x.shape), x.contiguous()) for name, x in state.items()]


def read_stream_state(folder: Path) -> dict[str, torch.Tensor]:
    """The state in a checkpoint by name, with checked fingerprints; empty if the checkpoint has none. Not collective.

    Raises CheckpointError for a damaged one.
    """
    reader = Reader(folder)
    found = {}
    for name, record in reader.manifest.tensors.items():
        if not name.startswith(STREAM):
            continue
        if len(record.shape) != 1:
            raise CheckpointError(f"{folder} is damaged: {name} has {len(record.shape)} dimensions, not one.")
        tensor = whole_tensor(reader, name)
        sums = fingerprint.of_box(tensor, whole=record.shape, offset=(0,), shape=record.shape)
        if fingerprint.text(sums) != record.fingerprint:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was saved (its fingerprint differs).")
        found[name.removeprefix(STREAM)] = tensor
    return found
