"""Adapters (`model.lora`): the same training at every layout, nothing else is trained, checkpoints move between layouts.

References: one process; the explicit product W + (alpha / rank) up down in float64.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import MIXTURE
from ranks import RankFailed, run_ranks
from tiny import GEMMA, VOCAB, Numbers, engine_of, recipe_with, steps_of

from recipes.schema.errors import RecipeError
from recipes.schema.lora import LoraConfig
from recipes.schema.manifest import read_manifest
from recipes.schema.optim import ParameterGroupConfig
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from train.build import build_engine, check, frozen_engine, mesh_of, model_on_one_rank
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.checkpoint.tensors import StoredTensors
from train.merge.fold_adapters import fold_adapters
from train.merge.weighted_sum import source_at
from train.model.initial import global_names

ROUNDING = 2e-6
LORA: dict[str, Any] = {"model.lora": LoraConfig(rank=4, alpha=32.0)}
LAYOUTS = {
    "recompute": (1, {"parallel.recompute": "full"}),
    "DP2": (2, {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}),
    "TP2": (2, {"parallel.tensor": 2}),
    "TP2 SP": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "TP2 SP PP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
    "TP2 SP CP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
}


def train(rank: int, changes: dict[str, Any], world: int) -> tuple[Numbers, dict[str, int]]:
    """For `run_ranks`: four steps. -> numbers, and how many elements of each weight changed."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        weights = {name: parameter for chunk in engine.chunks for name, parameter in global_names(chunk.module)}
        before = {name: parameter.detach().clone() for name, parameter in weights.items()}
        numbers = steps_of(engine, recipe, range(4))
        changed = {name: int((parameter != before[name]).sum()) for name, parameter in weights.items()}
        for chunk in engine.chunks:
            biases = {name: one for name, one in chunk.module.named_buffers() if name.endswith("expert_bias")}
            changed |= {name: int(one.count_nonzero()) for name, one in biases.items()}
        return numbers, {name: count for name, count in changed.items() if count}


@pytest.fixture(scope="module")
def single() -> tuple[Numbers, dict[str, int]]:
    (result,) = run_ranks(1, train, LORA, 1)
    return result


def test_only_adapters_change_and_all_of_them_do(single: tuple[Numbers, dict[str, int]]) -> None:
    numbers, changed = single
    linears = [
        f"decoder.layers.{index}.{name}_adapter.{part}"
        for index, kind in enumerate("M-M*-M-M*-")
        for name in {
            "M": ("mixer.in_proj", "mixer.out_proj"),
            "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
            "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
        }[kind]
        for part in ("down", "up")
    ]
    assert sorted(changed) == sorted(linears)
    assert numbers.losses[0] != numbers.losses[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(name: str, single: tuple[Numbers, dict[str, int]]) -> None:
    world, changes = LAYOUTS[name]
    results = run_ranks(world, train, LORA | changes, world)
    assert all(numbers == results[0][0] for numbers, _ in results)
    assert results[0][0].losses == pytest.approx(single[0].losses, rel=ROUNDING)
    assert results[0][0].grad_norms == pytest.approx(single[0].grad_norms, rel=ROUNDING)
    assert {name for _, changed in results for name in changed} == set(single[1])


def test_experts_and_their_biases_stay_frozen() -> None:
    mixture = LORA | MIXTURE
    assert MIXTURE["model.experts"].bias_rate > 0
    ((one, changed),) = run_ranks(1, train, mixture, 1)
    split = run_ranks(2, train, mixture | {"parallel.expert": 2}, 2)
    assert split[0][0].losses == pytest.approx(one.losses, rel=ROUNDING)
    assert split[0][0].grad_norms == pytest.approx(one.grad_norms, rel=ROUNDING)
    assert changed and all("_adapter." in name for name in changed)


def test_frozen_products_run_in_fp8() -> None:
    """The base's products are quantised as without adapters: the first loss, at which `up` is zero, is the same."""
    fp8 = {"precision.scaling": "blockwise", "model.hidden": 128, "model.ffn": 256}
    ((adapted, changed),) = run_ranks(1, train, LORA | fp8, 1)
    ((plain, _),) = run_ranks(1, train, fp8, 1)
    ((exact, _),) = run_ranks(1, train, fp8 | {"precision.scaling": "none"}, 1)
    assert adapted.losses[0] == plain.losses[0] != exact.losses[0]
    assert changed and all("_adapter." in name for name in changed)


def save_at(rank: int, changes: dict[str, Any], world: int, folder: Path) -> Numbers:
    """For `run_ranks`: two steps, a save, two more steps. -> numbers of the last two."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(2))
        CheckpointFolder(folder, recipe.checkpoint).save(
            engine, RunState(step=2, position=8, recipe=recipe_mapping(recipe))
        )
        return steps_of(engine, recipe, range(2, 4))


def continue_at(rank: int, changes: dict[str, Any], world: int, folder: Path) -> Numbers:
    """For `run_ranks`: load the save of `save_at`, two more steps."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        assert CheckpointFolder(folder, recipe.checkpoint).resume(engine) is not None
        return steps_of(engine, recipe, range(2, 4))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_continues_at_another_layout(precision: str, tmp_path: Path) -> None:
    gated = LORA | {"model.activation": "swiglu", "model.tie_embeddings": True, "precision.params": precision}
    split = {"parallel.tensor": 2, "parallel.sequence": True}
    stages = {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}
    (whole,) = run_ranks(1, save_at, gated, 1, tmp_path / "one")
    run_ranks(2, save_at, gated | split, 2, tmp_path / "split")
    one = run_ranks(2, continue_at, gated | stages, 2, tmp_path / "one")[0]
    two = run_ranks(2, continue_at, gated, 2, tmp_path / "split")[0]
    same = run_ranks(1, continue_at, gated, 1, tmp_path / "one")[0]
    assert same == whole  # to the last bit
    for found in (one, two):
        tolerance = ROUNDING if precision == "fp32" else 1e-3
        assert found.losses == pytest.approx(whole.losses, rel=tolerance)
    # Frozen weights have neither masters nor moments.
    manifest = read_manifest(tmp_path / "split" / "step_00000002")
    names = {name.split(".", 2)[2] for name in manifest.tensors if name.startswith("optimizer.exp_avg.")}
    assert names and all("_adapter." in name for name in names)
    assert "model.decoder.layers.0.mixer.in_proj_adapter.up.dt" in manifest.tensors


def start(rank: int, changes: dict[str, Any], weights: Path) -> list[float]:
    """For `run_ranks`: an engine that starts from a checkpoint. -> losses of one step."""
    torch.set_num_threads(1)
    recipe = recipe_with(**changes)
    layout = check(recipe, world=1)
    with mesh_of(recipe, layout, device=torch.device("cpu"), rank=rank) as mesh:
        engine = build_engine(recipe, mesh, weights=weights)
        return steps_of(engine, recipe, range(2, 3)).losses


def test_adapters_start_as_the_model_and_are_refused_where_the_model_differs(tmp_path: Path) -> None:
    run_ranks(1, save_at, {}, 1, tmp_path)
    folder = tmp_path / "step_00000002"
    (plain,) = run_ranks(1, start, {}, folder)
    (adapted,) = run_ranks(1, start, LORA, folder)
    assert adapted == plain  # up is zero
    run_ranks(1, save_at, LORA, 1, tmp_path / "adapted")
    for other in ({}, {"model.lora": LoraConfig(rank=4, alpha=16.0)}, {"model.lora": LoraConfig(rank=8, alpha=32.0)}):
        with pytest.raises(RankFailed, match=r"model\.lora\."):
            run_ranks(1, start, other, tmp_path / "adapted" / "step_00000002")


def reference_of(rank: int, weights: Path) -> bool:
    """For `run_ranks`: the frozen model that a run with adapters started from, with the run's own groups of parameters."""
    recipe = recipe_with(**{"optim.groups": (ParameterGroupConfig("*_adapter.up", lr_factor=16.0),)})
    layout = check(recipe_with(), world=1)
    with mesh_of(recipe, layout, device=torch.device("cpu"), rank=rank) as mesh:
        engine = frozen_engine(recipe, weights, mesh)
        return any(one.requires_grad for chunk in engine.chunks for one in chunk.parameters())


def test_the_reference_of_a_run_with_groups_of_adapters_is_built(tmp_path: Path) -> None:
    run_ranks(1, save_at, {}, 1, tmp_path)
    assert run_ranks(1, reference_of, tmp_path / "step_00000002") == [False]


def logits_of(rank: int, path: Path, mapping: dict[str, Any]) -> torch.Tensor:
    """For `run_ranks`: logits of a checkpoint's model in one process."""
    torch.set_num_threads(1)
    recipe = recipe_from_mapping(mapping)
    recipe = replace(recipe, parallel=replace(recipe.parallel, tensor=1))
    ids = torch.randint(0, VOCAB, (2, 48), generator=torch.Generator().manual_seed(3))
    with model_on_one_rank(recipe, path, device=torch.device("cpu")) as built, torch.no_grad():
        logits: torch.Tensor = built(ids, None, None)
        return logits


@pytest.mark.parametrize("model", ["nemotron", "gemma"])
def test_folded_weights_compute_the_same(model: str, tmp_path: Path) -> None:
    changes = LORA | (GEMMA if model == "gemma" else {})
    run_ranks(2, save_at, changes | {"parallel.tensor": 2}, 2, tmp_path / "adapted")
    source = source_at(tmp_path / "adapted" / "step_00000002")
    manifest = fold_adapters(tmp_path / "folded", source, averaged=False, advance=lambda _: None)
    before, after = StoredTensors(source.path), StoredTensors(tmp_path / "folded" / "checkpoints" / "step_00000000")
    assert after.weights.keys() == {name for name in before.weights if "_adapter." not in name}
    changed = 0
    for name in after.weights:
        linear, _, part = name.partition(".weight")
        expected = before.read(name).double()
        if f"{linear}_adapter.down" in before.weights and not name.endswith("norm.weight"):
            up, down = (before.read(f"{linear}_adapter.{one}").double() for one in (f"up{part}", "down"))
            assert up.abs().max() > 0
            expected += 8 * up @ down
            changed += 1
        torch.testing.assert_close(after.read(name).double(), expected, rtol=1e-6, atol=1e-7)
    assert changed >= 12
    with pytest.raises(RecipeError, match="has no adapters"):
        fold_adapters(tmp_path / "again", source_at(tmp_path / "folded"), averaged=False, advance=lambda _: None)
    logits = [
        run_ranks(1, logits_of, path, mapping)[0]
        for path, mapping in ((source.path, source.manifest.recipe), (after.folder, manifest.recipe))
    ]
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 1e-6
