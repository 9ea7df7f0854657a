"""Compares files with the checksums of the manifest, once, and remembers which files matched.

    Verifier(folder).check(path, facts)   hashes a file unless it was hashed before and has not changed since

The result is stored in `verified.json` next to the data: size and modification time of each file that matched. If they differ
from a file's entry, the file is hashed again before it is used. Hashing 4 GiB takes some seconds. Larger data is not hashed
by every rank of every run, but once by `stratum inspect --verify`.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.store.manifest import FileFacts, file_sha256
from data.system import disk
from data.system.bulk import without_collections
from recipes.schema import units
from recipes.schema.errors import DataError
from recipes.schema.foreign import read_json

VERIFIED = "verified.json"
BUDGET_BYTES = 4 << 30
"""`auto` hashes at most this much when data is opened."""
log = logging.getLogger(__name__)


class Verifier:
    """Checks the files of one folder of data. Thread-safe."""

    def __init__(self, folder: Path, *, mode: str) -> None:
        """mode: `auto`, `always` or `never`, as in `data.verify`."""
        self._path = folder / VERIFIED
        self._mode = mode
        self._lock = threading.Lock()
        self._seen: dict[str, list[int]] = {}
        self._verified: dict[str, list[int]] = {}
        try:
            if mode != "always" and self._path.exists():
                with without_collections():  # a line for each file of the folder
                    found = read_json(self._path, most_bytes=1 << 30).items()
                    self._verified = {key: [int(size), int(changed)] for key, (size, changed) in found}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read (%s). All files are checked again.", self._path, error)

    def check_all(
        self, files: Iterable[tuple[str, FileFacts]], *, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Check files as `mode` says. DataError names a file that does not match. progress: called with bytes hashed."""
        if self._mode == "never":
            return
        unchecked = [(path, facts) for path, facts in files if not self._is_known(path)]
        total = sum(facts.bytes for _, facts in unchecked)
        if self._mode == "auto" and total > BUDGET_BYTES:
            log.warning(
                "%d files of %s have not been compared with their checksums. `stratum inspect -cn RECIPE "
                "--verify` does it once. Files that change from now on are checked before they are used.",
                len(unchecked),
                units.gib(total),
            )
            return
        with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)))) as pool:
            for facts in pool.map(lambda item: self._hash(*item), unchecked):
                progress(facts.bytes)
        if unchecked:
            self._store()

    def check(self, path: str, facts: FileFacts) -> None:
        """Check a file before it is used: its size, and its checksum if it changed since the last check or first use."""
        now = _signature(path)
        if now[0] != facts.bytes:
            raise DataError(
                f"{path} is {now[0]:,} bytes long, but the manifest says {facts.bytes:,}: truncated or replaced. Prepare the "
                f"data again."
            )
        before = self._verified.get(path) or self._seen.setdefault(path, now)
        if before == now:
            return
        if self._mode == "never":
            raise DataError(f"{path} was changed after it had been opened. Restore it and start the run again.")
        self._hash(path, facts)
        self._store()

    def _is_known(self, path: str) -> bool:
        return path in self._verified and self._verified[path] == _signature(path)

    def _hash(self, path: str, facts: FileFacts) -> FileFacts:
        before = _signature(path)
        if file_sha256(Path(path)) != facts.sha256:
            raise DataError(f"{path} does not match its checksum: it was changed or damaged. Prepare the data again.")
        with self._lock:
            self._verified[path] = before
        return facts

    def _store(self) -> None:
        with self._lock:
            text = json.dumps(self._verified, indent=0)
        try:
            disk.write_text(self._path, text, is_own=True)
        except OSError as error:  # the data may be read-only
            log.info("%s cannot be written (%s). Files are checked again next time.", self._path, error)


def _signature(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} is missing: {error.strerror}. Prepare the data again.") from error
    return [found.st_size, found.st_mtime_ns]
