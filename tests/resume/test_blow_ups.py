"""NaN and infinity in whole runs: their own exit status, nothing of them saved, never started again by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import finish, fork

from recipes.schema.checkpoint_steps import steps_in
from recipes.schema.errors import NumericsError
from recipes.schema.run_folder import METRICS, read_metrics
from train.record.report import write_report

BLOWN = (
    "run.steps=1",
    "optim.lr=1e39",
    "optim.clip_norm=0",
    "schedule.warmup=0",
    "schedule.decay=0",
    "checkpoint.every_steps=1",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_last_update_that_blows_up_is_not_published(ranks: int, words: list[str], tmp_path: Path) -> None:
    output = finish(fork(words, "blown", ranks=ranks, extra=BLOWN), status=NumericsError.status)
    assert "error: step 1 is not saved:" in output and "hold NaN or infinity: model." in output
    assert "No earlier checkpoint without them" in output
    assert steps_in(tmp_path / "blown" / "checkpoints") == []


def test_an_evaluation_that_is_not_finite_is_an_error_and_the_report_can_be_made(
    words: list[str], tmp_path: Path
) -> None:
    """The weights are finite, and saved; what they give is not."""

    @contextmanager
    def within() -> Iterator[None]:
        from train import run

        real = run.heldout_bits_per_byte
        scores = iter((1.0, float("nan")))  # before the first step, after the last
        run.heldout_bits_per_byte = lambda *a, **k: dict.fromkeys(real(*a, **k), next(scores))
        yield

    child = fork(words, "sick", extra=("run.steps=1", "schedule.warmup=0", "schedule.decay=0"), within=within)
    output = finish(child, status=NumericsError.status)
    assert "step 1: held-out bits per byte are not finite for 2 of 2 sources (" in output
    assert "step_00000001 is the newest finite checkpoint" in output and "Finished" not in output
    folder = tmp_path / "sick"
    scores = [line["bits_per_byte"] for line in read_metrics(folder / METRICS) if line["kind"] == "evaluation"]
    assert scores and all(score != score for score in scores[-1].values())
    write_report(folder)
