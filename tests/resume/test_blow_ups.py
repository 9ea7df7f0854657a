"""NaN and infinity in whole runs: a separate exit status, no such state saved, no automatic restart."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import finish, fork

from recipes.schema.checkpoint_steps import steps_in
from recipes.schema.errors import NumericsError
from recipes.schema.run_folder import METRICS, read_metrics
from train.report.summary import write_report

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
    assert "error: step 1 is not saved:" in output and "contain NaN or infinity: model." in output
    assert "No earlier checkpoint without them" in output
    assert steps_in(tmp_path / "blown" / "checkpoints") == []


@pytest.mark.parametrize(("ranks", "every"), [(1, 1), (2, 10)])
def test_a_loss_that_is_not_finite_ends_the_run_though_gradients_are_finite(
    ranks: int, every: int, words: list[str], tmp_path: Path
) -> None:
    """Step 3 of rank 0; losses are read at the logging interval (1), or before the save after step 4 (10)."""

    @contextmanager
    def within() -> Iterator[None]:
        from train import loop

        real = loop.train_step

        def sick(*a: Any, step: int, **k: Any) -> Any:
            result = real(*a, step=step, **k)
            return replace(result, loss=result.loss * float("nan")) if step == 2 and not dist.get_rank() else result

        loop.train_step = sick
        yield

    extra = ("run.steps=8", "checkpoint.every_steps=2", f"telemetry.log_every_steps={every}")
    output = finish(fork(words, "lost", ranks=ranks, extra=extra, within=within), status=NumericsError.status)
    assert "step 3: the training loss is nan, though its gradients are finite" in output
    assert "step_00000002 is the newest finite checkpoint" in output
    folder = tmp_path / "lost"
    assert [path.name for path in steps_in(folder / "checkpoints")] == ["step_00000002"]
    steps = [line["step"] for line in read_metrics(folder / METRICS) if line["kind"] == "step"]
    assert steps == ([1, 2, 3] if every == 1 else [1, 2, 3, 4])


def test_an_evaluation_that_is_not_finite_is_an_error_and_the_report_can_be_made(
    words: list[str], tmp_path: Path
) -> None:
    """The weights are finite and saved; the evaluation is not finite."""

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
