"""Whole runs with a spike: skipped or undone, equal bit for bit to a run that never saw it, also across a stop."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_runs import contents_at
from processes import finish, fork, losses

from data import commands
from data.dataset import open_dataset
from data.order.left_out import LeftOut
from launch.runs import RunFolder
from launch.status import Queue, describe
from recipes.schema.checkpoint_steps import ledger_in, name_of, read_manifest
from recipes.schema.data import DataConfig
from recipes.schema.errors import NumericsError
from recipes.schema.read import recipe_from_mapping
from recipes.schema.run_folder import METRICS, read_metrics, recipe_in
from train import step
from train.build import open_data
from train.replay.execute import execute, one_process

POISONED = 30
"""A row of the full order, in step 8 of 4 rows each."""


def poisoned_row(config: DataConfig, *, stops: bool = False) -> Callable[[], AbstractContextManager[None]]:
    """Losses of a microbatch with this row are NaN, wherever it is read. A run without it is not affected. stops: SIGTERM
    arrives in that step."""

    @contextmanager
    def within() -> Iterator[None]:
        from train import step

        poison = open_dataset(config).training_rows([POISONED]).tokens[0]
        real = step.run_schedule

        def sick(engine: Any, microbatches: Any, **k: Any) -> Any:
            reports = real(engine, microbatches, **k)
            hit = any((batch.tokens == poison).all(1).any() for batch in microbatches)
            if hit and stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return [report * float("nan") for report in reports] if hit else reports

        step.run_schedule = sick
        yield

    return within


@pytest.mark.slow
def test_a_stop_signal_that_arrives_with_a_spike_is_not_lost(
    words: list[str], prepared: DataConfig, tmp_path: Path
) -> None:
    extra = ("run.steps=12", "run.spikes.policy=rollback")
    child = fork(words, "run", extra=extra, within=poisoned_row(prepared, stops=True))
    output = finish(child, status=128 + signal.SIGTERM)
    assert "step 8 is undone" in output
    assert max(line["step"] for line in events(tmp_path / "run", "step")) == 7, "no step after the signal"


@contextmanager
def without_rows() -> Iterator[None]:
    """A run whose data never had the rows of step 8."""
    from train import run

    real = run.open_material
    run.open_material = lambda recipe: real(recipe).without(LeftOut(((28, 32),)))
    run.left_out = lambda ranges: LeftOut(((28, 32),))
    yield


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / METRICS) if line["kind"] == kind]


def test_a_run_undoes_a_spike_names_its_documents_and_equals_a_run_without_those_rows(
    words: list[str], prepared: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = poisoned_row(prepared)
    extra = (
        "run.steps=12",
        "run.spikes.policy=rollback",
    )
    finish(fork(words, "clean", ranks=2, extra=("run.steps=12",), within=without_rows))
    output = finish(fork(words, "run", ranks=2, extra=extra, within=poison))
    run, last = tmp_path / "run", name_of(12)
    assert contents_at(run / "checkpoints" / last) == contents_at(tmp_path / "clean" / "checkpoints" / last)
    assert losses(run) == losses(tmp_path / "clean")
    assert "step 8 is undone: its loss is nan. The run goes back to step 6 and leaves 4 rows out" in output
    (event,) = events(run, "rollback")
    assert event["to_step"] == 6 and event["left_out"] == [[28, 32]]
    rows = {document["position"] for document in event["documents"]}
    assert rows == {28, 29, 30, 31} and all(document["text"] for document in event["documents"])
    assert {document["source"] for document in event["documents"]} <= {"verse", "code"}
    ledger = ledger_in(run)
    assert ledger.left_out == ((28, 32),) and ledger.rollbacks == 1
    assert "0 steps skipped, 1 rollbacks" in describe(RunFolder(run), Queue())
    # `trace` honours the ledger: the row at step 8 is now the one that was first in step 9.
    dataset = open_dataset(prepared)
    assert commands.trace([str(run), "--step", "8", "--json", "--rows", "1", "--chars", "0"]) == 0
    shown = json.loads(capsys.readouterr().out)
    row = dataset.locate(32)
    assert (shown["source"], shown["row"]) == (dataset.source_names[row.source], row.row)


@pytest.mark.slow
def test_a_stop_after_a_rollback_keeps_the_ledger_and_budgets_end_a_run_aloud(
    words: list[str], prepared: DataConfig, tmp_path: Path
) -> None:
    poison = poisoned_row(prepared)
    extra = (
        "run.steps=12",
        "run.spikes.policy=rollback",
    )
    finish(fork(words, "whole", extra=extra, within=poison))
    finish(fork(words, "run", extra=(*extra, "run.stop_after_steps=10"), within=poison))
    assert read_manifest(tmp_path / "run" / "checkpoints" / name_of(10)).step == 10, (
        "10 steps after the start, not after the rollback"
    )
    finish(fork(words, "run", extra=extra, within=poison))
    last = name_of(12)
    assert contents_at(tmp_path / "run" / "checkpoints" / last) == contents_at(
        tmp_path / "whole" / "checkpoints" / last
    )
    assert read_manifest(tmp_path / "run" / "checkpoints" / last).ledger.left_out == ((28, 32),)

    child = fork(words, "none", extra=(*extra, "run.spikes.most_rollbacks=0"), within=poison)
    output = finish(child, status=NumericsError.status)
    assert "step 8: its loss is nan. The run has gone back 0 times (run.spikes.most_rollbacks=0)" in output


@pytest.mark.slow
def test_a_skipped_step_is_counted_and_a_resumed_run_ends_with_the_same_bits(
    words: list[str], prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = poisoned_row(prepared)
    extra = ("run.steps=12", "run.spikes.policy=skip", "run.spikes.window_steps=8")
    output = finish(fork(words, "whole", extra=extra, within=poison))
    assert "step 8 is skipped: its loss is nan. Its documents: " in output
    finish(fork(words, "run", extra=(*extra, "run.stop_after_steps=9"), within=poison))
    finish(fork(words, "run", extra=extra, within=poison))
    last = name_of(12)
    whole = read_manifest(tmp_path / "whole" / "checkpoints" / last)
    assert whole.ledger.skipped_steps == (8,) and whole.updates == 11 and len(whole.ledger.losses) == 8
    assert read_manifest(tmp_path / "run" / "checkpoints" / last).ledger == whole.ledger
    assert contents_at(tmp_path / "run" / "checkpoints" / last) == contents_at(
        tmp_path / "whole" / "checkpoints" / last
    )
    assert replace(whole.ledger, losses=(), grad_norms=()).describe() == "1 step skipped"
    lines = {line["step"]: line for line in events(tmp_path / "run", "step")}
    assert lines[8]["skipped"] and lines[12]["skipped_steps"] == 1 and "skipped" not in lines[9]
    # `stratum replay` skips it too: step 10 from the checkpoint of step 6 has the loss that the run recorded.
    monkeypatch.setattr(step, "run_schedule", step.run_schedule)  # restored after the test
    single = one_process(recipe_from_mapping(recipe_in(tmp_path / "run")))
    with poison():
        again = execute(single, open_data(single), run=tmp_path / "run", step=10)
    assert again.loss == pytest.approx(lines[10]["loss"], rel=1e-6)
