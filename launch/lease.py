"""The lease of a run folder allows one trainer at a time, also on folders that several machines share. No torch.

    runs/NAME/lease/00000007.json   {host, pid, ...}   the highest number owns the run; its file's time is its heartbeat

A number is taken with link(2), which is exclusive also on NFS, so two processes never get the same number. The next number may be
taken only after the owner of the highest one has released it or is proved dead. No number is used twice. So an owner that was
wrongly judged dead sees a higher number at its next check, and stops. Proof of death, in this order:

    on the same machine    its process id does not exist, or belongs to a process that started at another time
    in a Slurm job         Slurm reports that the job has ended, or was restarted since
    on other machines      no heartbeat for EXPIRY_S, by the clock of the file server

Nothing here needs flock, which some shared file systems accept and ignore, or equal clocks on two machines.
"""

import contextlib
import errno
import json
import os
import re
import socket
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from data.system import disk
from data.system.node import this_machine
from launch.queue import SlurmError, look_up
from recipes.schema import units
from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable, read_json
from recipes.schema.typed import FieldError, build

FOLDER = "lease"
"""Name of the folder in a run folder."""
HEARTBEAT_S = 10.0
EXPIRY_S = 60.0
"""Several heartbeats, because a busy file server may delay some."""
_POLL_S = 0.5


class LeaseError(StratumError):
    """The run belongs to another process."""


@dataclass(frozen=True)
class Owner:
    """One process, described so that another machine can tell whether it still runs."""

    host: str
    pid: int
    process_started: int
    """Clock ticks from the machine's start to the process's start (proc(5)), because process ids are reused."""
    machine: str
    """Boot id and process-id namespace. Two equal `pid` are the same process only if both of these are equal."""
    started: float
    """Start of the process in seconds since the epoch, by the owner's clock. For messages only."""
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
class _Current:
    number: int
    owner: Owner
    beat: float
    """Time of the last heartbeat, by the file server's clock."""


class Lease:
    """The right to write into one folder. `take` takes it, `release` gives it up."""

    def __init__(self, folder: Path, number: int, owner: Owner) -> None:
        self._folder = folder
        self._number = number
        self._owner = owner

    @property
    def path(self) -> Path:
        """The file whose time is the heartbeat."""
        return self._folder / _name(self._number)

    def renew(self) -> bool:
        """Send a heartbeat. -> False if another process owns the folder now; then this one must not write any more.

        Raises OSError if the folder cannot be reached.
        """
        if max(_numbers(self._folder), default=0) > self._number:
            return False
        try:
            os.utime(self.path)  # without a time argument, the file server's clock is used
        except FileNotFoundError:
            return False
        return True

    def release(self) -> None:
        """Give up the folder. The number stays taken."""
        with contextlib.suppress(OSError):
            if self.path.exists():
                disk.write_text(self.path, _text(Owner(**{**asdict(self._owner), "is_released": True})), is_own=True)


def take(folder: Path, *, what: str) -> Lease:
    """Take the lease in `folder`, which is created if missing: at once if it is free or its owner is proved dead.

    Otherwise it waits for at most EXPIRY_S, if the owner is on another machine and its last heartbeat is recent. what: the name
    of the run, for the message. Raises LeaseError, with the owner, if it is alive; OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first_seen: dict[int, float] = {}
    while True:
        current = _current(folder)
        if current is not None and not current.owner.is_released:
            state = _state(current, folder)
            seen = first_seen.setdefault(current.number, current.beat)
            if state == "alive" or (state == "unknown" and current.beat != seen):
                raise LeaseError(refusal(current.owner, what=what))
            if state == "unknown":
                time.sleep(_POLL_S)
                continue
        number = 1 if current is None else current.number + 1
        owner = myself()
        if _create(folder, number, owner):
            if (
                max(_numbers(folder)) > number
            ):  # this process was slow: others have taken this number and higher ones meanwhile
                (folder / _name(number)).unlink(missing_ok=True)
                continue
            for old in _numbers(folder):
                if old < number:
                    (folder / _name(old)).unlink(missing_ok=True)
            return Lease(folder, number, owner)


def refusal(owner: Owner, *, what: str) -> str:
    """Why a second process must not write into `what`, with the remedies."""
    end = f"`stratum cancel {what}`" if owner.job is not None else f"`kill {owner.pid}` on {owner.host}"
    return (
        f"{what} belongs to {owner.describe()}, which is still running. Two trainers would damage the run. Wait until it ends, "
        f"stop it ({end} saves first), or choose another run.name."
    )


def current_owner(run: Path, *, may_ask_slurm: bool = True) -> tuple[Owner, State] | None:
    """The owner of a run, and whether it is alive; None if the run has no owner. Never waits for heartbeats.

    Raises LeaseError if the lease cannot be read.
    """
    folder = run / FOLDER
    current = _current(folder)
    if current is None or current.owner.is_released:
        return None
    state = _state(current, folder, may_ask_slurm=may_ask_slurm)
    return current.owner, "alive" if state == "unknown" else state


def _state(current: _Current, folder: Path, *, may_ask_slurm: bool = True) -> State:
    """Whether an owner is alive. "unknown": its last heartbeat is recent, but it may have died since."""
    state = state_by_process(current.owner, may_ask_slurm=may_ask_slurm)
    if state != "unknown":
        return state
    return "dead" if _server_time(folder) - current.beat > EXPIRY_S else "unknown"


def state_by_process(owner: Owner, *, may_ask_slurm: bool = True) -> State:
    """Whether an owner is alive, by its process on this machine or by its Slurm job; "unknown" if neither says so."""
    if owner.machine == this_machine() and owner.host == socket.gethostname():
        return "alive" if process_started(owner.pid) == owner.process_started else "dead"
    if owner.job is not None and may_ask_slurm and _job_is_over(owner):
        return "dead"
    return "unknown"


def _job_is_over(owner: Owner) -> bool:
    """Whether Slurm reports that the owner's job has ended; False if Slurm does not answer."""
    assert owner.job is not None
    try:
        (job,) = look_up([owner.job]) or (None,)
    except SlurmError:
        return False
    own_job = os.environ.get("SLURM_JOB_ID")
    if own_job == str(owner.job) and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > owner.job_restarts:
        return True
    return job is not None and (not job.is_active or job.restarts > owner.job_restarts)


def process_started(pid: int) -> int | None:
    """Start of a process of this machine, in clock ticks since the machine's start; None if it does not exist or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _started_without_proc(pid)
    fields = text.rpartition(")")[2].split()  # the process name before it may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def _started_without_proc(pid: int) -> int | None:
    """For systems without /proc: 0 for every running process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0


def myself() -> Owner:
    """This process, with a new token."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=process_started(os.getpid()) or 0,
        machine=this_machine(),
        started=time.time(),
        job=int(job) if job.isdigit() else None,
        job_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        step=os.environ.get("SLURM_STEP_ID", ""),
        token=uuid.uuid4().hex,
    )


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _numbers(folder: Path) -> list[int]:
    """The numbers taken so far, lowest first. Raises LeaseError if `folder` cannot be listed."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LeaseError(
            f"{folder} cannot be read: {error.strerror or error}. Make it a folder that you can read."
        ) from None
    return sorted(int(name[:8]) for name in names if re.fullmatch(r"\d{8}\.json", name))


def _current(folder: Path) -> _Current | None:
    """The lease with the highest number; None without a lease. Raises LeaseError if it cannot be read."""
    while numbers := _numbers(folder):
        path = folder / _name(numbers[-1])
        try:
            owner = owner_from(read_json(path))
            return _Current(numbers[-1], owner, path.stat().st_mtime)
        except FileNotFoundError:
            if path.is_symlink():
                raise LeaseError(
                    f"{path} is a link to a missing file. If no process trains in it, delete {folder}."
                ) from None
            continue  # a newer owner removed it just now
        except (OSError, ValueError) as error:
            raise LeaseError(
                f"{path} cannot be read as the owner of the run ({printable(str(error), most=200)}). If no process trains in it, "
                f"delete {folder}."
            ) from None
    return None


def owner_from(value: object) -> Owner:
    """The owner in a lease file. ValueError if the file is not one that `take` wrote."""
    try:
        owner = build(Owner, value, "owner")
    except FieldError as error:
        raise ValueError(str(error)) from None
    if owner.pid < 1 or not 0 <= owner.started < 1e11 or (owner.job is not None and owner.job < 1):
        raise ValueError(f"pid={owner.pid}, started={owner.started:g}, job={owner.job}")
    return replace(owner, host=printable(owner.host, most=100))


def _create(folder: Path, number: int, owner: Owner) -> bool:
    """Take a number. -> False if another process already has it."""
    aside = folder / f".{owner.token}"
    try:
        disk.write_text(aside, _text(owner), is_own=True)
        try:
            os.link(aside, folder / _name(number))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            # NFS may lose the reply after it made the link. Then the number of links is 2 (link(2), open(2)).
            if aside.stat().st_nlink == 2:
                return True
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
                raise
        return _create_without_links(folder / _name(number), aside.read_bytes())
    finally:
        aside.unlink(missing_ok=True)


def _create_without_links(path: Path, content: bytes) -> bool:
    """Exclusive creation, for file systems without hard links."""
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
    """The time now, by the clock that sets the times of files in `folder`."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()  # this user cannot write into the folder: use this machine's clock
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
