"""Local copies of shards that lie behind a URL, within a budget of disk, shared by all processes of a machine.

    RemoteFolder(url, config).local("web.train-00017.bin", facts) -> path of a copy that matches its checksum

A copy is fetched aside, hashed while it arrives, made durable and renamed: after a crash a copy is whole or absent, and
what was left half-fetched is removed by the next fetch of that file. One process fetches a file, the others of the
machine wait for it. Beyond the budget the copies that were not opened for longest are removed; a process that still reads
one keeps its contents until it closes it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec

from data.store.manifest import FileFacts
from data.system import disk
from recipes.schema.data import CacheConfig
from recipes.schema.errors import DataError

_PIECE_BYTES = 4 << 20
log = logging.getLogger(__name__)


class Activity:
    """What each thread is waiting for, so that a stall can be given a name."""

    def __init__(self) -> None:
        self._doing: dict[int, list[tuple[object, float]]] = {}

    def of(self, what: object) -> "_Waiting":
        """Say what this thread waits for, while in a `with` statement. `what` is made a text only when someone asks."""
        return _Waiting(self._doing.setdefault(threading.get_ident(), []), what)

    def describe(self) -> str:
        """All that is waited for, longest first."""
        now = time.monotonic()
        innermost = [stack[-1:] for stack in list(self._doing.values())]
        lines = sorted(((now - since, str(what)) for last in innermost for what, since in last), reverse=True)
        return "; ".join(f"{what} (for {seconds:.0f} s)" for seconds, what in lines) or "nothing is being read"


class _Waiting:
    """A context manager without a generator: it is entered for every few rows."""

    def __init__(self, stack: list[tuple[object, float]], what: object) -> None:
        self._stack, self._what = stack, what

    def __enter__(self) -> None:
        self._stack.append((self._what, time.monotonic()))

    def __exit__(self, *_: object) -> None:
        self._stack.pop()


def is_remote(folder: str) -> bool:
    """Whether a folder is a URL."""
    return "://" in folder


class RemoteFolder:
    """A folder of prepared data behind a URL."""

    def __init__(
        self, url: str, config: CacheConfig, activity: Activity, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.url = url.rstrip("/")
        self._root = Path(config.folder)
        self.folder = self._root / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.budget_bytes = int(config.gib * 2**30)
        """Disk that copies may take."""
        self.fetch_threads = config.fetch_threads
        self._retries = config.retries
        self._activity = activity
        self._sleep = sleep
        try:
            self._system, self._path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise DataError(f"data.folder={url} cannot be opened: {error}") from error

    def local(self, name: str, facts: FileFacts | None = None) -> Path:
        """A local copy of a file. Without facts (the manifest itself) it is fetched anew and not checked.

        Raises DataError, naming the file, when it cannot be fetched or is not what the manifest says.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._activity.of(f"waiting for a copy of {self.url}/{name}"), _locked(path):
            self.touch([name])  # first: then it is not what goes for want of room
            if facts is None or not _is_whole(path, facts):
                self._fetch_with_retries(name, path, facts)
                self._evict(keep=path)
        return path

    def touch(self, names: Sequence[str]) -> None:
        """Say of copies that they are in use: those that are not go first. Names of files that are not here do no harm."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = self.folder / name
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _fetch_with_retries(self, name: str, path: Path, facts: FileFacts | None) -> None:
        for attempt in range(self._retries + 1):
            try:
                self._fetch(name, path, facts)
                return
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.url}/{name} does not exist. Is data.folder right, and the data complete?"
                ) from error
            except DataError:
                raise
            except Exception as error:  # each file system has its own kinds
                if attempt == self._retries:
                    raise DataError(
                        f"{self.url}/{name} cannot be fetched after {attempt + 1} attempts: {error}"
                    ) from error
                log.warning(
                    "%s/%s: %s. Attempt %d of %d follows.", self.url, name, error, attempt + 2, self._retries + 1
                )
                self._sleep(min(60.0, 2.0**attempt))

    def _fetch(self, name: str, path: Path, facts: FileFacts | None) -> None:
        digest, size = hashlib.sha256(), 0
        with disk.written_aside(path) as aside:  # we hold the lock: whoever left one there is gone
            with self._system.open(f"{self._path}/{name}", "rb") as source, aside.open("wb") as target:
                while piece := source.read(_PIECE_BYTES):
                    target.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    if facts is not None and size > facts.bytes:
                        break
            if facts is not None and size < facts.bytes:
                raise OSError(f"the transfer ended after {size:,} of {facts.bytes:,} bytes")
            if facts is not None and (size != facts.bytes or digest.hexdigest() != facts.sha256):
                raise DataError(f"{self.url}/{name} does not match its checksum: it was changed or damaged.")

    def _evict(self, *, keep: Path) -> None:
        """Remove the copies that were not opened for longest, until all fit the budget, and what killed processes left."""
        with _locked(self._root / "budget"):
            copies = []
            for path in self._root.glob("*/**/*"):
                with contextlib.suppress(FileNotFoundError):
                    fetched = disk.written_at(path)
                    if fetched is not None and not _is_locked(fetched):
                        path.unlink()
                    if path.suffix in (".bin", ".idx", ".origins"):
                        found = path.stat()
                        copies.append((found.st_atime_ns, found.st_size, path))
            used = sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if used <= self.budget_bytes:
                    break
                if path != keep and not _is_locked(path):  # else someone is about to open it
                    path.unlink(missing_ok=True)
                    used -= size


def _is_whole(path: Path, facts: FileFacts) -> bool:
    """Copies appear by rename after their checksum was right, so size is enough."""
    return path.is_file() and path.stat().st_size == facts.bytes


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the machine-wide lock of a file; released when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file."""
    with Path(f"{path}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
