"""Deals the rows and texts of an evaluation to the data-parallel ranks, and puts the model into evaluation mode.

Rows are dealt round-robin. If the pipeline needs microbatches of a fixed shape and number, each rank's last ones are filled
with rows that do not count. Otherwise whole microbatches are dealt: each consists of the same rows at any number of
ranks, so that no score depends on it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from recipes.schema.errors import StratumError
from train.parallel.mesh import Mesh


def deal(count: int, mesh: Mesh, *, microbatch_rows: int, is_padded: bool = True) -> list[list[tuple[int, bool]]]:
    """This rank's microbatches of rows 0 to count - 1: the number of each row, and whether it counts (a filler is row 0).

    is_padded: every microbatch has `microbatch_rows` rows, and every rank has the same number of them.
    """
    layout = mesh.layout
    if not is_padded:
        starts = range(0, count, microbatch_rows)[mesh.data_rank :: layout.data]
        return [[(row, True) for row in range(start, min(start + microbatch_rows, count))] for start in starts]
    # Megatron's interleaved schedule needs a multiple of the number of pipeline stages as its number of microbatches.
    together = microbatch_rows * (layout.pipeline if layout.virtual > 1 else 1)
    per_rank = math.ceil(count / (layout.data * together)) * together
    numbers = [place * layout.data + mesh.data_rank for place in range(per_rank)]
    rows = [(number if number < count else 0, number < count) for number in numbers]
    return [rows[start : start + microbatch_rows] for start in range(0, len(rows), microbatch_rows)]


def in_parts[T](mesh: Mesh, count: int, work: Callable[[range], Sequence[T]]) -> list[T]:
    """The results of 0 ... count in order, on every rank: each data-parallel rank works on its part.

    work: numbers -> a result each; it may be collective over the tensor group, whose ranks get the same numbers. For layouts
    without pipeline and context ranks. A StratumError of one rank is raised on all. Collective over the world.
    """
    layout = mesh.layout
    assert layout.pipeline == layout.context == 1, "each data-parallel rank works by itself"
    found: Sequence[T] | StratumError
    try:
        found = work(range(mesh.data_rank, count, layout.data))
    except StratumError as error:
        if layout.world == 1:
            raise
        found = error
    results: list[Any] = [None] * count
    is_first = mesh.groups.tp.rank() == 0  # tensor ranks have equal results
    for rank, part in mesh.gather_objects((mesh.data_rank, found if is_first else [])):
        if isinstance(part, StratumError):
            raise part
        if part:
            results[rank :: layout.data] = part
    return results


def on_all_ranks[T](mesh: Mesh, work: Callable[[], T]) -> T:
    """This rank's result of `work`, which is not collective. A StratumError of one rank is raised on all, so that none waits for
    it. Collective over the world."""
    problem: StratumError | None = None
    try:
        found = work()
    except StratumError as error:
        problem = error
    for one in mesh.gather_objects(problem):
        if one is not None:
            raise one
    return found


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
