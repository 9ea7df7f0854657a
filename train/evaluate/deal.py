"""Deals the rows of an evaluation to the data-parallel ranks, and puts the model into evaluation mode.

Rows are dealt round-robin. If the pipeline needs microbatches of a fixed shape and number, each rank's last ones are filled
with rows that do not count.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from train.parallel.mesh import Mesh


def deal(count: int, mesh: Mesh, *, microbatch_rows: int, is_padded: bool = True) -> list[list[tuple[int, bool]]]:
    """This rank's microbatches of rows 0 to count - 1: the number of each row, and whether it counts (a filler is row 0).

    is_padded: every microbatch has `microbatch_rows` rows, and every rank has the same number of them.
    """
    layout = mesh.layout
    # Megatron's interleaved schedule needs a multiple of the number of pipeline stages as its number of microbatches.
    together = microbatch_rows * (layout.pipeline if layout.virtual > 1 else 1)
    per_rank = math.ceil(count / (layout.data * together)) * together
    numbers = [place * layout.data + mesh.data_rank for place in range(per_rank)]
    rows = [(number if number < count else 0, number < count) for number in numbers]
    if not is_padded:
        rows = [row for row in rows if row[1]]
    return [rows[start : start + microbatch_rows] for start in range(0, len(rows), microbatch_rows)]


@contextmanager
def evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """Within the block, the parts of the model on this rank are in evaluation mode, without gradients."""
    were_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, was_training in zip(chunks, were_training, strict=True):
            chunk.train(was_training)
