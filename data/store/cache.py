"""Local copies of shards behind a URL, within a disk budget, shared by all processes of a machine.

    RemoteFolder(url, config).local("web.train-00017.bin", facts) -> path of a copy that matches its checksum

    cache.folder/ledger.json      every copy this cache wrote, with size, modification time and sha256; fetches in progress
                 locks/           one lock for each copy
                 URL/SHA256/NAME  the copies. New content under the same name is another file

A fetch writes a temporary file, hashes it while it arrives, syncs it to disk and renames it. So after a crash a copy is
complete or absent; the next fetch removes unfinished files. One process fetches a file, and the other processes of the
machine wait for it. A copy whose size and modification time match the ledger is used as it is; any other is hashed first.
Above the budget, the least recently opened copies are removed. A process that has one open can read it until it closes it.
Only files that the ledger lists are removed.
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
    """What each thread is reading or fetching, so that a message about a stall can name the file."""

    def __init__(self) -> None:
        self._doing: dict[int, list[tuple[object, float]]] = {}

    def of(self, what: object) -> "_Waiting":
        """A context manager in which this thread is recorded as waiting for `what`. Only `describe` makes it a text."""
        return _Waiting(self._doing.setdefault(threading.get_ident(), []), what)

    def describe(self) -> str:
        """What all threads wait for, the longest wait first."""
        now = time.monotonic()
        innermost = [stack[-1:] for stack in list(self._doing.values())]
        lines = sorted(((now - since, str(what)) for last in innermost for what, since in last), reverse=True)
        return "; ".join(f"{what} (for {seconds:.0f} s)" for seconds, what in lines) or "nothing is being read"


class _Waiting:
    """A class instead of a generator, because it is entered for every few rows and must be cheap."""

    def __init__(self, stack: list[tuple[object, float]], what: object) -> None:
        self._stack, self._what = stack, what

    def __enter__(self) -> None:
        self._stack.append((self._what, time.monotonic()))

    def __exit__(self, *_: object) -> None:
        self._stack.pop()


@dataclass(frozen=True)
class _Expected:
    """Size and digest that a fetched file must have."""

    most_bytes: int
    bytes: int | None
    """The exact size; None if it is not known."""
    sha256: str | None

    @classmethod
    def of(cls, facts: FileFacts | None, *, most_bytes: int, sha256: str | None) -> "_Expected":
        if facts is None:
            return cls(most_bytes=most_bytes, bytes=None, sha256=sha256)
        return cls(most_bytes=facts.bytes, bytes=facts.bytes, sha256=facts.sha256)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file written to `path` is inside `folder`, after following links of its parent folders."""
    return ".." not in path.parts and path.parent.resolve().is_relative_to(folder.resolve())


class _Mismatch(Exception):
    """The fetched bytes do not match the manifest."""

    def __init__(self, sha256: str) -> None:
        super().__init__("the fetched file does not match its checksum")
        self.sha256 = sha256


class RemoteFolder:
    """A folder of prepared data behind a URL."""

    def __init__(
        self, url: str, config: CacheConfig, activity: Activity, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.url = without_credentials(url.rstrip("/"))
        """The URL without credentials, for messages."""
        self._root = Path(config.folder)
        self.folder = self._root / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.budget_bytes = int(config.gib * 2**30)
        """Disk space that copies may take."""
        self.fetch_threads = config.fetch_threads
        self._retries = config.retries
        self._activity = activity
        self._sleep = sleep
        self._ledger = _Ledger(self._root)
        import fsspec  # start-up: only data behind a URL needs it

        try:
            self._system, self._path = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ValueError, ImportError) as error:
            raise DataError(f"data.folder={self.url} cannot be opened: {without_credentials(str(error))}") from error

    def local(
        self, name: str, facts: FileFacts | None = None, *, most_bytes: int = LARGEST_BYTES, sha256: str | None = None
    ) -> Path:
        """A local copy of a file, fetched unless a valid copy exists.

        Without facts (the manifest and the tokenizer) it is always fetched: at most `most_bytes`, with the given sha256 if
        there is one. Raises DataError, naming the file, if its name leads out of the cache's folder, if it cannot be fetched,
        or if it does not match the manifest.
        """
        path = self.path_of(name, facts)
        if not is_inside(path, self._root):
            raise DataError(
                f"{self.url} names a file {printable(name, most=200)!r}, which would be outside data.cache.folder. Do not use "
                f"this data: its manifest was made by someone else, or damaged."
            )
        with self._activity.of(f"waiting for a copy of {self.url}/{name}"), _locked(self._lock_of(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            _touch(path)  # first, so that another process does not evict it now
            if facts is None or not self._is_whole(path, facts):
                self._fetch_with_retries(name, path, _Expected.of(facts, most_bytes=most_bytes, sha256=sha256))
                self._evict(keep=path)
        return path

    def path_of(self, name: str, facts: FileFacts | None) -> Path:
        """Path of a file's copy, which may not exist."""
        return self.folder / name if facts is None else self.folder / facts.sha256[:16] / Path(name).name

    def touch(self, files: Sequence[tuple[str, FileFacts]]) -> None:
        """Mark copies as used now, so that others are evicted first. Files without a copy are ignored."""
        for name, facts in files:
            _touch(self.path_of(name, facts))

    def _lock_of(self, path: Path) -> Path:
        name_digest = hashlib.sha256(str(path.relative_to(self._root)).encode()).hexdigest()[:32]
        return self._root / "locks" / name_digest

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
        log.warning("%s was changed or damaged after it was fetched. It is fetched again.", path)
        return False

    def _name_of(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def _fetch_with_retries(self, name: str, path: Path, expected: "_Expected") -> None:
        wrong: str | None = None
        attempt = 0
        while True:
            try:
                self._fetch(name, path, expected)
                return
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.url}/{name} does not exist. Check data.folder, and that the data there is complete."
                ) from error
            except DataError:
                raise
            except Exception as error:  # each file system of fsspec has its own errors
                retries = self._retries
                if isinstance(error, _Mismatch):
                    if (
                        error.sha256 == wrong
                    ):  # the same wrong content twice: the stored file is wrong, not the transfer
                        raise DataError(
                            f"{self.url}/{name} does not match its checksum: it was changed or damaged. Copy the "
                            f"prepared data there again."
                        ) from error
                    wrong, retries = error.sha256, max(1, retries)
                shown = without_credentials(str(error)) or type(error).__name__
                if attempt >= retries:
                    raise DataError(
                        f"{self.url}/{name} cannot be fetched after {attempt + 1} attempts: {shown}. Check data.folder "
                        f"and the network."
                    ) from error
                log.warning("%s/%s: %s. Attempt %d of %d follows.", self.url, name, shown, attempt + 2, retries + 1)
                attempt += 1
                self._sleep(wait_s(attempt, first_s=1.0, most_s=60.0))

    def _fetch(self, name: str, path: Path, expected: "_Expected") -> None:
        aside = path.with_name(f"{path.name}.fetching-{os.uname().nodename}-{os.getpid()}")
        with self._changing() as ledger:
            ledger["fetching"][self._name_of(aside)] = self._name_of(path)
        digest, size = hashlib.sha256(), 0
        try:
            aside.unlink(missing_ok=True)  # it may be a link, and must not be written through
            with self._system.open(f"{self._path}/{name}", "rb") as source, aside.open("xb") as target:
                while piece := source.read(_PIECE_BYTES):
                    target.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    if size > expected.most_bytes:
                        break
            if expected.bytes is not None and size < expected.bytes:
                raise OSError(f"the transfer ended after {size:,} of {expected.bytes:,} bytes")
            if expected.bytes is None and size > expected.most_bytes:
                raise DataError(
                    f"{self.url}/{name} is larger than {expected.most_bytes:,} bytes, more than such a file can be. Check "
                    f"data.folder."
                )
            if size > expected.most_bytes or expected.sha256 not in (None, digest.hexdigest()):
                raise _Mismatch(digest.hexdigest())
            disk.sync(aside)
            found = aside.stat()
            entry = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest.hexdigest()}
            with self._changing() as ledger:
                disk.rename(aside, path)
                if expected.bytes is not None:
                    ledger["copies"][self._name_of(path)] = entry
        finally:
            aside.unlink(missing_ok=True)
            with self._changing() as ledger:
                ledger["fetching"].pop(self._name_of(aside), None)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The ledger, locked, as a copy that the caller may change. It is written if it was changed."""
        with _locked(self._root / "budget"):
            content = copy.deepcopy(self._ledger.read())
            yield content
            if content != self._ledger.read():
                self._ledger.write(content)

    def _evict(self, *, keep: Path) -> None:
        """Remove unfinished files of killed processes, and the least recently opened copies until the rest fits the budget."""
        with self._changing() as ledger:
            for name, final_name in list(ledger["fetching"].items()):
                with _locked_if_free(self._lock_of(self._root / final_name)) as is_free:
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
                    if path != keep and is_free:  # a locked copy is about to be opened
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
        """Copies that are not in the ledger, or changed, and that this process has hashed."""

    def read(self) -> dict[str, Any]:
        """`copies` and `fetching`, each by path relative to the cache's folder. The caller must not change them."""
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
            log.warning(
                "%s cannot be read (%s). Its copies stay, but no longer count towards data.cache.gib.",
                self._path,
                error,
            )
        return {"copies": {}, "fetching": {}}

    def write(self, content: dict[str, Any]) -> None:
        """Replace the ledger."""
        disk.write_text(self._path, json.dumps(content, indent=0, sort_keys=True), is_own=True)


def _touch(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the machine-wide lock of a file. It is released when the process dies."""
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
