"""Random state in a checkpoint: saved by each rank, restored at the same layout, derived from the seed at another layout.

random.RANK.torch   random.RANK.cuda   random.RANK.tracker.NAME      torch's generators, and those of Megatron's tracker
"""

import train.megatron  # noqa: F401  prepares Megatron before the imports below

# isort: split
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint
from train.checkpoint.files import Piece, Reader
from train.checkpoint.manifest import DTYPE_NAMES, describe_layout
from train.parallel.mesh import Mesh, seed_random_state

RANDOM = "random."
_SEED_STRIDE = 1_000_003
"""Difference of the seeds of two steps: a prime far above the few thousand that Megatron adds for tensor and pipeline ranks."""


def random_states(mesh: Mesh) -> dict[str, torch.Tensor]:
    """Random states of this rank by name: torch's own for its device, and Megatron's tracker."""
    states = {"torch": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    tracked = get_cuda_rng_tracker().get_states()
    return states | {f"tracker.{name}": state for name, state in tracked.items() if isinstance(state, torch.Tensor)}


@contextmanager
def random_state_kept(mesh: Mesh) -> Iterator[None]:
    """Restore this rank's random state at the end of the block. Building a model draws random numbers."""
    states, tracked = random_states(mesh), dict(get_cuda_rng_tracker().get_states())
    try:
        yield
    finally:
        torch.set_rng_state(states["torch"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], mesh.device)
        get_cuda_rng_tracker().set_states(tracked)


def random_pieces(mesh: Mesh) -> list[Piece]:
    """The random state that this rank saves."""
    return [
        Piece(f"{RANDOM}{mesh.rank:05d}.{name}", (state.numel(),), (0,), (state.numel(),), state.contiguous())
        for name, state in random_states(mesh).items()
    ]


def restore_random_state(reader: Reader, mesh: Mesh) -> None:
    """Restore the saved random state, after comparing fingerprints, if the layout and the kind of device are the same.

    Otherwise no saved state fits, because a rank draws numbers for other parts of the model. Each rank is then seeded from the
    saved seed and step: the same at each resume from this checkpoint, but not the seed of the run's start. A checkpoint of
    weights only has no random state; then the current state is not changed.

    Not collective. Raises CheckpointError if the state is not what was saved.
    """
    manifest = reader.manifest
    names = {name for name in manifest.tensors if name.startswith(RANDOM)}
    if not names:
        return
    was_on_gpu = any(name.endswith(".cuda") for name in names)
    if describe_layout(manifest.layout) != mesh.layout.describe() or was_on_gpu != (mesh.device.type == "cuda"):
        run = manifest.recipe.get("run")
        seed = run.get("seed") if isinstance(run, dict) else None
        seed_random_state(((seed if isinstance(seed, int) else 0) + _SEED_STRIDE * manifest.step) % 2**31)
        return
    saved = {
        name: _verified_state(reader, f"{RANDOM}{mesh.rank:05d}.{name}", like)
        for name, like in random_states(mesh).items()
    }
    set_random_states(saved, mesh, place=str(reader.folder))


def set_random_states(saved: dict[str, torch.Tensor], mesh: Mesh, *, place: str) -> None:
    """The inverse of `random_states`. place: where they come from, for CheckpointError if this torch version refuses them."""
    tracked = dict(get_cuda_rng_tracker().get_states())
    try:
        for name, state in saved.items():
            if name == "torch":
                torch.set_rng_state(state)
            elif name == "cuda":
                torch.cuda.set_rng_state(state, mesh.device)
            else:
                tracked[name.removeprefix("tracker.")] = state
    except RuntimeError as error:
        raise CheckpointError(f"{place}: this torch version cannot use the random state: {error}") from error
    get_cuda_rng_tracker().set_states(tracked)


def _verified_state(reader: Reader, key: str, like: torch.Tensor) -> torch.Tensor:
    """A saved state with the dtype and size of `like`, after its fingerprint was compared with the manifest's."""
    record = reader.manifest.tensors.get(key)
    if record is None or (record.dtype, record.shape) != (DTYPE_NAMES[like.dtype], (like.numel(),)):
        found = "is missing" if record is None else f"is {record.dtype} {record.shape}"
        raise CheckpointError(
            f"{reader.folder} is damaged: {key} {found}, {DTYPE_NAMES[like.dtype]} {(like.numel(),)} is expected."
        )
    saved = torch.empty(like.numel(), dtype=like.dtype)
    reader.read(key, offset=[0], into=saved)
    sums = fingerprint.of_box(saved, whole=record.shape, offset=(0,), shape=record.shape)
    if fingerprint.text(sums) != record.fingerprint:
        raise CheckpointError(f"{reader.folder} is damaged: {key} is not what was saved (its fingerprint differs).")
    return saved
