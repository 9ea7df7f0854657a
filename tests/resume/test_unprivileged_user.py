"""The matrices of kills, faults and signals again, as a user without root privileges: each in one process."""

import pytest
from unprivileged import run_unprivileged

KILLS = "tests/train/checkpoint/test_crash_matrix.py"


def test_signals_and_a_few_kills_without_root_privileges() -> None:
    status, output = run_unprivileged(
        "tests/resume/test_signals.py", KILLS, "-k", "answered_at_the_end or of_the_only_one"
    )
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        KILLS,
        "tests/train/checkpoint/test_fault_matrix.py",
        "tests/resume/test_many_kills.py",
        "tests/resume/test_signals.py",
    ],
)
def test_a_matrix_without_root_privileges(file: str) -> None:
    status, output = run_unprivileged(file)
    assert status == 0, output
