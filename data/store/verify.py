"""Which files are known to be what the manifest says: checksums taken once, remembered by size and time of change.

    Verifier(folder).check(path, facts)   hashes a file unless it was hashed before and has not changed since

What was checked is kept in `verified.json` next to the data. A file whose size or time of change differs from its entry is
hashed again before any of it is used; hashing 4 GiB takes some seconds, so larger sets are checked by
`stratum inspect --verify`, once, instead of by every rank of every run.
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
from recipes.schema import units
from recipes.schema.errors import DataError
from recipes.schema.foreign import read_json

VERIFIED = "verified.json"
BUDGET_BYTES = 4 << 30
"""Most that `auto` hashes when data is opened."""
log = logging.getLogger(__name__)


class Verifier:
    """Checksums of the files of one folder of data. Safe for threads."""

    def __init__(self, folder: Path, *, mode: str) -> None:
        """mode: `auto`, `always` or `never`, as in `data.verify`."""
        self._path = folder / VERIFIED
        self._mode = mode
        self._lock = threading.Lock()
        self._seen: dict[str, list[int]] = {}
        self._verified: dict[str, list[int]] = {}
        try:
            if mode != "always" and self._path.exists():
                self._verified = {
                    str(k): list(map(int, v)) for k, v in read_json(self._path, most_bytes=1 << 30).items()
                }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read (%s): files are checked again.", self._path, error)

    def check_all(
        self, files: Iterable[tuple[str, FileFacts]], *, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Check the files of a set as `mode` says. DataError names one that does not match. progress(bytes hashed)."""
        if self._mode == "never":
            return
        wanted = [(path, facts) for path, facts in files if not self._is_known(path)]
        total = sum(facts.bytes for _, facts in wanted)
        if self._mode == "auto" and total > BUDGET_BYTES:
            log.warning(
                "%d files of %s have not been checked against their checksums. `stratum inspect -cn RECIPE "
                "--verify` does it, once; files that change from now on are checked before they are used.",
                len(wanted),
                units.gib(total),
            )
            return
        with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)))) as pool:
            for facts in pool.map(lambda item: self._hash(*item), wanted):
                progress(facts.bytes)
        if wanted:
            self._keep()

    def check(self, path: str, facts: FileFacts) -> None:
        """Before a file is used: its size, and its content if it changed since it was checked or first seen."""
        now = _signature(path)
        if now[0] != facts.bytes:
            raise DataError(
                f"{path} is {now[0]:,} bytes long, the manifest says {facts.bytes:,}: truncated or replaced. Prepare the "
                f"data again."
            )
        before = self._verified.get(path) or self._seen.setdefault(path, now)
        if before == now:
            return
        if self._mode == "never":
            raise DataError(f"{path} was changed after it had been opened. Start again, from data that stays as it is.")
        self._hash(path, facts)
        self._keep()

    def _is_known(self, path: str) -> bool:
        return path in self._verified and self._verified[path] == _signature(path)

    def _hash(self, path: str, facts: FileFacts) -> FileFacts:
        before = _signature(path)
        if file_sha256(Path(path)) != facts.sha256:
            raise DataError(f"{path} does not match its checksum: it was changed or damaged. Prepare the data again.")
        with self._lock:
            self._verified[path] = before
        return facts

    def _keep(self) -> None:
        with self._lock:
            text = json.dumps(self._verified, indent=0)
        try:
            disk.write_text(self._path, text, is_own=True)
        except OSError as error:  # the data may be read-only
            log.info("%s cannot be written (%s): files are checked again next time.", self._path, error)


def _signature(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} is missing: {error.strerror}. Prepare the data again.") from error
    return [found.st_size, found.st_mtime_ns]
