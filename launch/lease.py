"""Who owns a run folder: one trainer at a time, on shared folders too. Standard library only.

    runs/NAME/lease/00000007.json   {host, pid, ...}   the highest number owns the run; its file's time is its heartbeat

A number is taken by link(2), which is exclusive on NFS too: two processes never get the same one. The next number may be
taken only when the owner of the highest has given it back or is proved dead, and no number is given twice, so an owner that
was taken for dead sees a higher number as soon as it looks, and stops. Proof of death, in this order:

    on the same machine    its process id is gone, or belongs to a process that started at another time
    in a Slurm job         Slurm says that the job has ended, or has started again since
    elsewhere              no heartbeat for EXPIRY_S, by the clock of the file server

Nothing here relies on flock, which some shared file systems accept and ignore, or on two machines' clocks agreeing.
"""

import contextlib
import errno
import json
import os
import re
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data.system import disk
from launch.queue import SlurmError, look_up
from recipes.schema import units
from recipes.schema.errors import StratumError
from recipes.schema.foreign import read_json

FOLDER = "lease"
"""Name of the folder in a run folder."""
HEARTBEAT_S = 10.0
EXPIRY_S = 60.0
"""Several heartbeats: a busy file server may delay one."""
_POLL_S = 0.5


class LeaseError(StratumError):
    """The run belongs to another process."""


@dataclass(frozen=True)
class Owner:
    """One process, described so that another machine can tell whether it still runs."""

    host: str
    pid: int
    process_started: int
    """Clock ticks from the machine's start to the process's (proc(5)): tells a process from a later one of the same id."""
    machine: str
    """Boot id and process-id namespace: only inside the same one does `pid` mean the same process."""
    started: float
    """Seconds since the epoch, by the owner's clock: for people."""
    job: int | None = None
    """Slurm job."""
    job_restarts: int = 0
    step: str = ""
    """Slurm job step."""
    token: str = ""
    is_released: bool = False

    def describe(self) -> str:
        """`process 4711 on n1 (Slurm job 12), started 2026-03-01 12:00:00`."""
        job = f" (Slurm job {self.job})" if self.job is not None else ""
        return f"process {self.pid} on {self.host}{job}, started {units.moment(self.started)}"


State = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True)
class _Held:
    number: int
    owner: Owner
    beat: float
    """Time of the last heartbeat, by the file server's clock."""


class Lease:
    """The right to write into one folder, taken by `take` and given back by `release`."""

    def __init__(self, folder: Path, number: int, owner: Owner) -> None:
        self._folder = folder
        self._number = number
        self._owner = owner

    @property
    def path(self) -> Path:
        """The file whose time is the heartbeat."""
        return self._folder / _name(self._number)

    def renew(self) -> bool:
        """Give a sign of life. -> False if another process has taken over: then nothing more may be written.

        Raises OSError when the folder cannot be reached.
        """
        if max(_numbers(self._folder), default=0) > self._number:
            return False
        try:
            os.utime(self.path)  # the server's clock, not ours
        except FileNotFoundError:
            return False
        return True

    def release(self) -> None:
        """Give it back. The number stays taken."""
        with contextlib.suppress(OSError):
            if self.path.exists():
                disk.write_text(self.path, _text(Owner(**{**asdict(self._owner), "is_released": True})), is_own=True)


def take(folder: Path, *, what: str) -> Lease:
    """Take the lease in `folder`, which is made if missing; at once if it is free or its owner is proved dead.

    Waits, at most EXPIRY_S, only for an owner on another machine that neither Slurm nor a heartbeat speaks for. what: said
    in the refusal. Raises LeaseError naming the owner if it is alive, OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first_seen: dict[int, float] = {}
    while True:
        held = _current(folder)
        if held is not None and not held.owner.is_released:
            state = _state(held, folder)
            seen = first_seen.setdefault(held.number, held.beat)
            if state == "alive" or (state == "unknown" and held.beat != seen):
                raise LeaseError(refusal(held.owner, what=what))
            if state == "unknown":
                time.sleep(_POLL_S)
                continue
        number = 1 if held is None else held.number + 1
        owner = _myself()
        if _create(folder, number, owner):
            if max(_numbers(folder)) > number:  # we were slow: this number was taken, and passed on, long ago
                (folder / _name(number)).unlink(missing_ok=True)
                continue
            for old in _numbers(folder):
                if old < number:
                    (folder / _name(old)).unlink(missing_ok=True)
            return Lease(folder, number, owner)


def refusal(owner: Owner, *, what: str) -> str:
    """Why a second process may not write into `what`."""
    end = f"`stratum cancel {what}`" if owner.job is not None else f"`kill {owner.pid}` on {owner.host}"
    return (
        f"{what} belongs to {owner.describe()}, which still runs: two trainers in one run would spoil it. Wait for its end, "
        f"end it ({end} saves first), or choose another run.name."
    )


def current_owner(run: Path, *, may_ask_slurm: bool = True) -> tuple[Owner, State] | None:
    """Who owns a run, and whether it still lives; None if nobody does, or if it was given back. Never waits for heartbeats."""
    folder = run / FOLDER
    held = _current(folder)
    if held is None or held.owner.is_released:
        return None
    state = _state(held, folder, may_ask_slurm=may_ask_slurm)
    return held.owner, "alive" if state == "unknown" else state


def _state(held: _Held, folder: Path, *, may_ask_slurm: bool = True) -> State:
    """Whether an owner lives. "unknown": its last heartbeat is fresh, but it may have died since."""
    owner = held.owner
    if owner.machine == _machine() and owner.host == socket.gethostname():
        return "alive" if process_started(owner.pid) == owner.process_started else "dead"
    if owner.job is not None and may_ask_slurm and _job_is_over(owner):
        return "dead"
    return "dead" if _server_time(folder) - held.beat > EXPIRY_S else "unknown"


def _job_is_over(owner: Owner) -> bool:
    """Whether Slurm says so; False if it cannot be asked, or still has the job."""
    assert owner.job is not None
    try:
        (job,) = look_up([owner.job]) or (None,)
    except SlurmError:
        return False
    mine = os.environ.get("SLURM_JOB_ID")
    if mine == str(owner.job) and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > owner.job_restarts:
        return True
    return job is not None and (not job.is_active or job.restarts > owner.job_restarts)


def process_started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since the machine did; None if it is gone or only a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _started_without_proc(pid)
    fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def _started_without_proc(pid: int) -> int | None:
    """For systems without /proc: 0 for any process that runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0


def _machine() -> str:
    """What has to be the same for a process id to mean the same process."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        boot += " " + str(Path("/proc/self/ns/pid").readlink())
    return boot


def _myself() -> Owner:
    job = os.environ.get("SLURM_JOB_ID", "")
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=process_started(os.getpid()) or 0,
        machine=_machine(),
        started=time.time(),
        job=int(job) if job.isdigit() else None,
        job_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        step=os.environ.get("SLURM_STEP_ID", ""),
        token=uuid.uuid4().hex,
    )


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name[:8]) for name in names if re.fullmatch(r"\d{8}\.json", name))


def _current(folder: Path) -> _Held | None:
    """The lease of the highest number; None if there is none."""
    while numbers := _numbers(folder):
        path = folder / _name(numbers[-1])
        try:
            owner = Owner(**read_json(path))
            return _Held(numbers[-1], owner, path.stat().st_mtime)
        except FileNotFoundError:
            continue  # a newer owner has just removed it
        except (OSError, ValueError, TypeError) as error:
            raise LeaseError(
                f"{path} does not say who owns the run ({error}). If nobody trains in it, delete {folder}."
            ) from None
    return None


def _create(folder: Path, number: int, owner: Owner) -> bool:
    """Take a number. -> False if another process has it."""
    aside = folder / f".{owner.token}"
    try:
        disk.write_text(aside, _text(owner), is_own=True)
        try:
            os.link(aside, folder / _name(number))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            # A reply of NFS may be lost after the link was made: the count of links tells (link(2), open(2)).
            if aside.stat().st_nlink == 2:
                return True
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
                raise
        return _create_without_links(folder / _name(number), aside.read_bytes())
    finally:
        aside.unlink(missing_ok=True)


def _create_without_links(path: Path, content: bytes) -> bool:
    """For file systems that have no hard links: exclusive creation."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    return True


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner))


def _server_time(folder: Path) -> float:
    """Now, by the clock that stamps files in `folder`."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()  # a folder that only its owner may write
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
