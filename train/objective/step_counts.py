"""What an objective counts in the rows of a whole step, such as learned labels or pairs of answers.

Microbatches and ranks differ in how many they have. Each must count by its number, so a loss is the sum over a microbatch divided
by the mean number of the step's microbatches, all ranks together. Megatron then averages over microbatches and ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from train.parallel.mesh import Mesh

Counter = Callable[[Any], tuple[int, ...]]
"""What is counted in the rows of one `data.batch.Batch`; empty: nothing. First the number that the loss is divided by."""


def count_step(
    mesh: Mesh, microbatches: list[Any], counter: Counter
) -> tuple[list[Any], Callable[[], tuple[int, ...]] | None]:
    """Begin to sum the counts of a step. -> (microbatches with `per_microbatch`, the step's sums); None if nothing is counted.

    Collective over the world; nothing waits until the first loss of the step.
    """
    counts = [counter(batch) for batch in microbatches]
    if not counts or not counts[0]:
        return microbatches, None
    sums = mesh.begin_sum_over_rows(*(sum(numbers) for numbers in zip(*counts, strict=True)))
    in_step = len(microbatches) * mesh.layout.data

    def means() -> tuple[float, ...]:
        return tuple(max(1, total) / in_step for total in sums())

    return [replace(batch, per_microbatch=means) for batch in microbatches], sums
