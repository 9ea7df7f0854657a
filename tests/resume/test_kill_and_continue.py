"""Real processes, real signals: a run that is killed or interrupted and started again ends as if nothing had happened."""

import signal
from pathlib import Path

from processes import STEPS, finish, fork, losses, saves, wait_for_step
from texts import VOCAB

from recipes.schema.run_folder import METRICS, read_metrics


def test_killed_and_interrupted_runs_end_as_the_undisturbed_one(words: list[str], tmp_path: Path) -> None:
    finish(fork(words, "whole"))
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, STEPS + 1))

    child = fork(words, "killed", step_s=0.02)
    wait_for_step(tmp_path / "killed", 8, child, saved=True)
    child.send_signal(signal.SIGKILL)
    child.communicate()

    child = fork(words, "killed", step_s=0.02)
    wait_for_step(tmp_path / "killed", 14, child)
    child.send_signal(signal.SIGINT)  # Ctrl-C: save at the step's end, say how to go on
    output = finish(child, status=128 + signal.SIGINT)
    assert "The same command continues from there" in output

    finish(fork(words, "killed"))
    assert losses(tmp_path / "killed") == whole
    lines = read_metrics(tmp_path / "killed" / METRICS)
    resumed = [line["step"] for line in lines if line["kind"] == "resume"]
    assert len(resumed) == 2 and set(resumed) <= set(saves(tmp_path / "killed")), resumed
    final = [line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"][-1]
    undisturbed = [line for line in read_metrics(tmp_path / "whole" / METRICS) if line["kind"] == "evaluation"]
    assert final == undisturbed[-1]["bits_per_byte"]

    too_small = finish(fork(words, "other", extra=("model.vocab=256",)), status=2)
    assert (
        f"has a vocabulary of {VOCAB} (token ids up to {VOCAB - 1}), but model.vocab=256. Set model.vocab={VOCAB}"
        in too_small
    )
    assert not (tmp_path / "other").exists()

    refused = finish(fork(words, "killed", extra=("optim.lr=1",)), status=2)
    assert "optim.lr: 0.003 in the run's folder, 1.0 now" in refused


def test_a_second_trainer_of_a_run_is_refused_and_the_first_does_not_notice(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "shared"
    long = ("run.steps=100000",)
    first = fork(words, "shared", step_s=0.05, extra=long)
    wait_for_step(run, 4, first)
    for ranks in (1, 2):
        refused = finish(fork(words, "shared", ranks=ranks, extra=long), status=2)
        assert f"belongs to process {first.pids[0]} on " in refused and "choose another run.name" in refused
    first.send_signal(signal.SIGTERM)
    finish(first, status=128 + signal.SIGTERM)
    steps = [line["step"] for line in read_metrics(run / METRICS) if line["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "one writer"
    (lease,) = (run / "lease").glob("*.json")
    assert '"is_released": true' in lease.read_text()
