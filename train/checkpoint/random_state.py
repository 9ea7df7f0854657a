"""Random state in a checkpoint: saved rank by rank, taken up where the degrees are the same, derived where they are not.

random.RANK.torch   random.RANK.cuda   random.RANK.tracker.NAME      torch's generators, and those of Megatron's tracker
"""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from train.checkpoint.files import Piece, Reader
from train.checkpoint.manifest import describe_layout
from train.parallel.mesh import Mesh, seed_random_state

RANDOM = "random."
_SEEDS_APART = 1_000_003
"""Between the seeds of two steps; Megatron adds a few thousand for tensor and pipeline ranks."""


def random_states(mesh: Mesh) -> dict[str, torch.Tensor]:
    """Random states of this rank by name: torch's own for its device, and Megatron's tracker."""
    states = {"torch": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    tracked = get_cuda_rng_tracker().get_states()
    return states | {f"tracker.{name}": state for name, state in tracked.items() if isinstance(state, torch.Tensor)}


def random_pieces(mesh: Mesh) -> list[Piece]:
    """What this rank saves."""
    return [
        Piece(f"{RANDOM}{mesh.rank:05d}.{name}", (state.numel(),), (0,), (state.numel(),), state.contiguous())
        for name, state in random_states(mesh).items()
    ]


def restore_random_state(reader: Reader, mesh: Mesh) -> None:
    """Take up the saved random state where the layout is the same. At another no state fits: a rank draws for other parts of the
    model, so each is seeded anew, from the saved run's seed and step alone: the same again at each resume from there, and not
    what the run began with."""
    manifest = reader.manifest
    if describe_layout(manifest.layout) != mesh.layout.describe():
        run = manifest.recipe.get("run")
        seed = run.get("seed") if isinstance(run, dict) else None
        seed_random_state(((seed if isinstance(seed, int) else 0) + _SEEDS_APART * manifest.step) % 2**31)
        return
    tracked = dict(get_cuda_rng_tracker().get_states())
    for name, state in random_states(mesh).items():
        key = f"{RANDOM}{mesh.rank:05d}.{name}"
        record = reader.manifest.tensors.get(key)
        if record is None or record.shape != (state.numel(),):
            continue
        saved = torch.empty_like(state)
        reader.read(key, offset=[0], into=saved)
        if name == "torch":
            torch.set_rng_state(saved)
        elif name == "cuda":
            torch.cuda.set_rng_state(saved, mesh.device)
        else:
            tracked[name.removeprefix("tracker.")] = saved
    get_cuda_rng_tracker().set_states(tracked)
