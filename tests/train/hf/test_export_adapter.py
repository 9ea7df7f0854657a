"""Exported adapters: exact arithmetic on the matrices of transformers' model, and peft's own forward and backward pass
(.harness/: tests/train/evaluate/install_harness.sh)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, exported, ids_of, recipe_of, trained
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import engine_of

from recipes.schema.errors import RecipeError
from recipes.schema.lora import LoraConfig, adapted_linears
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.build import model_on_one_rank
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.checkpoint.tensors import StoredTensors
from train.hf.__main__ import _parser
from train.hf.check import load_theirs
from train.hf.command import export_model
from train.hf.config import family_of
from train.hf.export_adapter import write_adapter
from train.hf.files import WeightFiles
from train.hf.mapping import to_theirs
from train.merge.fold_adapters import fold_adapters
from train.merge.weighted_sum import source_at
from train.quantize.parts import Linear, linears

LORA = LoraConfig(rank=4, alpha=32.0, targets=("*.in_proj", "*.self_attention.*", "*.mlp.*"))
Tensors = dict[str, torch.Tensor]


def initial(rank: int, recipe: Recipe, folder: Path) -> Path:
    """For `run_ranks`: the model before any step."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        state = RunState(step=0, recipe=recipe_mapping(recipe))
        return CheckpointFolder(folder, recipe.checkpoint).save(engine, state)


def made(folder: Path, family: str) -> tuple[Path, Path, Path]:
    """(checkpoint of adapters that have learned for a step, export of the frozen weights, the adapters for peft)."""
    model = replace(FAMILIES[family], lora=LORA)
    path = trained(folder / "run", recipe_of(model), world=1)
    (base,) = run_ranks(1, initial, recipe_of(FAMILIES[family]), folder / "base")
    adapter = folder / "adapter"
    adapter.mkdir()
    hf = exported(base, folder / "hf", FAMILIES[family])
    write_adapter(StoredTensors(path), adapter, model=model, base=str(hf))
    return path, hf, adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapters_are_what_is_folded_into_the_weights(family: str, tmp_path: Path) -> None:
    path, hf, adapter = made(tmp_path, family)
    fold_adapters(tmp_path / "folded", source_at(path), averaged=False, advance=lambda _: None)
    folded = exported(tmp_path / "folded" / "checkpoints" / "step_00000000", tmp_path / "hf2", FAMILIES[family])
    before, after, tensors = WeightFiles(hf), WeightFiles(folded), load_file(adapter / "adapter_model.safetensors")
    modules = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) == len(set(modules)) == len(tensors) // 2
    changed = []
    for name in before.entries:
        module = name.removesuffix(".weight").replace("backbone.", "model.")
        expected = before.read(name).double()
        if module in modules:
            down, up = (tensors[f"base_model.model.{module}.lora_{one}.weight"].double() for one in "AB")
            assert up.abs().max() > 0
            expected += LORA.alpha / LORA.rank * up @ down
            changed.append(module)
        torch.testing.assert_close(after.read(name).double(), expected, rtol=1e-6, atol=1e-7)
    assert sorted(changed) == sorted(modules)


def test_adapters_that_peft_would_bypass_are_refused(tmp_path: Path) -> None:
    model = replace(FAMILIES["nemotron_h"], lora=LoraConfig(rank=4))
    path = trained(tmp_path, recipe_of(model), world=1)
    with pytest.raises(RecipeError, match=r"mixer\.out_proj, which peft refuses"):
        write_adapter(StoredTensors(path), tmp_path, model=model, base="")


def test_options_that_do_nothing_for_adapters_are_refused(tmp_path: Path) -> None:
    model = replace(FAMILIES["gemma2"], lora=LORA)
    path = trained(tmp_path / "run", recipe_of(model), world=1)
    words = ["export", str(path), "--out", str(tmp_path / "out"), "--adapter", "--quantize", "int8", "--dtype", "bf16"]
    with pytest.raises(RecipeError, match=r"^--quantize, --dtype has no effect with --adapter"):
        export_model(_parser().parse_args(words))
    assert not (tmp_path / "out").exists()


def adapted(model: ModelConfig) -> list[Linear]:
    chosen = adapted_linears(model.lora, layer_kinds(model.pattern))
    return [one for one in linears(model, family_of(model)) if one.name in chosen[one.layer]]


def ours(rank: int, recipe: Recipe, path: Path) -> tuple[torch.Tensor, Tensors]:
    """For `run_ranks`: logits, and gradients of the adapters in transformers' matrices."""
    torch.set_num_threads(1)
    ids = ids_of(2, 40, recipe.model.vocab)
    with model_on_one_rank(recipe, path, device=torch.device("cpu")) as model:
        logits = model(ids, None, None)
        logits.logsumexp(-1).sum().backward()
        weights, gradients = dict(model.named_parameters()), {}
        for linear in adapted(recipe.model):
            place = f"decoder.layers.{linear.layer}.{linear.name}_adapter"
            up, down = weights[f"{place}.up"].grad, weights[f"{place}.down"].grad
            assert up is not None and down is not None
            gradients[linear.parts[0]] = down
            rows = up.split([shape[0] for shape in linear.pair.ours.values()])
            for name, part in zip(linear.parts, to_theirs(linear.pair, rows), strict=True):
                gradients[f"{name} up"] = part
        return logits.detach(), gradients


@pytest.mark.oracle
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(family: str, tmp_path: Path) -> None:
    import peft

    path, hf, adapter = made(tmp_path, family)
    recipe = recipe_of(replace(FAMILIES[family], lora=LORA))
    ((logits, gradients),) = run_ranks(1, ours, recipe, path)
    base = load_theirs(hf, dtype=torch.float32, device=torch.device("cpu"), open_clamp=True)
    model: Any = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    theirs = model(ids_of(2, 40, recipe.model.vocab)).logits
    assert float((theirs.detach() - logits).norm() / logits.norm()) < 1e-5
    theirs.logsumexp(-1).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 2 * sum(len(linear.parts) for linear in adapted(recipe.model))
    for linear in adapted(recipe.model):
        modules = [f"base_model.model.{part.replace('backbone.', 'model.')}" for part in linear.parts]
        pairs = [
            (gradients[f"{part} up"], found[f"{m}.lora_B.default.weight"])
            for part, m in zip(linear.parts, modules, strict=True)
        ]
        pairs.append((gradients[linear.parts[0]], sum(found[f"{m}.lora_A.default.weight"] for m in modules)))
        for our, their in pairs:
            assert float((our - their).norm() / their.norm()) < 1e-4, linear
