"""A tiny hybrid and synthetic rows for engine tests: build it in a rank, train a few steps, get exact numbers back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from recipes.schema.data import DataConfig, SourceConfig
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run import RunConfig
from train.build import build_engine, check, mesh_of
from train.checkpoint.storage import read_weights
from train.engine import Engine
from train.model.initial import global_names
from train.parallel.mesh import Mesh
from train.precision.control import Reading
from train.record.stopwatch import Stopwatch
from train.step import train_step

ROW_TOKENS = 64
VOCAB = 256
TINY = ModelConfig(
    pattern="M-M*-M-M*-",
    hidden=64,
    vocab=VOCAB,
    ffn=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mamba_heads=8,
    mamba_head_dim=16,
    mamba_state=16,
    mamba_groups=2,
    mamba_chunk=16,
)
RECIPE = Recipe(
    run=RunConfig(name="tiny", steps=8, global_rows=4, microbatch_rows=1, threads=1),
    model=TINY,
    data=DataConfig(row_tokens=ROW_TOKENS, sources={"none": SourceConfig(path="none")}),
)

GEMMA: dict[str, Any] = {
    "model.pattern": "w-*-w-*-", "model.activation": "geglu", "model.position": "rope", "model.window_tokens": 20,
    "model.attention_softcap": 5.0, "model.logit_softcap": 3.0, "model.norm_offset": 1, "model.post_norms": True,
    "model.scale_embedding": True, "model.tie_embeddings": True, "model.init_std": 0.1,
}  # fmt: skip
"""Changes that make it Gemma 2: low caps and large weights, so that they matter."""


def recipe_with(**changes: Any) -> Recipe:
    """RECIPE with dotted fields changed: recipe_with(**{"parallel.tensor": 2})."""
    recipe: Recipe = with_fields(RECIPE, changes)
    return recipe


def with_fields(group: Any, changes: Mapping[str, Any]) -> Any:
    """A recipe, or a group of one, with dotted fields changed."""
    for key, value in changes.items():
        name, _, inner = key.partition(".")
        group = replace(group, **{name: with_fields(getattr(group, name), {inner: value}) if inner else value})
    return group


def rows_of(step: int, positions: np.ndarray) -> Batch:
    """Synthetic rows: a function of step and position only, with documents of about 30 tokens."""
    tokens = np.stack([np.random.default_rng((step, int(p))).integers(0, VOCAB, ROW_TOKENS + 1) for p in positions])
    ends = np.stack([np.random.default_rng((step, int(p), 1)).random(ROW_TOKENS) < 1 / 30 for p in positions])
    both = torch.from_numpy(tokens)
    return Batch(
        tokens=both[:, :-1].contiguous(),
        labels=both[:, 1:].contiguous(),
        document_index=torch.from_numpy(ends.cumsum(1).astype(np.int32)),
        source=torch.zeros(len(positions), dtype=torch.int32),
        positions=positions,
    )


def masked_rows(step: int, positions: np.ndarray) -> Batch:
    """`rows_of` with some labels learned: of row 0 one, of row 3 all, of the others a fifth and a half."""
    share = {1: 0.2, 2: 0.5, 3: 1.0}
    learned = np.stack(
        [np.random.default_rng((step, int(p), 2)).random(ROW_TOKENS) < share.get(int(p), 0.0) for p in positions]
    )
    learned[positions == 0, 40] = True
    return replace(rows_of(step, positions), learned=torch.from_numpy(learned))


def one_document_rows(tokens: torch.Tensor, labels: torch.Tensor) -> Batch:
    """A batch whose rows are one document each; tokens, labels: [rows, length]."""
    return Batch(
        tokens=tokens,
        labels=labels,
        document_index=torch.zeros(tokens.shape, dtype=torch.int32),
        source=torch.zeros(len(tokens), dtype=torch.int32),
        positions=np.arange(len(tokens)),
    )


def microbatches(
    recipe: Recipe, mesh: Mesh, step: int, *, rows: Callable[[int, np.ndarray], Batch] = rows_of
) -> list[Batch]:
    """This rank's microbatches of a step, distributed as by `data.stream`."""
    size, ranks = recipe.run.microbatch_rows, mesh.layout.data
    starts = range(mesh.data_rank * size, recipe.run.global_rows, ranks * size)
    return [rows(step, np.arange(start, start + size)) for start in starts]


@contextmanager
def engine_of(recipe: Recipe, *, rank: int, world: int) -> Iterator[Engine]:
    """A built engine inside its process groups."""
    torch.set_num_threads(1)
    layout = check(recipe, world=world)
    with mesh_of(recipe, layout, device=torch.device("cpu"), rank=rank) as mesh:
        yield build_engine(recipe, mesh)


def weights_at(rank: int, recipe: Recipe, world: int, folder: Path) -> dict[str, torch.Tensor]:
    """For `run_ranks`: this rank's weights, by name in the whole model, read from a checkpoint."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        chunks = [chunk.module for chunk in engine.chunks]
        read_weights(folder, chunks, groups=engine.mesh.groups)
        return {name: p.detach().clone() for chunk in chunks for name, p in global_names(chunk)}


@dataclass(frozen=True)
class Numbers:
    """Full-precision losses and gradient norms of a few steps."""

    losses: list[float]
    grad_norms: list[float]


def steps_of(
    engine: Engine, recipe: Recipe, steps: range, *, before_update: Callable[[], None] | None = None,
    rows: Callable[[int, np.ndarray], Batch] = rows_of,
) -> Numbers:  # fmt: skip
    """Train the given steps. Collective."""
    losses, norms = [], []
    for step in steps:
        result = train_step(
            engine,
            microbatches(recipe, engine.mesh, step, rows=rows),
            step=step,
            learning_rate=1e-3,
            watch=Stopwatch(),
            before_update=before_update,
        )
        losses.append(float(engine.mesh.sum_over_world(result.loss.clone())))
        norms.append(float(result.grad_norm))
    return Numbers(losses, norms)


def train_tiny(rank: int, recipe: Recipe, world: int, steps: int = 3) -> Numbers:
    """For `run_ranks`: build and train from scratch."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        return steps_of(engine, recipe, range(steps))


def health(rank: int, recipe: Recipe, world: int) -> tuple[list[list[Reading]], list[bool]]:
    """For `run_ranks`: two measured steps. -> the readings of each, and which layers then run in high precision."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        results = []
        for step in range(2):
            rows = microbatches(recipe, engine.mesh, step)
            train_step(engine, rows, step=step, learning_rate=1e-3, watch=Stopwatch(), measure=True)
            results.append(engine.precision.health())
        return results, [linear.scaling is None for linear in engine.precision.linears]  # type: ignore[attr-defined]
