"""A rank of a real `stratum launch local` run that computes wrong numbers: named, and the run ended or the step repeated."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import finish, fork, losses, start

from data.system.node import node_name
from recipes.schema.errors import CorruptionError
from recipes.schema.run_folder import METRICS, SUSPECTS, read_metrics

GUILTY = 1
PLANTED = 3
"""The step, counted from 1, in which the fault begins."""
TESTS = Path(__file__).resolve().parents[1]
EXTRA = (
    "run.steps=6", "run.integrity.enabled=true", "run.integrity.compare_every_steps=1", "run.integrity.replay_fraction=1",
    "launch.restarts=2", "launch.backoff_s=0.1", "checkpoint.every_steps=1",
)  # fmt: skip


def faulty_python(folder: Path, *, at: tuple[int, ...] | None) -> dict[str, str]:
    """Environment in which rank GUILTY flips bits in the output of a layer from step PLANTED on. at: which of the layer's passes,
    from 0, which is that of the step itself after its replays; None: each."""
    (folder / "sitecustomize.py").write_text(f"""
import os, runpy

def damaged(*arguments, run=runpy.run_module, **named):
    if arguments == ("train",) and os.environ["RANK"] == "{GUILTY}":
        import train.loop
        from corruption import ActivationFault
        real, faults = train.loop.train_step, []
        def train_step(engine, *arguments, step, **named):
            if step == {PLANTED - 1} and not faults:
                faults.append(ActivationFault(engine.chunks[0].module.decoder.layers[1], at={at}))
            return real(engine, *arguments, step=step, **named)
        train.loop.train_step = train_step
    return run(*arguments, **named)

runpy.run_module = damaged
""")
    return {"PYTHONPATH": f"{folder}:{TESTS.parent}:{TESTS}"}


def suspects(run: Path) -> list[tuple[int, str, list[int], list[str]]]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / SUSPECTS).read_text().splitlines()]
    return [(one["step"], one["kind"], one["ranks"], one["hosts"]) for one in lines]


@pytest.mark.slow
def test_a_rank_that_keeps_computing_wrong_numbers_is_named_and_the_run_is_not_restarted(
    words: list[str], tmp_path: Path
) -> None:
    environment = faulty_python(tmp_path, at=None)
    child = start(words, "run", ranks=2, extra=EXTRA, launcher="local", environment=environment)
    output = finish(child, status=CorruptionError.status)
    run = tmp_path / "run"
    assert f"rank {GUILTY} on {node_name()}" in output and "leave it out" in output
    assert suspects(run) == [(PLANTED, "persistent", [GUILTY], [node_name()])]
    assert max(losses(run)) == PLANTED - 1, "no update was made from the wrong gradient"
    assert len(list((run / "logs").glob("local-*"))) == 1, "no restart"


@pytest.mark.slow
def test_a_run_repeats_a_step_with_one_wrong_number_and_ends_with_the_losses_of_a_run_without_it(
    words: list[str], tmp_path: Path
) -> None:
    environment = faulty_python(tmp_path, at=(0,))
    child = start(words, "run", ranks=2, extra=EXTRA, launcher="local", environment=environment)
    output = finish(child)
    finish(fork(words, "undisturbed", ranks=2, extra=EXTRA))
    run = tmp_path / "run"
    assert suspects(run) == [(PLANTED, "transient", [GUILTY], [node_name()])]
    assert "The step is repeated." in output
    assert losses(run) == losses(tmp_path / "undisturbed") and max(losses(run)) == 6
    warned = [line for line in read_metrics(run / METRICS) if line["kind"] == "corruption"]
    assert [(line["step"], line["fault"], line["ranks"]) for line in warned] == [(PLANTED, "transient", [GUILTY])]
    assert len(list((run / "logs").glob("local-*"))) == 1, "no restart"
