"""Copies published checkpoints to object storage in the background, and fetches the newest one to an empty machine.

    start     rank 0: take the storage's lease -> fetch the newest step if it is newer than the folder's -> verify -> publish here
    training  a save becomes durable -> `offer` -> thread: upload files, manifest last -> pointer -> records -> delete old steps
    end       `finish` waits for the last copy

A copy never delays a step: if the next save is durable before a copy began, the older step is left out, unless keep_every_steps
keeps it. A failed copy is reported and tried again; it ends the run only with `checkpoint.on_storage_failure: stop`. Uploads read
the files of the disk in parts, so memory is bounded (`data.bucket.bucket`). The thread dies with its process: a killed copy has
no manifest, so no reader takes it for a checkpoint, and the next owner of the run deletes it.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.bucket import run_copy
from data.bucket.bucket import Bucket, UnreachableError
from data.bucket.run_copy import StoredStep
from data.system import disk
from data.system.retry import wait_s
from recipes.schema import checkpoint_steps as steps
from recipes.schema import units
from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.errors import CheckpointError, StratumError
from recipes.schema.manifest import Manifest
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import CHECKPOINTS, METRICS, name_of
from recipes.schema.storage_rules import storage_of
from train.checkpoint import offline, publishing
from train.checkpoint.saving import Event, Peers
from train.parallel.mesh import Mesh
from train.resilience.storage_lease import StorageLease, take

log = logging.getLogger(__name__)

_AGAIN_S = 300.0
"""Time after a failed copy until it is tried again, if no newer checkpoint comes first."""
_CLOSE_S = 120.0
"""How long a failing run waits for an unfinished copy."""
_REPORT_S = 30.0
"""Time between messages during a long wait."""
_LOST = "belongs to another process now"
_SIGN_OF_LIFE_S = 2.0
"""Time between signs of life to the other ranks: less than any sensible launch.timeout_s."""


class StorageCopy:
    """Copies the checkpoints of one run to storage. Rank 0 has one; its methods are not collective and do not raise."""

    def __init__(self, bucket: Bucket, lease: StorageLease, *, run: Path, config: CheckpointConfig) -> None:
        self.bucket = bucket
        self.error: str | None = None
        """Why the last copy failed; None after a copy that succeeded."""
        self._lease, self._run, self._config = lease, run, config
        self._pending: list[Path] = []
        self._current: Path | None = None
        self._again_at = 0.0
        self._is_closing = False
        self._events: list[Event] = []
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._copy_all, name="storage copy", daemon=True)
        self._thread.start()

    def offer(self, path: Path) -> None:
        """Copy a published checkpoint as soon as possible. Of older ones that wait, only multiples of keep_every_steps stay."""
        with self._wake:
            every = self._config.keep_every_steps
            self._pending = [one for one in self._pending if every and steps.step_of(one) % every == 0]
            self._pending = [one for one in self._pending if one != path] + [path]
            self._again_at = 0.0
            self._wake.notify_all()

    def needed(self) -> set[int]:
        """Steps whose files must stay on the disk, because they are being copied or will be."""
        with self._wake:
            return {steps.step_of(path) for path in [*self._pending, *([self._current] if self._current else [])]}

    def collect(self) -> list[Event]:
        """Events since the last call: `storage_fetch`, `storage_copy`, `storage_retried`, `storage_failed`, `warning`."""
        with self._wake:
            news, self._events = self._events, []
        return news

    def note(self, event: Event) -> None:
        """Record an event."""
        with self._wake:
            self._events.append(event)

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until everything is copied or has failed once more. timeout_s: give up after this time; None: never."""
        with self._wake:
            self._is_closing, self._again_at = True, 0.0
            self._wake.notify_all()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._thread.is_alive():
            left = _REPORT_S if deadline is None else min(_REPORT_S, deadline - time.monotonic())
            if left <= 0:
                log.warning("the copy to %s did not finish in %.0f s and is abandoned", self.bucket.address, timeout_s)
                return
            self._thread.join(left)
            if (current := self._current) is not None and self._thread.is_alive():
                log.warning("waiting until %s is copied to %s", current.name, self.bucket.address)

    def close(self, *, has_failed: bool) -> None:
        """At the end of a run: finish, copy the last lines of its records, give up the lease."""
        self.finish(_CLOSE_S if has_failed else None)
        if not self._thread.is_alive():
            try:
                if self._lease.renew():
                    run_copy.copy_records(self.bucket, self._run)
            except (StratumError, OSError) as error:
                log.warning("the records of %s were not copied: %s", self._run, error)
        self._lease.release()

    def _copy_all(self) -> None:
        while (path := self._next()) is not None:
            is_copied = self._copy(path)
            with self._wake:
                self._current = None
                if not is_copied and not self._is_closing and not self._lease.is_lost:
                    newer = any(steps.step_of(one) > steps.step_of(path) for one in self._pending)
                    every = self._config.keep_every_steps
                    if not newer or (every and steps.step_of(path) % every == 0):
                        self._pending.append(path)
                    self._again_at = 0.0 if newer else time.monotonic() + _AGAIN_S

    def _next(self) -> Path | None:
        """The newest waiting checkpoint; None at the end. Waits for one."""
        with self._wake:
            while not self._lease.is_lost:
                rest = self._again_at - time.monotonic()
                if self._pending and rest <= 0:
                    self._current = max(self._pending, key=steps.step_of)
                    self._pending.remove(self._current)
                    return self._current
                if self._is_closing:
                    return None
                self._wake.wait(min(rest, _REPORT_S) if self._pending else _REPORT_S)
            if self.error is None or _LOST not in self.error:
                self.error = f"{self.bucket.address} {_LOST}; this process copies nothing more there."
                step = max((steps.step_of(path) for path in steps.steps_in(self._run / CHECKPOINTS)), default=0)
                self._events.append(Event("storage_failed", step, {"error": self.error}))
            return None

    def _copy(self, path: Path) -> bool:
        """Copy one checkpoint, with retries. -> whether it is in the storage now."""
        step, started = steps.step_of(path), time.monotonic()
        for failures in range(1, self._config.retries + 2):
            try:
                stored = run_copy.publish(self.bucket, path, owner=self._lease.number, may_publish=self._lease.renew)
            except Exception as error:  # whatever it is, it must neither end this thread nor stay unseen
                is_last = failures > self._config.retries or not isinstance(error, UnreachableError)
                if is_last:
                    why = str(error) if isinstance(error, StratumError | OSError) else repr(error)
                    self.error = f"step {step:,} was not copied to {self.bucket.address}: {why}"
                    self.note(Event("storage_failed", step, {"error": self.error}))
                    return False
                pause = wait_s(failures, first_s=self._config.retry_wait_s)
                self.note(Event("storage_retried", step, {"error": str(error), "wait_s": pause}))
                time.sleep(pause)
                continue
            self.error = None
            seconds, size = time.monotonic() - started, sum(stored.sizes.values())
            place = f"{self.bucket.address}/{CHECKPOINTS}/{stored.name}"
            self.note(Event("storage_copy", step, {"path": place, "seconds": seconds, "bytes": size}))
            try:
                self._tidy(stored)
            except Exception as error:  # as above
                self.note(Event("warning", step, {"text": f"{self.bucket.address} could not be tidied up: {error}"}))
            return True
        raise AssertionError("the last try returns")

    def _tidy(self, newest: StoredStep) -> None:
        """After a copy: move the pointer, copy the records, delete steps that are no longer kept."""
        number, config = self._lease.number, self._config
        there = run_copy.steps_in(self.bucket)
        published = [stored for stored in there if stored.has_manifest]
        if published:
            run_copy.point_at(self.bucket, published[-1].name, owner=number)
        run_copy.copy_records(self.bucket, self._run)
        surplus = run_copy.surplus(
            there, keep_last=config.keep_last, keep_every=config.keep_every_steps, owner=number, copying=newest.step
        )
        for stored in surplus:
            run_copy.delete(self.bucket, stored)


@contextmanager
def storage_copy(recipe: Recipe, run: Path, *, mesh: Mesh) -> Iterator[StorageCopy | None]:
    """Open a run's storage and fetch what this machine lacks. Entering is collective over the world, leaving is not.

    -> on rank 0 the copy, if the recipe has a storage; else None. Raises on every rank: LeaseError if another process trains the
    run, StorageError, CheckpointError.
    """
    address = storage_of(recipe)
    if address is None:
        yield None
        return
    copy = with_signs_of_life(Peers(mesh.saving), lambda: _open(recipe, run, address))
    is_whole = False
    try:
        yield copy
        is_whole = True
    finally:
        if copy is not None:
            copy.close(has_failed=not is_whole)


def with_signs_of_life[T](peers: Peers, act: Callable[[], T]) -> T | None:
    """Rank 0 does something that may take hours; the others wait without a time-out. -> its value on rank 0, else None.

    Collective over the world. Raises on every rank what `act` raises.
    """
    found: list[T | Exception] = []

    def run() -> None:
        try:
            found.append(act())
        except OSError as error:
            found.append(CheckpointError(f"{error.filename or 'the disk'}: {error.strerror or error}."))
        except Exception as error:  # raised on every rank below
            found.append(error)

    thread = threading.Thread(target=run, name="storage wait", daemon=True)
    if peers.rank == 0:
        thread.start()
    while True:
        outcome = None
        if peers.rank == 0:
            thread.join(_SIGN_OF_LIFE_S)
            if not thread.is_alive():
                outcome = found[0] if isinstance(found[0], Exception) else "done"
        outcome = peers.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == "done":
            return found[0] if found and not isinstance(found[0], Exception) else None


def _open(recipe: Recipe, run: Path, address: str) -> StorageCopy:
    """On rank 0: the lease, the newest checkpoint, and a copy that begins with the checkpoints that only this disk has."""
    bucket = Bucket(address)
    lease = take(bucket)
    try:
        folder = run / CHECKPOINTS
        good, notes = run_copy.candidates(bucket)
        if good and recipe.checkpoint.resume == "never":
            raise CheckpointError(
                f"checkpoint.resume=never, but {address} already has step {good[0][0].step:,}. Choose another run.name, or "
                f"checkpoint.resume=auto to continue."
            )
        if folder.is_dir():
            publishing.clean_up(folder)
        here = {manifest.step: manifest for _, manifest in steps.candidates(folder)[0]}
        event = fetch_newest(bucket, run, good=good, notes=notes, newer_than=max(here, default=-1))
        for note in notes:
            log.warning(note)
        if notes and not good and not here:
            lines = "\n  ".join(notes)
            raise CheckpointError(
                f"no checkpoint in {address} is complete:\n  {lines}\nRestore one, or choose another run.name."
            )
        copy = StorageCopy(bucket, lease, run=run, config=recipe.checkpoint)
        if event is not None:
            copy.note(event)
        there = {stored.step: manifest for stored, manifest in good}
        every, newest = recipe.checkpoint.keep_every_steps, max({*here, *there}, default=0)
        for step, manifest in sorted(here.items()):
            is_kept = step == newest or (every and step % every == 0)
            if is_kept and there.get(step) != manifest:
                copy.offer(folder / name_of(step))
        return copy
    except BaseException:
        lease.release()
        raise


def fetch_newest(
    bucket: Bucket, run: Path, *, good: list[tuple[StoredStep, Manifest]], notes: list[str], newer_than: int
) -> Event | None:
    """Fetch the newest step after `newer_than` that verifies, with the records that belong to it. -> the event, or None.

    good: as from `run_copy.candidates`. Steps whose fingerprints differ after the download are skipped and noted. Raises
    StorageError, CheckpointError (no space), OSError.
    """
    for stored, manifest in good:
        if stored.step <= newer_than:
            break
        started = time.monotonic()
        aside = _fetch_aside(bucket, stored, manifest, run / CHECKPOINTS, notes)
        if aside is not None:
            # Before the step is published: a start that is cut off in between fetches both again. The other way round, the next
            # copy would replace the storage's metrics.jsonl by the shorter one of this disk.
            _fetch_metrics(bucket, run, step=stored.step)
            path = _publish(aside, run / CHECKPOINTS, step=stored.step)
            fields = {"path": str(path), "seconds": time.monotonic() - started, "bytes": manifest.bytes}
            return Event("storage_fetch", stored.step, fields | {"storage": bucket.address})
    if not (run / METRICS).exists():
        run.mkdir(parents=True, exist_ok=True)
        run_copy.fetch_record(bucket, METRICS, run / METRICS)
    return None


def fetch_step(bucket: Bucket, stored: StoredStep, manifest: Manifest, folder: Path, notes: list[str]) -> Path | None:
    """Fetch one step into a folder of checkpoints and publish it there once its fingerprints agree. -> its path, or None and a
    note if they do not. Raises as `fetch_newest`."""
    aside = _fetch_aside(bucket, stored, manifest, folder, notes)
    return None if aside is None else _publish(aside, folder, step=stored.step)


def _fetch_aside(bucket: Bucket, stored: StoredStep, manifest: Manifest, folder: Path, notes: list[str]) -> Path | None:
    """Fetch one step into a temporary folder and verify it. -> that folder, or None and a note."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < manifest.bytes:
        raise CheckpointError(
            f"step {stored.step:,} of {bucket.address} needs {units.size(manifest.bytes)}, but {folder} has "
            f"{units.size(free)} free. Free some space, or use another folder (run.folder; TMPDIR for `verify`)."
        )
    aside = publishing.unused(disk.aside_of(folder / name_of(stored.step)))
    disk.make_folder(aside)
    log.warning("fetching step %d (%s) from %s", stored.step, units.size(manifest.bytes), bucket.address)
    try:
        run_copy.fetch(bucket, stored, manifest, aside)
        problems = offline.verify(aside, lambda _bytes: None)
    except BaseException:
        disk.remove_tree(aside)
        raise
    if problems:
        disk.remove_tree(aside)
        notes.append(f"skipped: {bucket.address}/{CHECKPOINTS}/{stored.name} is damaged: {problems[0]}")
        return None
    return aside


def _publish(aside: Path, folder: Path, *, step: int) -> Path:
    final, _ = publishing.publish_step(aside, folder / name_of(step))
    publishing.point_at(folder, final.name)
    return final


def _fetch_metrics(bucket: Bucket, run: Path, *, step: int) -> None:
    """Replace metrics.jsonl by the storage's, which ends at the fetched step. Lines of this disk only go to another file."""
    path, fetched = run / METRICS, run / f".{METRICS}.fetched"
    fetched.unlink(missing_ok=True)
    if not run_copy.fetch_record(bucket, METRICS, fetched):
        return
    if path.exists() and not is_prefix(path, fetched):
        disk.rename(path, run / f"metrics-before-step-{step}-{os.getpid()}.jsonl")
    disk.rename(fetched, path)


def is_prefix(path: Path, longer: Path) -> bool:
    """Whether a file begins with the whole content of another."""
    with path.open("rb") as a, longer.open("rb") as b:
        while block := a.read(1 << 20):
            if b.read(len(block)) != block:
                return False
    return True
