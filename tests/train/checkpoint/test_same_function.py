"""Weights are read into the model they were trained in: another function of the same shapes must be allowed explicitly."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import RECIPE, TINY

from recipes.schema.changes import check_same_function
from recipes.schema.errors import RecipeError
from recipes.schema.recipe import Recipe
from train.build import build_engine, check, mesh_of, model_on_one_rank
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState

MODEL = replace(TINY, position="rope", mamba_groups=2)
SAME_SHAPES: dict[str, dict[str, Any]] = {
    "norm_offset": {"norm_offset": 1},
    "scale_embedding": {"scale_embedding": True},
    "activation": {"activation": "gelu"},
    "windows for whole rows": {"pattern": TINY.pattern.replace("*", "w")},
    "rope_base": {"rope_base": 500000.0},
    "rope_scaling": {"rope_scaling": "yarn", "rope_factor": 4.0},
    "position": {"position": "none"},
    "heads against head_dim": {
        "heads": MODEL.heads * 2, "kv_heads": MODEL.kv_heads * 2, "head_dim": MODEL.head_dim // 2},
    "groups against state": {"mamba_groups": 1, "mamba_state": MODEL.mamba_state * 2},
    "norm_eps": {"norm_eps": 1e-6},
    "logit_softcap": {"logit_softcap": 30.0},
    "query_scale": {"query_scale": 1.0},
}  # fmt: skip
ARITHMETIC = ["rope_base", "rope_scaling", "norm_eps", "logit_softcap", "query_scale"]


def saved(recipe: Recipe) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(recipe))))


def with_model(**changes: Any) -> Recipe:
    return replace(RECIPE, model=replace(MODEL, **changes))


@pytest.mark.parametrize("name", SAME_SHAPES)
def test_another_function_of_the_same_shapes_needs_the_word(name: str) -> None:
    before, now = saved(with_model()), with_model(**SAME_SHAPES[name])
    word = "arithmetic" if name in ARITHMETIC else "another_function"
    field = next(iter(SAME_SHAPES[name]))
    with pytest.raises(RecipeError, match=rf"model\.{field}: .* in the checkpoint(.|\n)*checkpoint\.allow=\[.*{word}"):
        check_same_function(before, now, place="there")
    allowed = replace(now, checkpoint=replace(now.checkpoint, allow=("arithmetic", "another_function")))
    check_same_function(before, allowed, place="there")


def test_what_does_not_change_the_function_needs_no_word() -> None:
    plain = replace(RECIPE, model=replace(TINY, pattern="M-M-"))
    for changes in (
        {"mamba_chunk": 16}, {"init_std": 0.1}, {"pattern": "M-|M-"}, {"heads": 2, "window_tokens": 7},
        {"rope_base": 5.0}, {"query_scale": float(TINY.head_dim)},
    ):  # fmt: skip
        check_same_function(saved(plain), replace(plain, model=replace(plain.model, **changes)), place="there")
    check_same_function({}, plain, place="a checkpoint that says nothing")
    old = saved(plain)
    del old["model"]["logit_softcap"]  # a field that came later counts with its default
    check_same_function(old, plain, place="there")


def readers(rank: int, folder: Path) -> list[str]:
    """Write weights, then read them as another function by `run.start_from` and by generation. -> what each says."""
    path, messages = folder / "step_00000000", []
    recipe, cpu = with_model(), torch.device("cpu")
    with mesh_of(recipe, check(recipe, world=1), device=cpu, rank=rank) as mesh:
        engine = build_engine(recipe, mesh)
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(recipe=saved(recipe)))
        other = with_model(activation="gelu")
        allowed = replace(other, checkpoint=replace(other.checkpoint, allow=("another_function",)))
        with pytest.raises(RecipeError) as raised:
            build_engine(other, mesh, weights=path)
        messages.append(str(raised.value))
        build_engine(allowed, mesh, weights=path)
    with pytest.raises(RecipeError) as raised, model_on_one_rank(other, path, device=cpu):
        pass
    messages.append(str(raised.value))
    return messages


def test_start_from_and_generation_refuse_another_function(tmp_path: Path) -> None:
    for message in run_ranks(1, readers, tmp_path)[0]:
        assert "model.activation: squared_relu in the checkpoint, gelu in the recipe" in message
