"""How many threads a training process uses: run.threads, else OMP_NUM_THREADS, else its share of the cores."""

import os

import pytest
import torch
from ranks import run_ranks

from train.run import _set_threads


def threads_of(rank: int, configured: int, variables: dict[str, str]) -> int:
    os.environ |= variables
    torch.set_num_threads(1)  # as in a rank forked from the warm process, which imports torch with OMP_NUM_THREADS=1
    _set_threads(configured)
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("configured", "variables", "expected"),
    [
        (0, {"OMP_NUM_THREADS": "3"}, 3),  # it was overridden by the machine's cores
        (2, {"OMP_NUM_THREADS": "3"}, 2),
        (0, {"OMP_NUM_THREADS": "3,2"}, 3),  # one number for each level of nested parallel regions
        (0, {"OMP_NUM_THREADS": ""}, len(os.sched_getaffinity(0))),
        (0, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, len(os.sched_getaffinity(0))),
        (0, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 3),
    ],
)
def test_the_variable_of_a_user_counts_unless_the_recipe_says_a_number(
    configured: int, variables: dict[str, str], expected: int
) -> None:
    assert run_ranks(1, threads_of, configured, variables) == [expected]
