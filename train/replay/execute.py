"""One step of a run, computed in this process from a checkpoint before it, with statistics of everything on the way.

    checkpoint at or before N - 1 --steps--> weights before step N --forward, backward--> gradients --update--> weights after

Statistics are of whole tensors: the process holds the whole model, whatever the run's layout was. Each has a digest of its bits.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from data.order.left_out import left_out
from data.stream import Dataset
from recipes.schema.checkpoint_steps import candidates
from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.facts import named
from recipes.schema.ledger import Ledger
from recipes.schema.parallel import ParallelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import CHECKPOINTS
from recipes.schema.schedule import learning_rate_factor
from train.build import build_engine, check, mesh_of
from train.checkpoint import fingerprint
from train.checkpoint.storage import read_training
from train.engine import Engine
from train.megatron import choose_device, use_device
from train.model.initial import global_names
from train.native.kernel_versions import describe
from train.record.stopwatch import Stopwatch
from train.resilience.spikes import spike_watch
from train.step import train_step


@dataclass(frozen=True)
class Statistic:
    """One tensor of the step."""

    kind: str
    """`weights before`, `output`, `gradient` or `weights after`, in the order of the computation."""
    name: str
    rms: float
    largest: float
    digest: str


@dataclass(frozen=True)
class Execution:
    """What one execution of a step gave."""

    step: int
    place: str
    """Kernels and layout: digests can only be equal between equal ones."""
    loss: float
    grad_norm: float
    statistics: tuple[Statistic, ...]


def one_process(recipe: Recipe) -> Recipe:
    """The recipe at the layout of one process. RecipeError for objectives other than next_token."""
    if recipe.objective.kind != "next_token":
        raise RecipeError(
            f"objective.kind={recipe.objective.kind}: replay computes steps of objective.kind=next_token only. `stratum trace` "
            f"shows the rows of a step of prepared data."
        )
    return replace(recipe, parallel=ParallelConfig())


def execute(recipe: Recipe, dataset: Dataset, *, run: Path, step: int) -> Execution:
    """Compute step `step`, counted from 1, of the run in folder `run`. recipe: from `one_process`.

    Without a checkpoint before it, all steps are computed from the start. CheckpointError if there are some and none can be read.
    """
    good = [(path, manifest) for path, manifest in candidates(run / CHECKPOINTS)[0] if manifest.step < step]
    initial = None
    if not good and recipe.run.start_from is not None:
        initial = named(recipe.run.start_from).path
    device = choose_device(recipe.run.device)
    use_device(device)
    with mesh_of(recipe, check(recipe, world=1), device=device, rank=0) as mesh:
        engine = build_engine(recipe, mesh, weights=initial)
        first, ledger = 0, Ledger()
        for path, _ in good:
            try:
                manifest = read_training(path, engine)
                first, ledger = manifest.step, manifest.ledger
                break
            except CheckpointError:
                continue
        else:
            if good:
                raise CheckpointError(
                    f"no checkpoint of {run} before step {step} can be read. `stratum checkpoint verify` says why."
                )
        # The run's decisions about spikes again: a step that it skipped must not change the weights here.
        spikes = spike_watch(recipe.run.spikes, ledger)
        statistics: list[Statistic] = []
        for at in range(first, step):
            rows = _rows(recipe, dataset, at)
            rate = recipe.optim.lr * learning_rate_factor(
                recipe.schedule,
                step=at,
                tokens=at * recipe.run.global_rows * recipe.data.row_tokens,
                total_steps=recipe.run.steps,
                tokens_per_step=recipe.run.global_rows * recipe.data.row_tokens,
            )
            take = partial(train_step, engine, rows, step=at, learning_rate=rate, watch=Stopwatch(), spikes=spikes)
            if at + 1 < step:
                take()
                continue
            statistics += _weights(engine, "weights before")
            with _outputs(engine, statistics):
                result = take(before_update=partial(_add_gradients, engine, statistics))
            statistics += _weights(engine, "weights after")
        place = f"{describe(mesh.device) or mesh.device}, {mesh.layout.describe()}"
        return Execution(step, place, float(result.loss), float(result.grad_norm), tuple(statistics))


def of_run(dataset: Dataset, run: Path) -> Dataset:
    """The data without the rows that the run left out."""
    good, _ = candidates(run / CHECKPOINTS)
    return dataset.without(left_out(good[0][1].ledger.left_out)) if good else dataset


def _rows(recipe: Recipe, dataset: Dataset, step: int) -> list[Batch]:
    size, rows = recipe.run.microbatch_rows, recipe.run.global_rows
    return [dataset.training_rows(np.arange(at, at + size)) for at in range(step * rows, (step + 1) * rows, size)]


def _statistic(kind: str, name: str, tensor: torch.Tensor) -> Statistic:
    flat = tensor.detach().reshape(-1)
    wide = flat.double()
    rms, largest = (float(wide.square().mean().sqrt()), float(wide.abs().max())) if len(flat) else (0.0, 0.0)
    digest = fingerprint.text(fingerprint.of_box(flat, whole=flat.shape, offset=(0,), shape=flat.shape))
    return Statistic(kind, name, rms, largest, digest)


def _weights(engine: Engine, kind: str) -> list[Statistic]:
    return [_statistic(kind, name, p) for chunk in engine.chunks for name, p in global_names(chunk.module)]


def _add_gradients(engine: Engine, statistics: list[Statistic]) -> None:
    for chunk in engine.chunks:
        statistics += [_statistic("gradient", n, p.main_grad) for n, p in global_names(chunk.module) if p.requires_grad]


@contextmanager
def _outputs(engine: Engine, statistics: list[Statistic]) -> Iterator[None]:
    """Add each layer's output, all microbatches of the step together, when the block has ended its forward passes."""
    found: dict[str, list[Statistic]] = {}
    handles = []

    def record(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        found.setdefault(name, []).append(_statistic("output", name, first))

    for chunk in engine.chunks:
        for layer in chunk.module.decoder.layers:
            name = f"layer {layer.layer_number - 1}"
            handles.append(layer.register_forward_hook(partial(record, name)))
    before = len(statistics)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    merged = [
        Statistic(
            "output",
            name,
            float(np.sqrt(np.mean([one.rms**2 for one in parts]))),
            max(one.largest for one in parts),
            hashlib.sha256(" ".join(one.digest for one in parts).encode()).hexdigest()[:32],
        )
        for name, parts in found.items()
    ]
    statistics[before:before] = merged
