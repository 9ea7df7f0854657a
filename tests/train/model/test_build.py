"""The real build of every shipped model, without memory: as many parameters as counted, to the unit, at any layout."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from ranks import run_ranks
from tiny import RECIPE

from launch.compose import compose
from launch.plan.cost.tensors import stage_tensors
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import layer_norms, parameters
from recipes.schema.typed import build
from train.build import check, mesh_of
from train.model.backend import ReferenceBackend
from train.model.build import build_model

MODELS = sorted((Path(__file__).resolve().parents[3] / "recipes" / "model").glob("*.yaml"))


def built(rank: int, world: int, parallel: ParallelConfig, paths: list[Path]) -> dict[str, int]:
    """Parameters on this rank of shipped models, by name."""
    found = {}
    models = {path.stem: build(ModelConfig, yaml.safe_load(path.read_text()), "model") for path in paths}
    recipe = replace(RECIPE, parallel=parallel, model=next(iter(models.values())))
    with (
        mesh_of(recipe, check(recipe, world=world), device=torch.device("cpu"), rank=rank) as mesh,
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta")),  # shapes and names, no memory
    ):
        for name, model in models.items():
            chunks = build_model(
                model, parallel=parallel, precision=recipe.precision, run=recipe.run, row_tokens=64, mesh=mesh,
                backend=ReferenceBackend(),
            )  # fmt: skip
            found[name] = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_builds_have_the_parameters_that_are_counted(tensor: int) -> None:
    sums = run_ranks(tensor, built, tensor, ParallelConfig(tensor=tensor), MODELS)
    assert len(sums[0]) >= 13
    for name, here in sums[0].items():
        model = build(ModelConfig, yaml.safe_load((MODELS[0].parent / f"{name}.yaml").read_text()), "model")
        counted = parameters(model)
        if tensor == 1:
            assert here == counted.total, name
        else:  # norms are on every tensor rank, but for the gated norm of Mamba-2, which is split like everything else
            gated = model.pattern.count("M") * model.mamba_heads * model.mamba_head_dim
            whole = counted.norms - gated
            # Tensor ranks split the shared expert of an `E` layer; without expert-tensor ranks each has all else.
            shared = layer_norms(model) + 2 * model.hidden * model.experts.shared_ffn
            whole += counted.experts - model.pattern.count("E") * shared
            assert sum(each[name] for each in sums) == counted.total + (tensor - 1) * whole, name


@pytest.mark.slow
def test_nano_12b_has_the_planned_weights_at_every_layout_of_its_recipes() -> None:
    """Context and data ranks hold the same weights, so one tensor group stands for all."""
    path = MODELS[0].parent / "nemotron_nano_12b_v2.yaml"
    model = build(ModelConfig, yaml.safe_load(path.read_text()), "model")
    layouts = set()
    for recipe_path in sorted(path.parents[1].glob("*.yaml")):
        if "nano_12b_v2" in recipe_path.stem and "compress" not in recipe_path.stem:
            recipe = compose(["-cn", recipe_path.stem], program="test")
            assert not isinstance(recipe, int) and recipe.model.pattern == model.pattern, recipe_path
            assert recipe.parallel.pipeline == recipe.parallel.expert == 1
            layouts.add((recipe.parallel.tensor, recipe.parallel.sequence))
    assert {tensor for tensor, _ in layouts} == {4, 8}
    for tensor, sequence in sorted(layouts):
        parallel = ParallelConfig(tensor=tensor, sequence=sequence)
        planned = stage_tensors(model, model.pattern, tensor=tensor, is_first=True, is_last=True)
        found = run_ranks(tensor, built, tensor, parallel, [path])
        assert [each[path.stem] for each in found] == [sum(one.numel for one in planned)] * tensor, (tensor, sequence)
