"""Models to prune, their scores, and the logits of the pruned models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import RECIPE, TINY, engine_of, rows_of

from data.batch import Batch
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from train.build import check, mesh_of
from train.checkpoint.storage import read_weights
from train.compress.importance import removal_scores, width_scores
from train.compress.parent import Parent, layout_recipe, scoring_engine
from train.compress.scores import Removal, Scores

HYBRID = replace(TINY, pattern="M-M*-M*-", init_std=0.06, norm_eps=1e-12)
GEMMA = replace(
    TINY, pattern="w-*-", activation="geglu", heads=4, kv_heads=2, window_tokens=16, attention_softcap=50.0,
    position="rope", norm_offset=1, post_norms=True, scale_embedding=True, tie_embeddings=True, logit_softcap=30.0,
    norm_eps=1e-12, init_std=0.06,
)  # fmt: skip


class Rows:
    """The training rows of a dataset, made up."""

    def training_rows(self, positions: np.ndarray) -> Batch:
        return rows_of(0, positions)


def recipe_of(model: ModelConfig, **parallel: Any) -> Recipe:
    return replace(RECIPE, model=model, parallel=replace(RECIPE.parallel, **parallel),
                   run=replace(RECIPE.run, microbatch_rows=2))  # fmt: skip


def score(
    rank: int, path: Path, recipe: Recipe, world: int, rows: int, remove: int = 0, attention: int | None = None
) -> Scores:
    """For `run_ranks`: scores of a checkpoint at a layout."""
    torch.set_num_threads(1)
    parent = Parent(path, None, replace(recipe))  # type: ignore[arg-type]
    recipe = layout_recipe(parent, recipe, world=world)
    with (
        mesh_of(recipe, check(recipe, world=world), device=torch.device("cpu"), rank=rank) as mesh,
        scoring_engine(parent, recipe, mesh) as engine,
    ):
        scores = width_scores(engine, recipe.model, Rows(), rows=rows, parent=str(path))  # type: ignore[arg-type]
        if remove:
            scores.removals = removals(engine, recipe, rows, remove, attention)
        return scores


def removals(engine: Any, recipe: Recipe, rows: int, remove: int, attention: int | None) -> list[Removal]:
    return list(removal_scores(engine, recipe.model, Rows(), rows=rows, remove=remove, attention_layers=attention,
                               metric="logit_mse"))  # type: ignore[arg-type]  # fmt: skip


def logits(rank: int, path: Path, model: ModelConfig) -> torch.Tensor:
    """For `run_ranks`: logits of a checkpoint's weights on two rows."""
    with engine_of(recipe_of(model), rank=rank, world=1) as engine:
        chunk = engine.chunks[0].module
        read_weights(path, [chunk], groups=engine.mesh.groups)
        chunk.eval()
        batch = rows_of(0, np.arange(2))
        with torch.no_grad():
            return chunk(batch.tokens, torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens), None)
