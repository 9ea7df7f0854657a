"""A teacher checkpoint for tests, and students that learn from it at any layout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import RECIPE, TINY, Numbers, engine_of, recipe_with, rows_of, steps_of

from data.batch import Batch
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState

TOKENIZER = "0123456789abcdef"
TEACHER = replace(
    RECIPE,
    run=replace(RECIPE.run, seed=77),
    model=replace(TINY, pattern="M-*-M-", ffn=192, mamba_heads=4, mamba_head_dim=32, init_std=0.06),
)
"""A pattern, widths and (untrained) predictions that differ from TINY's; the same vocabulary."""


def save_teacher(folder: Path, recipe: Recipe = TEACHER, *, tokenizer: str = TOKENIZER) -> Path:
    """Write the initial weights of a recipe as a run's checkpoint. -> the checkpoint's folder."""
    from ranks import run_ranks

    (path,) = run_ranks(1, _save, folder, recipe, tokenizer)
    return path


def _save(rank: int, folder: Path, recipe: Recipe, tokenizer: str) -> Path:
    with engine_of(recipe, rank=rank, world=1) as engine:
        return CheckpointFolder(folder / "checkpoints", recipe.checkpoint).save(
            engine, RunState(step=3, position=12, recipe=recipe_mapping(recipe), data_hash="h", tokenizer=tokenizer)
        )


def student_of(teacher: Path, **changes: Any) -> Recipe:
    """TINY distilled from a checkpoint; changes are dotted fields."""
    return recipe_with(
        **{"objective.kind": "distill", "objective.teacher": str(teacher), "objective.trust_tokenizer": True, **changes}
    )


def distill_tiny(
    rank: int, recipe: Recipe, world: int, steps: int = 2, rows: Callable[[int, np.ndarray], Batch] = rows_of
) -> Numbers:
    """For `run_ranks`: build student and teacher and train."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        return steps_of(engine, recipe, range(steps), rows=rows)
