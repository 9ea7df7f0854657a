"""The lease of a run in object storage allows one trainer at a time to write there, from any machine.

    owner.json   {number, owner, beat}   created if absent, replaced only by compare-and-swap; each heartbeat changes it

A released lease, or one whose process on this machine or Slurm job has ended, is taken at once. Otherwise the next process waits
until owner.json has not changed for EXPIRY_S by its own clock, so no two clocks are compared. An owner that was wrongly taken for
dead finds another version at its next heartbeat, and writes nothing more. Each owner has a higher number than the one before.
"""

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace

from data.bucket.bucket import Bucket, ChangedError, MissingError, StorageError, Version
from launch.lease import HEARTBEAT_S, LeaseError, Owner, myself, owner_from, refusal, state_by_process

log = logging.getLogger(__name__)

NAME = "owner.json"
EXPIRY_S = 90.0
"""Several heartbeats, because a request to busy storage is repeated for some time before it succeeds."""
_POLL_S = 2.0


@dataclass(frozen=True)
class _Found:
    number: int
    owner: Owner
    version: Version


class StorageLease:
    """The right to write a run in object storage. `take` takes it; it is kept by a thread until `release`."""

    def __init__(self, bucket: Bucket, number: int, owner: Owner, version: Version) -> None:
        self.number = number
        """Higher than every earlier owner's."""
        self.is_lost = False
        """Whether another process owns the run now."""
        self._bucket, self._owner, self._version = bucket, owner, version
        self._beats = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="storage lease", daemon=True).start()

    def renew(self) -> bool:
        """Send a heartbeat. -> False if another process owns the run now or may take it, because this one has released it.
        UnreachableError if the storage does not answer."""
        with self._lock:
            if self.is_lost or self._ended.is_set():
                return False
            self._beats += 1
            self._write(self._owner)
            return not self.is_lost

    def release(self) -> None:
        """Give up the lease, so that the next process need not wait."""
        self._ended.set()
        with self._lock:
            if not self.is_lost:
                try:
                    self._write(replace(self._owner, is_released=True))
                except StorageError as error:
                    log.warning("the lease of %s stays until it expires: %s", self._bucket.address, error)

    def _write(self, owner: Owner) -> None:
        content = _content(self.number, owner, self._beats)
        try:
            self._version = self._bucket.replace(NAME, content, version=self._version)
        except ChangedError:
            self.is_lost = True

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if not self.renew():
                    return
            except StorageError as error:
                log.warning("the lease of %s cannot be renewed (%s); trying again", self._bucket.address, error)


def take(bucket: Bucket, *, expiry_s: float = EXPIRY_S) -> StorageLease:
    """Take the lease of the run in a bucket; may wait for `expiry_s`. Raises LeaseError if its owner is alive; StorageError."""
    owner, started, seen = myself(), time.monotonic(), None
    while True:
        found = _read(bucket)
        try:
            if found is None:
                return StorageLease(bucket, 1, owner, bucket.create(NAME, _content(1, owner, 0)))
            if found.owner.is_released or (state := state_by_process(found.owner)) == "dead":
                return _take_over(bucket, found, owner)
            if seen is None and state == "unknown":
                seen = found
                log.warning(
                    "%s was written by %s; waiting up to %.0f s for a sign of life",
                    bucket.address,
                    found.owner.describe(),
                    expiry_s,
                )
            elif state == "alive" or (seen is not None and found.version != seen.version):
                raise LeaseError(refusal(found.owner, what=bucket.address))
            elif time.monotonic() - started > expiry_s:
                return _take_over(bucket, found, owner)
        except ChangedError:
            seen, started = None, time.monotonic()
            continue  # another process was faster
        time.sleep(min(_POLL_S, expiry_s / 4))


def owner_of(bucket: Bucket) -> Owner | None:
    """Who may write the run now, alive or not; None if nobody. LeaseError if the object cannot be read."""
    found = _read(bucket)
    return None if found is None or found.owner.is_released else found.owner


def _take_over(bucket: Bucket, found: _Found, owner: Owner) -> StorageLease:
    number = found.number + 1
    return StorageLease(bucket, number, owner, bucket.replace(NAME, _content(number, owner, 0), version=found.version))


def _content(number: int, owner: Owner, beat: int) -> bytes:
    return json.dumps({"number": number, "owner": asdict(owner), "beat": beat}).encode()


def _read(bucket: Bucket) -> _Found | None:
    try:
        content, version = bucket.read(NAME)
    except MissingError:
        return None
    try:
        value = json.loads(content)
        number = value["number"]
        if type(number) is not int or not 0 < number < 10**9:
            raise ValueError(f"number={number!r}")
        return _Found(number, owner_from(value["owner"]), version)
    except (ValueError, KeyError, TypeError) as error:
        raise LeaseError(
            f"{bucket.address}/{NAME} cannot be read as the owner of the run ({error}). If no process trains it, delete it."
        ) from None
