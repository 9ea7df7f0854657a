"""Changes that make the tiny hybrid a mixture of experts, and its whole weights after some steps, for tests at any layout."""

from typing import Any

import torch
from tiny import Numbers, engine_of, steps_of

from recipes.schema.experts import ExpertsConfig
from recipes.schema.recipe import Recipe
from train.checkpoint.pieces import local_tensors_of, weight_pieces

EXPERTS = ExpertsConfig(
    count=4, top_k=2, ffn=32, shared_ffn=64, scaling=2.5, bias_rate=0.05, aux_loss="row", aux_coefficient=0.1
)
"""Sigmoid router as in Nemotron 3, with rates of balancing so large that an error in them changes the gradient norm."""
MIXTURE: dict[str, Any] = {"model.pattern": "ME*E", "model.experts": EXPERTS}


def trained_weights(
    rank: int, recipe: Recipe, world: int, steps: int
) -> tuple[Numbers, list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]]:
    """For `run_ranks`: train, then this rank's parts of the weights: (name, whole shape, offset, values)."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        numbers = steps_of(engine, recipe, range(steps))
        modules = [chunk.module for chunk in engine.chunks]
        pieces = weight_pieces(local_tensors_of(modules, engine.mesh.groups.dp_cp))
        return numbers, [(p.tensor, p.whole, p.offset, p.data.view(p.shape).clone()) for p in pieces]


def whole_weights(ranks: list[Any]) -> dict[str, torch.Tensor]:
    """The whole tensors from the parts of all ranks; elements that no rank has are NaN."""
    found: dict[str, torch.Tensor] = {}
    for _, parts in ranks:
        for name, whole, offset, values in parts:
            tensor = found.setdefault(name, torch.full(whole, torch.nan))
            tensor[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return found
