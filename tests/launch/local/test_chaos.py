"""A run under random faults ends bit for bit like an undisturbed one, with all of its time booked (tests/bench/chaos.py)."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
from local_runs import ENVIRONMENT, ROOT

from tests.bench.chaos import KINDS, plan


def test_faults_are_a_function_of_the_seed() -> None:
    plans = [plan(seed, faults=14, ranks=2) for seed in range(200)]
    assert plans[3] == plan(3, faults=14, ranks=2)
    assert all(before != after for before, after in pairwise(plans))
    assert all(sorted(fault.kind for fault in one) == sorted(KINDS * 2) for one in plans), "every kind equally often"
    gaps = [fault.at_s for one in plans for fault in one]
    assert 2.7 < sum(gaps) / len(gaps) < 3.3, "mean_s=3 within five standard errors of 2,800 draws"


@pytest.mark.slow
def test_a_run_under_random_faults_ends_like_an_undisturbed_one() -> None:
    words = "-m tests.bench.chaos --seed 5 --faults 5 --steps 200 --mean-s 1.5 --kinds kill,hang,slow,corrupt,full"
    done = subprocess.run(
        [sys.executable, *words.split()],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["faults"]) == 5
