"""When to save, what to keep, and where to resume: the folder `checkpoints/` of one run.

checkpoints/latest            name of the newest whole checkpoint, replaced atomically and last
checkpoints/step_00000100/    whole (train.checkpoint.storage)
checkpoints/.step_00000150.writing/    not whole: left by a process that died while saving, removed by the next save
"""

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.checkpoint import storage
from train.checkpoint.storage import Manifest
from train.config import CheckpointConfig
from train.engine import Engine
from train.errors import CheckpointError


def checkpoint_at(place: str | Path) -> tuple[Path, Manifest]:
    """The checkpoint a recipe names: a checkpoint folder itself, or the newest of a run's folder; its manifest is checked.

    Raises CheckpointError where there is none, or none is whole.
    """
    path = Path(place)
    if (path / storage.MANIFEST).is_file():
        return path, storage.read_manifest(path)
    for folder in (path / "checkpoints", path):
        found = CheckpointFolder(folder, CheckpointConfig()).newest()
        if found is not None:
            return found
    raise CheckpointError(
        f"{path} is no checkpoint (no {storage.MANIFEST}) and no run that has one. Name a folder like "
        f"runs/NAME or runs/NAME/checkpoints/step_00001000."
    )


class CheckpointFolder:
    """The checkpoints of one run. Collective methods say so; the others only look at the disk."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config

    def path_of(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"step_{step:08d}"

    def whole(self) -> list[Path]:
        """Checkpoints that were published, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir())

    def is_due(self, step: int) -> bool:
        """Whether the recipe asks for a save after `step`."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint whose manifest and file sizes are right, and its manifest; None where there is none.

        The pointer is believed where it names such a checkpoint that is also the newest; a torn or missing pointer
        falls back to looking. Raises CheckpointError where checkpoints are there but none is whole: starting from zero
        would hide the loss of a run.
        """
        problems = []
        for path in reversed(self.whole()):
            try:
                return path, storage.read_manifest(path)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole:\n  "
                + "\n  ".join(problems)
                + f"\nMove {self.folder} away to start from the beginning."
            )
        return None

    def save(
        self,
        engine: Engine,
        *,
        step: int,
        position: int,
        recipe: dict[str, Any],
        data_hash: str,
        tokenizer: str = "",
    ) -> Path:
        """Write a checkpoint, publish it, point at it, drop what retention no longer keeps. Collective over the world.

        Raises CheckpointError on every rank if any rank could not write; the checkpoints that were there stay.
        """
        mesh = engine.mesh
        final = self.path_of(step)
        aside = self.folder / f".{final.name}.writing"
        layout = mesh.layout
        manifest = Manifest(
            step=step,
            position=position,
            tokens=position * engine.row_tokens,
            layout={key: value for key, value in asdict(layout).items() if isinstance(value, int)},
            recipe=recipe,
            data_hash=data_hash,
            tokenizer=tokenizer,
            files={},
            versions=storage.versions(),
        )
        self._on_first_rank(mesh, lambda: self._make_room(aside, engine))
        failure = None
        try:
            storage.write_tensors(aside, engine)
        except CheckpointError as error:
            failure = error
        if mesh.any_rank(failure is not None):
            self._on_first_rank(mesh, lambda: shutil.rmtree(aside, ignore_errors=True))
            raise failure or CheckpointError(f"another rank could not write {aside}; see its message")
        self._on_first_rank(mesh, lambda: self._finish(aside, final, manifest))
        return final

    def load(self, engine: Engine, path: Path) -> None:
        """Fill weights and optimizer state from `path`. Collective over the world."""
        storage.read_tensors(path, engine)

    def _finish(self, aside: Path, final: Path, manifest: Manifest) -> None:
        storage.publish(aside, final, manifest)
        storage.write_pointer(self.folder / "latest", final.name)
        self._retain(manifest.step)

    def _make_room(self, aside: Path, engine: Engine) -> None:
        """Check that the folder can be written and the disk has room, before Megatron starts writing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.writing"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            aside.mkdir()
            probe = aside / f"probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"x")
            probe.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise CheckpointError(
                f"cannot save into {self.folder}: {error.strerror or error}. The run's earlier checkpoints are intact."
            ) from error
        # Weights, fp32 masters and two moments, over all data-parallel ranks; tensor and pipeline shards add up too.
        parameters = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
        needed = 16 * parameters * engine.mesh.layout.tensor * engine.mesh.layout.pipeline
        if free < needed:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"cannot save into {self.folder}: about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free. Free "
                f"some space or lower checkpoint.keep_last; the run's earlier checkpoints are intact."
            )

    def _retain(self, newest_step: int) -> None:
        """Delete checkpoints beyond `keep_last`, except those `keep_every_steps` keeps for good."""
        every = self.config.keep_every_steps
        steps = [(int(path.name.removeprefix("step_")), path) for path in self.whole()]
        for step, path in sorted(steps, reverse=True)[self.config.keep_last :]:
            if step != newest_step and not (every and step % every == 0):
                doomed = path.with_name(f".{path.name}.deleting")
                os.rename(path, doomed)  # a reader never meets a half-deleted checkpoint
                shutil.rmtree(doomed)

    def _on_first_rank(self, mesh: Any, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; every rank learns of its failure and raises. Collective over the world."""
        failure: CheckpointError | None = None
        if mesh.rank == 0:
            try:
                action()
            except CheckpointError as error:
                failure = error
            except OSError as error:
                failure = CheckpointError(f"{self.folder}: {error}")
        if mesh.any_rank(failure is not None):
            raise failure or CheckpointError(f"rank 0 failed while saving into {self.folder}; see its message")
