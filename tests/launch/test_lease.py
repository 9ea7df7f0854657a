"""One run, one owner: real processes that race for a folder, killed owners, owners on other machines."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from slurm_jobs import CPU

from launch import lease as lease_module
from launch.lease import FOLDER, LeaseError, Owner, current_owner, take
from launch.local.command import refuse_second_trainer
from launch.queue import QueuedJob, SlurmError
from launch.runs import RunFolder
from launch.slurm.command import submit_run
from recipes.schema.errors import StratumError

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
ELSEWHERE = Owner(host="n7", pid=os.getpid(), process_started=1, machine="another boot", started=0.0, token="x")
JOB = QueuedJob(12, "RUNNING", "None", "", "", "n7", "", 0, "")


def _take_and_wait(folder: Path, start: Any, answers: Any) -> None:
    start.wait()
    try:
        taken = take(folder, what="runs/a")
        answers.put(("owner", os.getpid(), int(taken.path.stem)))
        signal.pause()
    except LeaseError as error:
        answers.put(("refused", os.getpid(), str(error)))


def race(folder: Path, count: int) -> tuple[list[Any], list[Any]]:
    """`count` processes try at once. -> (their answers, the processes; the winner still owns the lease)"""
    start, answers = FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=_take_and_wait, args=(folder, start, answers)) for _ in range(count)]
    for process in processes:
        process.start()
    start.set()
    return [answers.get(timeout=60) for _ in processes], processes


def end(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def test_two_trainers_in_one_run_folder(tmp_path: Path) -> None:
    """One of six that start together trains; after its kill -9 one of six others takes over at once, and so on."""
    run = RunFolder(tmp_path)
    for generation in (1, 2, 3):
        answers, processes = race(tmp_path / FOLDER, 6)
        winners = [pid for what, pid, _ in answers if what == "owner"]
        refusals = [text for what, _, text in answers if what == "refused"]
        assert len(winners) == 1 and len(refusals) == 5, answers
        assert all(
            f"runs/a belongs to process {winners[0]} on " in text and "is still running" in text for text in refusals
        )
        assert [path.name for path in (tmp_path / FOLDER).glob("*.json")] == [f"{generation:08d}.json"]
        with pytest.raises(LeaseError, match=f"process {winners[0]} "):
            refuse_second_trainer(run)
        end(processes)
        refuse_second_trainer(run)
        found = current_owner(tmp_path)
        assert found is not None and found[1] == "dead"
    assert not list((tmp_path / FOLDER).glob(".*")), "nothing is left behind"


def test_a_released_lease_is_free(tmp_path: Path) -> None:
    first = take(tmp_path, what="a")
    with pytest.raises(LeaseError):
        take(tmp_path, what="a")
    first.release()
    second = take(tmp_path, what="a")
    assert int(second.path.stem) == 2, "no number is given twice"
    assert second.renew() and not first.renew()


def _leave(folder: Path, owner: Owner, *, age_s: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "00000004.json"
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def test_a_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    mine = replace(lease_module.myself(), process_started=3)
    _leave(tmp_path / FOLDER, mine, age_s=0)
    assert take(tmp_path / FOLDER, what="a").path.stem == "00000005"


def test_an_owner_on_another_machine_is_judged_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_POLL_S", 0.05)
    _leave(tmp_path / "old", ELSEWHERE, age_s=1000)
    begun = time.monotonic()
    assert take(tmp_path / "old", what="a").path.stem == "00000005"
    assert time.monotonic() - begun < 5, "long dead: at once"

    path = _leave(tmp_path / "beating", ELSEWHERE, age_s=3)
    beat = FORK.Process(target=lambda: (time.sleep(0.4), os.utime(path)))
    beat.start()
    with pytest.raises(LeaseError, match=f"process {ELSEWHERE.pid} on n7"):
        take(tmp_path / "beating", what="a")
    beat.join()

    monkeypatch.setattr(lease_module, "EXPIRY_S", 3.4)
    _leave(tmp_path / "fresh", ELSEWHERE, age_s=3)
    assert take(tmp_path / "fresh", what="a").path.stem == "00000005", "after the wait"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (lambda numbers: [JOB], "unknown"),
        (lambda numbers: [replace(JOB, state="NODE_FAIL")], "dead"),
        (lambda numbers: [replace(JOB, restarts=1)], "dead"),
        (lambda numbers: [], "unknown"),
    ],
)
def test_slurm_says_whether_an_owner_on_a_lost_node_still_runs(
    answer: Callable[[object], list[QueuedJob]], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave(tmp_path, replace(ELSEWHERE, job=12), age_s=3)
    monkeypatch.setattr(lease_module, "look_up", answer)
    held = lease_module._current(tmp_path)
    assert held is not None and lease_module._state(held, tmp_path) == state


def test_without_slurms_answer_the_heartbeat_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_numbers: object) -> list[QueuedJob]:
        raise SlurmError("no answer")

    monkeypatch.setattr(lease_module, "look_up", silent)
    _leave(tmp_path, replace(ELSEWHERE, job=12), age_s=1000)
    take(tmp_path, what="a")


def test_a_requeued_job_takes_over_from_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "look_up", lambda numbers: [JOB])
    _leave(tmp_path, replace(ELSEWHERE, job=12), age_s=1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take(tmp_path, what="a")


@pytest.fixture(params=["links", "no links", "lost reply"])
def shared_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """File systems without hard links, and NFS, which may make a link and lose the reply."""
    link = os.link

    def strange(source: Path, target: Path) -> None:
        if request.param == "no links":
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target)
        if request.param == "lost reply":
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "link", strange)
    yield


@pytest.mark.usefixtures("shared_folder")
def test_every_file_system_gives_a_number_only_once(tmp_path: Path) -> None:
    answers, processes = race(tmp_path, 4)
    end(processes)
    assert sorted(what for what, *_ in answers) == ["owner", "refused", "refused", "refused"]


def test_a_damaged_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000001.json").write_text('{"host": "n')
    with pytest.raises(LeaseError, match=r"00000001\.json cannot be read as the owner of the run"):
        take(tmp_path, what="a")


def test_an_owner_whose_lease_was_taken_over_stops_writing(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom dataclasses import asdict\n"
        "from launch import lease\nfrom train.resilience.lease import run_lease\n"
        "run = Path(sys.argv[1])\n"
        "with run_lease(run, rank=0, any_rank=bool) as check:\n"
        "    check()\n"
        "    assert lease._create(run / 'lease', 2, lease.myself())\n"
        "    check()\n"
        "    print('written')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and not result.stdout and "has taken over" in result.stderr, result.stderr


def _submit(run: RunFolder, start: Any, answers: Any) -> None:
    start.wait()
    try:
        answers.put(("job", submit_run(run, replace(CPU, folder=str(run.path)), keep_code=False)))
    except StratumError as error:
        answers.put(("refused", str(error)))


def test_of_two_submissions_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are stand-ins: sbatch takes a while, as a busy cluster's does."""
    commands = {
        "sbatch": f"sleep 0.5; echo x >> {tmp_path}/submitted; echo 12",
        "squeue": "exit 0",
        "scontrol": "echo JobId=12 JobState=PENDING Reason=Priority",
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    run, start, answers = RunFolder(tmp_path / "run"), FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=_submit, args=(run, start, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(what for what, _ in found) == ["job", "refused", "refused", "refused"], found
    assert (tmp_path / "submitted").read_text() == "x\n" and (run.logs / "jobs").read_text() == "12\n"
    with pytest.raises(SlurmError, match=r"job 12 of .* is already pending"):
        submit_run(run, replace(CPU, folder=str(run.path)), keep_code=False)
    take(run.path / FOLDER, what="a")
    with pytest.raises(LeaseError, match="belongs to process"):
        submit_run(RunFolder(run.path), replace(CPU, folder=str(run.path)), keep_code=False)
