"""Norms of queries and keys (`model.qk_norm`): invariant to their scale, equal training at every layout, counted to the unit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import TINY, engine_of, microbatches, recipe_with, train_tiny

from recipes.schema.errors import RecipeError
from recipes.schema.parameter_groups import parameter_names
from recipes.schema.pattern import parameters
from train.hf.config import family_of
from train.model.initial import global_names

NORMED: dict[str, Any] = {"model.qk_norm": True}
ROUNDING = 2e-6
LAYOUTS = {
    "TP2 SP": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "TP2": (2, {"parallel.tensor": 2}),
    "PP2 CP2 rope": (4, {"parallel.pipeline": 2, "parallel.context": 2, "model.position": "rope"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(name: str) -> None:
    world, changes = LAYOUTS[name]
    alone = {key: value for key, value in changes.items() if key.startswith("model.")}
    (one,) = run_ranks(1, train_tiny, recipe_with(**NORMED, **alone), 1)
    split = run_ranks(world, train_tiny, recipe_with(**NORMED, **changes), world)[0]
    assert split.losses == pytest.approx(one.losses, rel=ROUNDING)
    assert split.grad_norms == pytest.approx(one.grad_norms, rel=ROUNDING)
    (plain,) = run_ranks(1, train_tiny, recipe_with(**alone), 1)
    assert abs(plain.grad_norms[0] - one.grad_norms[0]) > 1e-4


def scaled(rank: int, changes: dict[str, Any], factor: float) -> tuple[torch.Tensor, dict[str, tuple[int, ...]]]:
    """For `run_ranks`: logits with the queries' and keys' rows of each projection multiplied; shapes of all parameters."""
    recipe = recipe_with(**{"model.norm_eps": 1e-12, **changes})
    with engine_of(recipe, rank=rank, world=1) as engine:
        (chunk,) = engine.chunks
        shapes = {}
        for name, parameter in global_names(chunk.module):
            shapes[name] = tuple(parameter.shape)
            if name.endswith("linear_qkv.weight"):
                groups = parameter.data.unflatten(0, (2, 4, 16))  # key/value heads; two queries, key, value; head_dim
                groups[:, :3] *= factor
        rows = microbatches(recipe, engine.mesh, 0)[0]
        with torch.no_grad():
            return chunk.module(rows.tokens, None, None), shapes


def test_scores_do_not_depend_on_the_size_of_queries_and_keys() -> None:
    (first, shapes), (second, _) = (run_ranks(1, scaled, NORMED, factor)[0] for factor in (1.0, 64.0))
    assert float((second - first).norm() / first.norm()) < 1e-5
    (first, _), (second, _) = (run_ranks(1, scaled, {}, factor)[0] for factor in (1.0, 64.0))
    assert float((second - first).norm() / first.norm()) > 1e-2
    model = replace(TINY, qk_norm=True)
    assert sorted(shapes) == sorted(parameter_names(model))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters(model).total
    assert shapes["decoder.layers.3.self_attention.q_layernorm.weight"] == (16,)


def test_classes_without_it_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.qk_norm=True"):
        family_of(replace(TINY, qk_norm=True))
