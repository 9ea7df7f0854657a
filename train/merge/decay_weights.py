"""Weights with which an average of checkpoints of a stable learning rate emulates a decay of the learning rate.

With updates u_i of a run at a constant learning rate, checkpoint j is theta_j = theta_0 + u_1 + ... + u_j. A weighted average

    sum_j c_j theta_j = theta_0 + sum_i (c_i + ... + c_n) u_i          (sum_j c_j = 1)

scales update i by d_i = c_i + ... + c_n. So the factors d_1 >= ... >= d_n of a decay need the weights

    c_0 = 1 - d_1,    c_i = d_i - d_(i+1),    c_n = d_n

(the idea: WSM, arXiv 2507.17634). This equals the decayed run exactly if its updates would be the same, apart from the
learning rate. Between two checkpoints all updates share one factor: the mean of the decay's factors over these steps.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from recipes.schema.optim import ScheduleConfig
from recipes.schema.schedule import learning_rate_factor

Shape = Literal["linear", "cosine", "minus_sqrt"]


def decay_weights(steps: Sequence[int], *, shape: Shape, final_fraction: float = 0.0) -> list[float]:
    """Weights of the checkpoints after `steps`, which sum to 1.

    steps: ascending, at least two; the decay starts after the first and reaches `final_fraction` at the last.
    """
    assert len(steps) > 1 and all(a < b for a, b in pairwise(steps)), steps
    length = steps[-1] - steps[0]
    schedule = ScheduleConfig(kind="wsd", decay=length, decay_shape=shape, final_fraction=final_fraction)

    def factor(update: int) -> float:
        return learning_rate_factor(schedule, step=update, tokens=0, total_steps=length, tokens_per_step=1)

    factors = [
        sum(factor(update - steps[0]) for update in range(start, end)) / (end - start) for start, end in pairwise(steps)
    ]
    return [1 - factors[0], *(a - b for a, b in pairwise(factors)), factors[-1]]
