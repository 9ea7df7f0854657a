"""Local copies of shards that are behind a URL, within a budget of disk, shared by all processes of a machine.

    RemoteFolder(url, config).local("web.train-00017.bin", facts) -> path of a copy that matches its checksum

    cache.folder/ledger.json      every copy this cache wrote, with size, time of change and sha256; fetches in progress
                 locks/           one lock for each copy
                 URL/SHA256/NAME  the copies: new content behind the same name is another file

A copy is fetched aside, hashed while it arrives, made durable and renamed: after a crash a copy is whole or absent, and
what was left half-fetched is removed by the next fetch. One process fetches a file, the others of the machine wait for it.
A copy is used while its size and time of change are those of the ledger; otherwise its content is hashed again first.
Beyond the budget the copies that were not opened for longest are removed; a process that still reads one keeps its
contents until it closes it. Only files that the ledger lists are ever removed.
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from data.store.manifest import LARGEST_BYTES, FileFacts, file_sha256
from data.system import disk
from data.system.retry import wait_s
from recipes.schema.credentials import without_credentials
from recipes.schema.data import CacheConfig
from recipes.schema.data import is_remote as is_remote
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable, read_json

LEDGER = "ledger.json"
_PIECE_BYTES = 4 << 20
log = logging.getLogger(__name__)


class Activity:
    """The file each thread waits for, so that the report of a stall can name it."""

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


@dataclass(frozen=True)
class _Wanted:
    """Size and digest that a fetched file must have."""

    most_bytes: int
    bytes: int | None
    """Exactly so many; None if it is not known."""
    sha256: str | None

    @classmethod
    def of(cls, facts: FileFacts | None, *, most_bytes: int, sha256: str | None) -> "_Wanted":
        if facts is None:
            return cls(most_bytes=most_bytes, bytes=None, sha256=sha256)
        return cls(most_bytes=facts.bytes, bytes=facts.bytes, sha256=facts.sha256)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file written at `path` is inside `folder`, links of the folders above it followed."""
    return ".." not in path.parts and path.parent.resolve().is_relative_to(folder.resolve())


class _Mismatch(Exception):
    """The fetched bytes do not match the manifest."""

    def __init__(self, sha256: str) -> None:
        super().__init__("what arrived does not match its checksum")
        self.sha256 = sha256


class RemoteFolder:
    """A folder of prepared data behind a URL."""

    def __init__(
        self, url: str, config: CacheConfig, activity: Activity, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.url = without_credentials(url.rstrip("/"))
        """As it is shown."""
        self._root = Path(config.folder)
        self.folder = self._root / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.budget_bytes = int(config.gib * 2**30)
        """Disk that copies may take."""
        self.fetch_threads = config.fetch_threads
        self._retries = config.retries
        self._activity = activity
        self._sleep = sleep
        self._ledger = _Ledger(self._root)
        try:
            self._system, self._path = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ValueError, ImportError) as error:
            raise DataError(f"data.folder={self.url} cannot be opened: {without_credentials(str(error))}") from error

    def local(
        self, name: str, facts: FileFacts | None = None, *, most_bytes: int = LARGEST_BYTES, sha256: str | None = None
    ) -> Path:
        """A local copy of a file. Without facts (the manifest and the tokenizer) it is fetched again: at most `most_bytes`, and
        only the content of `sha256` if that is given.

        The copy is always inside the cache's folder, whatever the name. Raises DataError, naming the file, if it cannot be
        fetched or is not what the manifest says.
        """
        path = self.path_of(name, facts)
        if not is_inside(path, self._root):
            raise DataError(
                f"{self.url} names a file {printable(name, most=200)!r}, which would be outside data.cache.folder."
            )
        with self._activity.of(f"waiting for a copy of {self.url}/{name}"), _locked(self._lock_of(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            _touch(path)  # first: then it is not what goes for want of room
            if facts is None or not self._is_whole(path, facts):
                self._fetch_with_retries(name, path, _Wanted.of(facts, most_bytes=most_bytes, sha256=sha256))
                self._evict(keep=path)
        return path

    def path_of(self, name: str, facts: FileFacts | None) -> Path:
        """Path of the copy of a file."""
        return self.folder / name if facts is None else self.folder / facts.sha256[:16] / Path(name).name

    def touch(self, files: Sequence[tuple[str, FileFacts]]) -> None:
        """Say of copies that they are in use: those that are not go first. Names of files that are not here do no harm."""
        for name, facts in files:
            _touch(self.path_of(name, facts))

    def _lock_of(self, path: Path) -> Path:
        known = hashlib.sha256(str(path.relative_to(self._root)).encode()).hexdigest()[:32]
        return self._root / "locks" / known

    def _is_whole(self, path: Path, facts: FileFacts) -> bool:
        """Whether a copy matches the manifest. It is hashed only if it differs from what the ledger or this process recorded."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        now = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": facts.sha256}
        if now in (self._ledger.read()["copies"].get(self._name_of(path)), self._ledger.seen.get(str(path))):
            return True
        if found.st_size == facts.bytes and file_sha256(path) == facts.sha256:
            self._ledger.seen[str(path)] = now
            return True
        log.warning("%s is not what was fetched: it was changed or damaged. It is fetched again.", path)
        return False

    def _name_of(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def _fetch_with_retries(self, name: str, path: Path, wanted: "_Wanted") -> None:
        wrong: str | None = None
        attempt = 0
        while True:
            try:
                self._fetch(name, path, wanted)
                return
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.url}/{name} does not exist. Is data.folder right, and the data complete?"
                ) from error
            except DataError:
                raise
            except Exception as error:  # each file system has its own kinds
                again = self._retries
                if isinstance(error, _Mismatch):
                    if error.sha256 == wrong:  # twice the same: it is not the transfer that is wrong
                        raise DataError(
                            f"{self.url}/{name} does not match its checksum: it was changed or damaged."
                        ) from error
                    wrong, again = error.sha256, max(1, again)
                shown = without_credentials(str(error)) or type(error).__name__
                if attempt >= again:
                    raise DataError(
                        f"{self.url}/{name} cannot be fetched after {attempt + 1} attempts: {shown}"
                    ) from error
                log.warning("%s/%s: %s. Attempt %d of %d follows.", self.url, name, shown, attempt + 2, again + 1)
                attempt += 1
                self._sleep(wait_s(attempt, first_s=1.0, most_s=60.0))

    def _fetch(self, name: str, path: Path, wanted: "_Wanted") -> None:
        aside = path.with_name(f"{path.name}.fetching-{os.uname().nodename}-{os.getpid()}")
        with self._changing() as ledger:
            ledger["fetching"][self._name_of(aside)] = self._name_of(path)
        digest, size = hashlib.sha256(), 0
        try:
            aside.unlink(missing_ok=True)  # never written through: it may be a link
            with self._system.open(f"{self._path}/{name}", "rb") as source, aside.open("xb") as target:
                while piece := source.read(_PIECE_BYTES):
                    target.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    if size > wanted.most_bytes:
                        break
            if wanted.bytes is not None and size < wanted.bytes:
                raise OSError(f"the transfer ended after {size:,} of {wanted.bytes:,} bytes")
            if wanted.bytes is None and size > wanted.most_bytes:
                raise DataError(
                    f"{self.url}/{name} is larger than {wanted.most_bytes:,} bytes, so it is not what it should be."
                )
            if size > wanted.most_bytes or wanted.sha256 not in (None, digest.hexdigest()):
                raise _Mismatch(digest.hexdigest())
            disk.sync(aside)
            found = aside.stat()
            entry = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest.hexdigest()}
            with self._changing() as ledger:
                disk.rename(aside, path)
                if wanted.bytes is not None:
                    ledger["copies"][self._name_of(path)] = entry
        finally:
            aside.unlink(missing_ok=True)
            with self._changing() as ledger:
                ledger["fetching"].pop(self._name_of(aside), None)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The ledger, to be changed by this process alone; written when it was."""
        with _locked(self._root / "budget"):
            content = copy.deepcopy(self._ledger.read())
            yield content
            if content != self._ledger.read():
                self._ledger.write(content)

    def _evict(self, *, keep: Path) -> None:
        """Remove the copies that were not opened for longest, until all fit the budget, and what killed processes left."""
        with self._changing() as ledger:
            for name, wanted in list(ledger["fetching"].items()):
                with _locked_if_free(self._lock_of(self._root / wanted)) as is_free:
                    if is_free:
                        (self._root / name).unlink(missing_ok=True)
                        del ledger["fetching"][name]
            copies = []
            for name in list(ledger["copies"]):
                try:
                    found = (self._root / name).stat()
                except FileNotFoundError:
                    del ledger["copies"][name]
                    continue
                copies.append((found.st_atime_ns, found.st_size, self._root / name))
            used = sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if used <= self.budget_bytes:
                    break
                with _locked_if_free(self._lock_of(path)) as is_free:
                    if path != keep and is_free:  # else someone is about to open it
                        path.unlink(missing_ok=True)
                        with contextlib.suppress(OSError):
                            path.parent.rmdir()
                        del ledger["copies"][self._name_of(path)]
                        used -= size


class _Ledger:
    """The list of what this cache wrote, shared by the processes of a machine. Read again only when it has changed."""

    def __init__(self, root: Path) -> None:
        self._path = root / LEDGER
        self._known: tuple[tuple[int, int, int], dict[str, Any]] | None = None
        self.seen: dict[str, dict[str, Any]] = {}
        """Files found in place that this process has hashed."""

    def read(self) -> dict[str, Any]:
        """`copies` and `fetching`, each by path relative to the cache's folder. Not to be changed."""
        try:
            found = self._path.stat()
            signature = found.st_ino, found.st_size, found.st_mtime_ns
            if self._known is None or self._known[0] != signature:
                content = read_json(self._path)
                self._known = signature, {kind: dict(content[kind]) for kind in ("copies", "fetching")}
            return self._known[1]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be read (%s): copies made before are kept and no longer counted.", self._path, error)
        return {"copies": {}, "fetching": {}}

    def write(self, content: dict[str, Any]) -> None:
        """Replace it whole."""
        disk.write_text(self._path, json.dumps(content, indent=0, sort_keys=True), is_own=True)


def _touch(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the machine-wide lock of a file; released when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _locked_if_free(path: Path) -> Iterator[bool]:
    """Take the lock of a file unless a process has it already. Yields whether it was taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
