"""Conversion of whole models: a round trip is bitwise between any layouts, names must match, memory is that of one tensor."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, FOUR, GEMMA, HYBRID, TOKENS, exported, recipe_of, trained
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import weights_at
from transformers import AutoModelForCausalLM

from recipes.schema.command import RECIPES
from recipes.schema.errors import CheckpointError
from train.checkpoint.manifest import RunState
from train.checkpoint.storage import publish
from train.checkpoint.tensors import StoredTensors
from train.hf.config import from_config, read_config, to_config
from train.hf.convert import import_weights, lossless_format
from train.hf.files import WeightFiles


def imported(directory: Path, folder: Path, model: object = None, **options: object) -> StoredTensors:
    aside = folder.with_name(f".{folder.name}.writing")
    aside.mkdir()
    model = model or from_config(read_config(directory), where=str(directory))
    import_weights(WeightFiles(directory), aside, model=model, **options)  # type: ignore[arg-type]
    publish(aside, folder, RunState())
    return StoredTensors(folder)


def same(a: StoredTensors, b: StoredTensors) -> bool:
    return a.weights == b.weights and all(torch.equal(a.read(name), b.read(name)) for name in a.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks_to_theirs_to_two_ranks_bit_for_bit(family: str, tmp_path: Path) -> None:
    recipe = recipe_of(FAMILIES[family], params="bf16", **FOUR)
    path = trained(tmp_path / "run", recipe, world=4)
    stored = StoredTensors(path)
    directory = exported(path, tmp_path / "theirs", recipe.model)
    back = imported(directory, tmp_path / "back")
    assert same(back, stored)
    virtual = recipe_of(recipe.model, params="bf16", pipeline=2, virtual_pipeline=2)
    expected = run_ranks(2, weights_at, virtual, 2, path)
    got = run_ranks(2, weights_at, virtual, 2, back.folder)
    for ours, again in zip(expected, got, strict=True):
        assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_comes_in_and_goes_out_the_same(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]
    config = to_config(model, tokens=TOKENS, max_positions=64, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    from transformers import AutoConfig

    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    back = imported(tmp_path / "saved", tmp_path / "ours")
    again = exported(back.folder, tmp_path / "again", model)
    reloaded = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
    for (name, a), (other, b) in zip(theirs.named_parameters(), reloaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name


def test_formats_and_padding(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", recipe_of(HYBRID), world=1)
    stored = StoredTensors(path)
    half = WeightFiles(exported(path, tmp_path / "bf16", HYBRID, format="bf16"))
    kept = {name for name, entry in half.entries.items() if entry.dtype == torch.float32}
    assert kept and all(name.endswith(("A_log", "dt_bias", ".D")) for name in kept)
    assert torch.equal(half.read("lm_head.weight"), stored.read("output_layer.weight").to(torch.bfloat16))
    wide = imported(tmp_path / "bf16", tmp_path / "fp32", format="fp32")
    assert {entry.dtype for entry in wide.weights.values()} == {torch.float32}

    padded = replace(HYBRID, vocab=264)
    ours = imported(tmp_path / "bf16", tmp_path / "padded", padded, vocab=256)
    assert ours.weights["output_layer.weight"].shape == (264, HYBRID.hidden)
    back = WeightFiles(exported(ours.folder, tmp_path / "cut", padded, vocab=256))
    assert all(torch.equal(back.read(name), half.read(name)) for name in half.entries)


def test_a_tied_hybrid_is_written_with_a_head(tmp_path: Path) -> None:
    model = replace(HYBRID, tie_embeddings=True)
    path = trained(tmp_path / "run", recipe_of(model), world=1)
    files = WeightFiles(exported(path, tmp_path / "theirs", model))
    assert torch.equal(files.read("lm_head.weight"), files.read("backbone.embeddings.weight"))


def test_names_that_do_not_fit_are_errors_that_name_them(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", recipe_of(GEMMA), world=1)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.layers\.6\.input_layernorm\.weight"):
        exported(path, tmp_path / "longer", replace(GEMMA, pattern="w-*-w-*-"))
    with pytest.raises(CheckpointError, match=r"not part of this model: decoder\.layers\.4\.input_layernorm\.weight"):
        exported(path, tmp_path / "shorter", replace(GEMMA, pattern="w-*-"))
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight is \[192, 48\], not \[194, 48\]"):
        exported(path, tmp_path / "wider", replace(GEMMA, ffn=97))
    directory = exported(path, tmp_path / "theirs", GEMMA)
    file = sorted(directory.glob("*.safetensors"))[0]
    (directory / "model.safetensors.index.json").unlink()
    tensors = load_file(file)
    renamed = {name.replace("gate_proj", "gate_projection"): tensor for name, tensor in tensors.items()}
    wide = next(name for name in renamed if name.endswith("o_proj.weight"))
    renamed[wide] = renamed[wide].T.contiguous()
    save_file(renamed, file)
    with pytest.raises(CheckpointError) as caught:
        imported(directory, tmp_path / "y")
    message = str(caught.value)
    assert "missing: model.layers.0.mlp.gate_proj.weight" in message
    assert "not part of this model: model.layers.0.mlp.gate_projection.weight" in message
    assert f"{wide} is [96, 48], not [48, 96]" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_nan_are_refused_by_name(family: str, tmp_path: Path) -> None:
    """No comparison reads a row of the embedding that no text uses."""
    model = FAMILIES[family]
    path = trained(tmp_path / "run", recipe_of(model), world=1)
    directory = exported(path, tmp_path / "theirs", model)
    for name, value in (("embed", float("inf")), ("down_proj", float("nan"))):
        broken = tmp_path / name
        shutil.copytree(directory, broken)
        file = next(f for f in sorted(broken.glob("*.safetensors")) if any(name in n for n in load_file(f)))
        tensors = load_file(file)
        wrong = next(n for n in tensors if name in n)
        tensors[wrong][7, 3] = value
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=rf"{wrong} has 1 of .* values that are NaN or infinite"):
            imported(broken, tmp_path / f"{name}_in")


def test_keeping_every_bit_takes_the_finest_format(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", recipe_of(HYBRID), world=1)
    directory = exported(path, tmp_path / "theirs", HYBRID, format="bf16")
    assert (
        lossless_format(WeightFiles(directory), HYBRID, vocab=HYBRID.vocab) == "bf16"
    )  # A_log, D and dt_bias are fp32
    file = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(file)
    one = next(name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16)
    save_file(tensors | {one: tensors[one].float()}, file)
    assert lossless_format(WeightFiles(directory), HYBRID, vocab=HYBRID.vocab) == "fp32"


PROGRAM = """
import sys, resource, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
import train.megatron  # readies Megatron before anything imports it
from hf_models import HYBRID
from dataclasses import replace
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights
from train.hf.convert import export_weights, import_weights
from train.hf.files import WeightFiles
from train.hf.mapping import pairs
from train.checkpoint.manifest import RunState
from train.checkpoint.storage import publish
import safetensors.torch
MODEL = replace(HYBRID, pattern="M-*-" * 8, hidden=512, ffn=3072, vocab=2048, heads=8, kv_heads=4, head_dim=64,
                mamba_heads=32, mamba_head_dim=64)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder = Path(sys.argv[1])
for name in ("writing", "theirs", "back"): (folder / name).mkdir()
weights = {{n: StoredTensor(s, torch.float32) for p in pairs(MODEL, "nemotron_h") for n, s in p.ours.items()}}
largest = max(sum(torch.Size(s).numel() * 4 for s in p.ours.values()) for p in pairs(MODEL, "nemotron_h"))
whole = sum(entry.nbytes for entry in weights.values())
write_weights(folder / "writing", weights, lambda name: torch.ones(weights[name].shape))
publish(folder / "writing", folder / "ours", RunState())
start = peak()
export_weights(StoredTensors(folder / "ours"), folder / "theirs", model=MODEL)
exported = peak()
import_weights(WeightFiles(folder / "theirs"), folder / "back", model=MODEL)
print(whole, largest, exported - start, peak() - start)
"""


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Peak memory above the start, of a model of 0.3 GB whose largest pair has 9 MB."""
    program = PROGRAM.format(root=str(RECIPES.parent))
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    whole, largest, exporting, importing = map(int, result.stdout.split())
    assert whole > 20 * largest
    assert exporting < 4 * largest and importing < 5 * largest, result.stdout
