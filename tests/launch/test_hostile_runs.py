"""Run folders from strangers: `status`, `logs`, `cancel` and `launch local` do not hang, do not end in a traceback, and pass no
escape codes to the terminal."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from launch import logs, status
from launch.lease import LeaseError, Owner, current_owner
from launch.local.command import main as launch_local
from launch.local.failures import RankFailure, read_failures, read_stop
from launch.queue import read_job
from launch.runs import RunFolder
from launch.slurm import cancel

ESCAPE = "\x1b]0;evil\x07\x1b[31mred\x1b[0m\u202e"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
OWNER = asdict(Owner(host="n1", pid=1, process_started=1, machine="m", started=1.0))
KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00run: \x80\n"),
    "bomb": lambda path: path.write_text(BOMB),
    "wrong types": lambda path: path.write_text('{"kind": "step", "step": "x", "loss": null, "time": [], "pid": "x"}\n'),
    "huge numbers": lambda path: path.write_text(
        '{"kind": "step", "step": 1' + "0" * 400 + ', "loss": 1' + "0" * 400 + ', "tokens_per_s": 1, "time": 1e308}\n'
        '{"kind": "step", "step": 2, "loss": "NaN", "tokens_per_s": "Infinity", "time": "Infinity"}\n'
    ),
    "escape codes": lambda path: path.write_text(ESCAPE + "\n"),
}  # fmt: skip
FILES = (
    "recipe.yaml", "metrics.jsonl", "checkpoints", "checkpoints/latest", "lease", "lease/00000003.json", "logs", "logs/jobs",
    "logs/slurm-7.log", "logs/no-successor", "logs/slurm-7-0", "logs/slurm-7-0/rank-00000.log", "logs/slurm-7-0/rank-x.log",
    "logs/slurm-7-0/failure-00000.json", "logs/slurm-7-0/srun.log", "logs/slurm-7-0/stopped-x",
)  # fmt: skip


def whole_run(folder: Path) -> RunFolder:
    attempt = folder / "logs" / "slurm-7-0"
    attempt.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("run: {steps: 100}\n")
    (folder / "checkpoints").mkdir()
    (attempt / "rank-00000.log").write_text("step 1\n")
    return RunFolder(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_a_run_folder_hangs_or_breaks_status_and_logs(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(FILES):
        run = whole_run(tmp_path / "runs" / f"r{number}").path
        path = run / name
        if path.is_dir():
            path.rename(run / "aside")
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        KINDS[kind](path)
        for command in (status.main, logs.main):
            assert command([str(run)]) in (0, 1, 2)
        assert status.main([str(run), "--json"]) in (0, 2)
        assert read_stop(RunFolder(run).logs / "slurm-7-0") is None
    assert status.main([]) == 0, "one bad run does not hide the others in the table"
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said and "\u202e" not in said and "Traceback" not in said


def test_escape_codes_and_markup_in_names_logs_and_slurms_answers_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = whole_run(tmp_path / "runs" / f"[bold]{ESCAPE}")
    attempt = run.logs / "slurm-7-0"
    (attempt / "rank-00000.log").write_text(f"{ESCAPE}\n")
    record = RankFailure(0, 1, 0.0, f"n1{ESCAPE}", f"ValueError: {ESCAPE}")
    (attempt / "failure-00000.json").write_text(json.dumps(asdict(record)))
    lease = run.path / "lease"
    lease.mkdir()
    (lease / "00000001.json").write_text(json.dumps(OWNER | {"host": f"n1{ESCAPE}"}))
    for command, words in ((status.main, []), (status.main, [str(run.path)]), (logs.main, [str(run.path)])):
        assert command(list(words)) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said and said.count(r"\x1b[31mred") >= 4 and "[bold]" in said
    job = read_job(
        f"JobId=7 JobName=a JobState=DONE UserId=me(0) JobState=RUNNING Reason={ESCAPE} Command=/x JobState=FAILED"
    )
    assert (job.number, job.state) == (7, "RUNNING") and "\x1b" not in job.reason
    assert read_job("JobId=x Restarts=-1").number == 0


@pytest.mark.parametrize(
    "change",
    [{"pid": "x"}, {"pid": -1}, {"job": "--help"}, {"job": -3}, {"started": 1e300}, {"extra": 1}, {"machine": None}],
)
def test_a_lease_with_wrong_values_is_an_error_that_names_the_file(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000001.json").write_text(json.dumps(OWNER | change))
    with pytest.raises(LeaseError, match=r"00000001\.json cannot be read as the owner of the run"):
        current_owner(tmp_path)


def test_failure_records_with_wrong_values_are_left_out(tmp_path: Path) -> None:
    good = asdict(RankFailure(2, 1, 5.0, "n1", "x"))
    for number, record in enumerate((good, good | {"rank": "x"}, good | {"time": None}, [], 7)):
        (tmp_path / f"failure-{number:05}.json").write_text(json.dumps(record))
    assert [failure.rank for failure in read_failures(tmp_path)] == [2]


def test_refusals_of_the_operating_system_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "lease").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name in ("scontrol", "squeue", "scancel", "sbatch"):
        (tmp_path / "bin" / name).write_text("#!/bin/bash\necho JobId=7 JobState=PENDING\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    words = ["-cn", "smoke", "run.name=x"]
    assert launch_local([*words, f"run.folder={tmp_path}/file"]) == 2
    assert launch_local([*words, f"run.folder={tmp_path}/{'n' * 300}"]) == 2
    run = whole_run(tmp_path / "a")
    (run.logs / "jobs").write_text("7\n")
    (run.logs / "stop").symlink_to(tmp_path / "file" / "stop")
    assert cancel.main([str(run.path)]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 3 and "Traceback" not in said, said
