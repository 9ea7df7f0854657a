"""When to save, which checkpoints to keep and which one to resume from: the folder `checkpoints/` of one run.

checkpoints/latest            name of the newest whole checkpoint, replaced atomically and last
checkpoints/step_00000100/    a complete checkpoint (train.checkpoint.storage)
checkpoints/.step_...         being written or deleted (train.checkpoint.publishing)

A save is requested at a step boundary (`request`). A background save has three stages: requested; staged, before the next
optimizer update (`before_update`); durable, noticed at a later step boundary (`collect`). Only one save runs at a time: the
next request waits for it.
"""

import logging
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.system import disk
from recipes.schema import checkpoint_steps as steps
from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.checkpoint_steps import checkpoint_at as checkpoint_at
from recipes.schema.errors import CheckpointError, NumericsError, StratumError
from recipes.schema.run_folder import POINTER
from train.checkpoint import finite, publishing, storage
from train.checkpoint.copying import StorageCopy, with_signs_of_life
from train.checkpoint.manifest import Manifest, RunState
from train.checkpoint.saving import Event, Memory, Peers, Save, Snapshot
from train.checkpoint.staging import Staging
from train.engine import Engine
from train.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_CLOSE_S = 120.0
"""How long a failing run waits for an unfinished save; other ranks of that save may be dead."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The checkpoint that a run resumed from, and why newer ones were skipped."""

    path: Path
    manifest: Manifest
    notes: list[str] = field(default_factory=list)
    """Problems found: a torn pointer, damaged newer checkpoints."""


class CheckpointFolder:
    """The checkpoints of one run. Methods that are collective say so; the others only read the disk."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        remedies: str = "a lower optim.lr",
        copy: StorageCopy | None = None,
    ) -> None:
        """remedies: `finite.remedies_of` the run's recipe, for advice about NaN and infinity. copy: of rank 0, if the run has a
        storage."""
        self._remedies = remedies
        self.folder = folder
        self.config = config
        self._copy = copy
        self.saved_step: int | None = None
        """Step of the newest checkpoint that is durable, as far as this process knows."""
        self.save_s: float | None = None
        """Seconds the last save took from request to durable."""
        self._staging = Staging()
        self._memory: Memory = {}
        self._memory_step: int | None = None
        self._save: Save | None = None
        self._reported = 0
        self._pending: list[Event] = []
        self._warned = False
        self._warned_steps: set[str] = set()
        """Steps that could not be deleted and were already warned about."""

    def path_of(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / steps.name_of(step)

    def published(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return steps.steps_in(self.folder)

    def oldest_step(self) -> int:
        """Step of the oldest published checkpoint; 0 without one. Not collective."""
        return min((steps.step_of(path) for path in self.published()), default=0)

    def is_due(self, step: int) -> bool:
        """Whether the recipe asks for a save after `step`."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint by manifest and file sizes (`steps.newest_in`). Not collective."""
        return steps.newest_in(self.folder)

    def survey(self, mesh: Mesh) -> tuple[list[tuple[Path, Manifest]], list[str]]:
        """The result of `steps.candidates` on rank 0, for every rank. Rank 0 first removes files of killed saves. Collective."""
        peers = Peers(mesh.saving)
        outcome: Any = None
        if peers.rank == 0:
            try:
                if self.folder.is_dir():
                    self._warn_of(publishing.clean_up(self.folder))
                outcome = steps.candidates(self.folder)
            except OSError as error:
                outcome = CheckpointError(f"{self.folder} cannot be read: {error}")
            except CheckpointError as error:
                outcome = error
        outcome = peers.broadcast(outcome)
        if isinstance(outcome, CheckpointError):
            raise outcome
        return outcome

    def resume(self, engine: Engine) -> LoadedCheckpoint | None:
        """Fill the engine from the newest checkpoint that verifies; None if the run has never saved one. Collective.

        A checkpoint that cannot be loaded is skipped and noted in the result. Raises CheckpointError if none can be loaded.
        """
        good, notes = self.survey(engine.mesh)
        for path, _ in good:
            try:
                manifest = self.load(engine, path)
            except CheckpointError as error:
                if storage.OTHER_MODEL in str(error):
                    raise
                notes.append(str(error))
                continue
            return LoadedCheckpoint(path, manifest, notes)
        steps.refuse_lost_checkpoints(self.folder, notes)
        return None

    def load(self, engine: Engine, path: Path) -> Manifest:
        """Fill weights, optimizer and random state from `path`, and verify that they are what was saved. Collective."""
        manifest = storage.read_training(path, engine)
        self._memory.clear()
        self.saved_step = manifest.step
        return manifest

    def save(self, engine: Engine, state: RunState) -> Path:
        """Write a checkpoint and wait until it is durable. Collective over the world.

        Raises CheckpointError on every rank if any rank could not write; earlier checkpoints are not touched.
        """
        self.request(engine, state, background=False)
        assert self._save is not None
        if self._save.error is not None:
            raise _error_of(self._save)
        return Path(next(event.fields["path"] for event in self._save.events if event.kind == "save"))

    def request(
        self,
        engine: Engine,
        state: RunState,
        *,
        stream: Mapping[str, torch.Tensor] | None = None,
        background: bool = True,
    ) -> None:
        """Save the engine's current state. Waits for the previous save; a background save then returns at once. Collective.

        stream: state of the stream (`train.checkpoint.stream_state`).
        """
        self.wait()
        if background:
            self.check()  # every rank has waited, so all of them know whether the previous save failed
        self._pending += self.collect()
        peers = Peers(engine.mesh.saving)
        step = state.step
        snapshot = storage.snapshot_of(engine, state, stream)
        if self._memory_step is not None and self._memory_step >= (snapshot.manifest.updates or 0):
            self._memory.clear()  # no update since the last save: unchanged tensors are correct, not stale
        self._memory_step = snapshot.manifest.updates
        self._reported = 0
        self._save = Save(
            snapshot,
            peers=peers,
            memory=self._memory,
            staging=self._staging if background else None,
            prepare=lambda: self._make_room(step, snapshot),
            publish=self._publish,
            delete_old=lambda: self._retain(step),
            advice=lambda: finite.advice_after_not_finite(self.folder, remedies=self._remedies),
            retries=self.config.retries,
            retry_wait_s=self.config.retry_wait_s,
        )
        if background:
            threading.Thread(target=self._save.run, name=f"save of step {step}", daemon=True).start()
        else:
            self._save.run()
            self._note_end()

    def before_update(self) -> None:
        """Wait until the running save has copied what the optimizer is about to change. Not collective."""
        if self._save is not None:
            self._save.staged.wait()

    @property
    def is_writing(self) -> bool:
        """Whether this rank has an unfinished save."""
        return self._save is not None and not self._save.done.is_set()

    @property
    def has_failed(self) -> bool:
        """Whether this rank's last save failed."""
        return self._save is not None and self._save.done.is_set() and self._save.error is not None

    def collect(self) -> list[Event]:
        """Save events since the last call. Does not raise: see `check`."""
        news, self._pending = self._pending, []
        if self._save is not None:
            self._note_end()
            events = list(self._save.events)
            news, self._reported = news + events[self._reported :], len(events)
        return news + (self._copy.collect() if self._copy is not None else [])

    def check(self, *, always: bool = False) -> None:
        """Raise CheckpointError if the last save failed and `checkpoint.on_failure` (or `always`) says to stop. Raise
        NumericsError in any case if the state contains NaN or infinity.

        Call it only after all ranks have agreed that none is writing and one has failed. A save fails on all ranks, so all raise.
        """
        save = self._save
        if save is None or save.error is None:
            return
        if save.is_numeric or always or self.config.on_failure != "continue":
            raise _error_of(save)

    @property
    def storage_has_failed(self) -> bool:
        """Whether a copy to storage has failed on this rank and `checkpoint.on_storage_failure` says to stop."""
        return self._copy is not None and self._copy.error is not None and self.config.on_storage_failure == "stop"

    def check_storage(self) -> None:
        """Raise CheckpointError because of `storage_has_failed`. Call it only after all ranks have agreed that one has failed."""
        error = self._copy.error if self._copy is not None else None
        raise CheckpointError(
            f"{error or 'rank 0 could not copy to run.storage.'} The checkpoints in {self.folder} are intact."
        )

    def finish_storage(self, mesh: Mesh) -> None:
        """Wait until the last checkpoint is copied to storage, or could not be. Collective: a copy may take longer than
        launch.timeout_s, so the ranks without one must not wait for rank 0 in another operation."""
        with_signs_of_life(Peers(mesh.saving), lambda: self._copy.finish() if self._copy is not None else None)

    def advice(self, mesh: Mesh) -> str:
        """Advice about NaN or infinity that names the newest finite checkpoint. Waits for a running save. Collective."""
        self.wait()
        peers = Peers(mesh.saving)
        return peers.broadcast(
            finite.advice_after_not_finite(self.folder, remedies=self._remedies) if peers.rank == 0 else None
        )

    def is_first_warning(self) -> bool:
        """True at the first call only: a warning about the duration of saves is given once."""
        first, self._warned = not self._warned, True
        return first

    def wait(self) -> None:
        """Wait until the running save has succeeded or failed."""
        if self._save is not None:
            self._save.done.wait()
            self._note_end()

    def close(self) -> None:
        """At the end of a failed run: give a running save time to become durable."""
        if self._save is not None and not self._save.done.wait(_CLOSE_S):
            log.warning("the save of step %d did not finish in %.0f s and is abandoned", self._save.step, _CLOSE_S)

    def _note_end(self) -> None:
        save = self._save
        if save is not None and save.done.is_set() and save.error is None and self.saved_step != save.step:
            self.saved_step = save.step
            self.save_s = next((e.fields["seconds"] for e in save.events if e.kind == "save"), None)

    def _publish(self, unfinished: Path, manifest: Manifest) -> dict[str, Any]:
        """On rank 0: rename the complete checkpoint to its final name and move the pointer to it."""
        final, left = publishing.publish_step(unfinished, self.path_of(manifest.step))
        self._warn_of(left)
        try:
            publishing.point_at(self.folder, final.name)
        except OSError as error:  # only a hint for people: the step itself is durable
            reason = error.strerror or error
            log.warning("%s cannot be replaced (%s); the newest step is %s", self.folder / POINTER, reason, final.name)
        if self._copy is not None:
            self._copy.offer(final)
        return {"path": str(final)}

    def _make_room(self, step: int, snapshot: Snapshot) -> Path:
        """Before writing: check that the folder is writable and the disk has enough space. -> the new folder to write into."""
        needed = estimated_bytes(snapshot)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._warn_of(publishing.clean_up(self.folder))
            unfinished = publishing.unused(disk.aside_of(self.path_of(step)))
            disk.make_folder(unfinished)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise CheckpointError(f"cannot save into {self.folder}: {error.strerror or error}.") from error
        if free < needed:
            disk.remove_tree(unfinished)
            raise CheckpointError(
                f"cannot save into {self.folder}: about {needed:,} bytes needed, {free:,} free, {needed - free:,} too few. Free "
                f"some space or lower checkpoint.keep_last."
            )
        return unfinished

    def _retain(self, newest_step: int) -> None:
        """On rank 0: delete all checkpoints except the newest `keep_last` and those of `keep_every_steps`.

        With a storage and `keep_local`, keep only the newest of those and what is not copied yet."""
        every, keep = self.config.keep_every_steps, self.config.keep_last
        needed = self._copy.needed() if self._copy is not None else set()
        if self._copy is not None and self.config.keep_local is not None:
            every, keep = 0, self.config.keep_local
        published = self.published()
        numbers = sorted({steps.step_of(path) for path in published})
        kept = {newest_step, *numbers[-keep:], *needed}
        for path in published:
            step = steps.step_of(path)
            if step not in kept and not (every and step % every == 0):
                self._warn_of(publishing.delete(path))

    def _warn_of(self, left: list[publishing.NotDeleted]) -> None:
        """Warn once for each step that cannot be deleted. The run continues, but the step uses disk space."""
        for one in left:
            step = one.path.name.removeprefix(".").split(".")[0]
            if step not in self._warned_steps:
                self._warned_steps.add(step)
                log.warning(
                    "%s cannot be deleted (%s) and still uses disk space. Remove it by hand.",
                    one.path,
                    f"{one.error.filename or one.path}: {one.error.strerror or one.error}",
                )


def _error_of(save: Save) -> StratumError:
    """The exception for a failed save."""
    if save.is_numeric:
        return NumericsError(save.error)
    return CheckpointError(f"{save.error} The run's earlier checkpoints are intact.")


def estimated_bytes(snapshot: Snapshot) -> int:
    """Bytes of the whole checkpoint, estimated from this rank's share (all ranks have about equal shares)."""
    layout = snapshot.manifest.layout
    return sum(piece.bytes for piece in snapshot.pieces) * layout.get("world", 1)
