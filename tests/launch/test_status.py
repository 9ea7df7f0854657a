"""`stratum status` and `stratum logs`: the content of the folder is always shown, within seconds; dead runs are called dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import lease, queue, status
from launch.children import stratum
from launch.local.failures import SRUN_LOG, log_of
from launch.logs import logs_of, main
from launch.runs import RunFolder
from launch.slurm import cancel
from launch.slurm.after_job import NO_SUCCESSOR
from launch.status import Queue, describe

ROOT = Path(__file__).resolve().parents[2]
STEP = '{{"kind": "step", "step": {n}, "loss": 2.5, "tokens_per_s": 10, "time": {n}}}\n'


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that reached step 30 of 100 in Slurm job 7."""
    found = RunFolder(tmp_path / "a")
    attempt = found.logs / "slurm-7-0"
    attempt.mkdir(parents=True)
    (found.path / "recipe.yaml").write_text("run: {steps: 100}\n")
    (found.path / "metrics.jsonl").write_text("".join(STEP.format(n=n) for n in range(1, 31)))
    (found.path / "checkpoints" / "step_00000020").mkdir(parents=True)
    (found.logs / "jobs").write_text("6\n7\n")
    (found.logs / "slurm-7.log").write_text("again: its time limit was near\n")
    log_of(attempt, 0).write_text("step 29\nstep 30\n")
    log_of(attempt, 1).write_text("hello of rank 1\n")
    (attempt / SRUN_LOG).write_text("srun: error: n1: task 1: Killed\n")
    return found


def slurm(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Slurm's commands by one line of bash; each call appends a line to `calls`."""
    (folder / "bin").mkdir()
    for name in ("scontrol", "squeue"):
        (folder / "bin" / name).write_text(f"#!/bin/bash\necho {name} >> {folder}/calls\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")


def test_without_an_answer_of_slurm_the_folders_are_shown(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(tmp_path, "exec sleep 600", monkeypatch)
    monkeypatch.setattr(queue, "QUERY_LIMIT_S", 0.5)
    monkeypatch.setattr(queue._slurm, "__kwdefaults__", {"limit_s": 0.5})
    asked, begun = Queue(), time.monotonic()
    said = describe(run, asked) + describe(run, asked)
    assert time.monotonic() - begun < 5 and (tmp_path / "calls").read_text() == "scontrol\n", (
        "asked once, not once a run"
    )
    assert said.count("step 30 of 100") == 2 and said.count("newest checkpoint: step_00000020") == 2
    assert "whether it has a waiting job is unknown, because Slurm did not answer" in said
    assert "got no answer for 0.5 s" in asked.problem and "dead:" not in said


def test_every_question_to_slurm_ends_after_ten_seconds() -> None:
    assert queue.QUERY_LIMIT_S == 10.0 and queue._slurm.__kwdefaults__ == {"limit_s": 10.0}


def test_a_dead_run_is_shown_as_dead(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", monkeypatch)
    assert "dead: no process trains it, and it has no waiting or running job" in describe(run, Queue())
    program = (
        f"import time; from pathlib import Path; from launch.lease import take\n"
        f"take(Path({str(run.path / 'lease')!r}), what='a'); print(1, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline()
    said = describe(run, Queue())
    assert f"trained by process {owner.pid} on " in said and "dead:" not in said
    owner.kill()
    owner.communicate()
    said = describe(run, Queue())
    assert "dead: its trainer ended without releasing the run (killed, or its machine was lost)" in said
    (run.logs / NO_SUCCESSOR).write_text("sbatch: error: Access/permission denied\n")
    assert "could not be submitted from a compute node: sbatch: error: Access" in describe(run, Queue())
    lease.take(run.path / "lease", what="a").release()
    (run.path / "metrics.jsonl").write_text(STEP.format(n=100))
    assert "finished" in describe(run, Queue()) and "dead:" not in describe(run, Queue())


def test_status_watches_until_ctrl_c(run: RunFolder) -> None:
    command = stratum("status", str(run.path), "--json", "--watch", "1")
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [json.loads(child.stdout.readline()) for _ in range(2)]
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert child.returncode == 0 and [one["checkpoint"] for one in seen] == ["step_00000020"] * 2


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_table_of_runs_does_not_cut_a_date(run: RunFolder, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    owned = "trained by process 4711 on n1, started 2026-03-01 12:00:00"
    monkeypatch.setattr(status, "_state", lambda *_: owned)
    table = status._table([run], Queue())
    assert all(word in table for word in owned.split())
    monkeypatch.setattr(status, "_state", lambda *_: owned.replace(",", " (Slurm job 12),"))
    table = status._table([run], Queue())
    assert all(word in table for word in ["process", "4711", "on", "n1"]) and "Slurm" not in table


def test_cancel_of_a_run_without_slurm_says_how_to_end_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b" / "logs").mkdir(parents=True)
    assert cancel.main([str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "was not started by `stratum launch slurm`" in said and "nothing to cancel" in said and "squeue" not in said
    owner = SimpleNamespace(pid=4711, host="n1")
    monkeypatch.setattr(cancel, "current_owner", lambda *_args, **_words: (owner, "alive"))
    assert cancel.main([str(tmp_path / "b")]) == 2
    assert "process 4711 on n1: Ctrl-C there, or `kill -TERM 4711`, saves" in capsys.readouterr().err


def test_logs_shows_the_newest_lines_and_follows(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = run.logs / "slurm-7-0"
    assert main([str(run.path), "-n", "1"]) == 0
    said = capsys.readouterr().out
    assert "again: its time limit was near" in said and "task 1: Killed" in said and "step 30" in said
    assert "step 29" not in said and "rank 1" not in said
    assert logs_of(run, None)[-1] == log_of(attempt, 1)
    for words in (["nowhere"], [""], [str(run.path), "--ranks", "x"]):
        assert main(words) == 2
    capsys.readouterr()
    for ranks in ("99", "0,99", "1,99,0"):
        assert main([str(run.path), "--ranks", ranks]) == 2
        said = capsys.readouterr().err
        assert "has no log of rank 99" in said and "It has those of 0, 1." in said
    child = subprocess.Popen(stratum("logs", str(run.path), "--follow"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while "step 30" not in child.stdout.readline():
        pass
    time.sleep(0.3)
    with log_of(attempt, 0).open("a") as stream:
        stream.write("step 31\n")
    assert child.stdout.readline().startswith("==> ") and child.stdout.readline() == "step 31\n"
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert child.returncode == 0


def test_status_says_what_is_in_storage_and_why_a_copy_failed(run: RunFolder) -> None:
    assert "storage" not in describe(run, Queue())
    (run.path / "recipe.yaml").write_text("run: {steps: 100, storage: 's3://bucket/runs'}\n")
    assert "storage s3://bucket/runs: no copy in the last lines of the record" in describe(run, Queue())
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "storage_copy", "step": 10}\n')
        stream.write('{"kind": "storage_failed", "step": 20, "error": "Access Denied"}\n')
    assert "step 10 is copied; the last try failed: Access Denied" in describe(run, Queue())
