"""`stratum hf export --quantize` as its users run it: calibrated, compared with transformers' reload, refused, read again."""

from dataclasses import replace
from pathlib import Path

import compressed_tensors  # noqa: F401  imported once here: every command below is a fork of this process
import pytest
import torch
import transformers.models.nemotron_h.modeling_nemotron_h  # noqa: F401
from hf_command import command
from hf_models import HYBRID, recipe_of
from ranks import run_ranks
from safetensors.torch import load_file
from texts import VOCAB, prepared_in, write_texts

from launch.plan.cost.inference import inference_memory
from recipes.schema.recipe import Recipe
from recipes.schema.tools import GenerateConfig
from train.checkpoint.manager import checkpoint_at
from train.checkpoint.tensors import StoredTensors
from train.hf.config import read_config
from train.inference.text import stream_text
from train.quantize import packing, rounding
from train.quantize.directory import KEY, QuantizedFiles
from train.run import train

CHECK = ["--rows", "1", "--tokens", "33", "--text", "verse"]
MODEL = replace(HYBRID, pattern="M-*-", vocab=VOCAB)


def run_of(rank: int, recipe: Recipe) -> None:
    train(recipe)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a short run on real files, which is done."""
    root = tmp_path_factory.mktemp("quantized")
    data = prepared_in(write_texts(root))
    recipe = recipe_of(MODEL)
    recipe = replace(
        recipe,
        run=replace(recipe.run, name="run", folder=str(root), steps=2),
        data=data,
        telemetry=replace(recipe.telemetry, progress=False, tensorboard=False),
        evaluate=replace(recipe.evaluate, rows_per_source=2),
    )
    run_ranks(1, run_of, recipe)
    return recipe


def text_of(rank: int, recipe: Recipe, folder: Path) -> str:
    return "".join(stream_text(recipe, GenerateConfig(checkpoint=str(folder), tokens=4, temperature=0.0)))


def test_calibrated_export_reloads_in_transformers_generates_here_and_comes_back(recipe: Recipe) -> None:
    root = Path(recipe.run.folder)
    status, said = command(
        root, "export", root / "run", "--out", root / "int4", "--quantize", "int4-g32", "--calibrate", "4", *CHECK
    )
    assert status == 0 and "The two agree." in said, said
    files = QuantizedFiles(root / "int4")
    stored = load_file(root / "int4" / "model.safetensors")
    planned = inference_memory(MODEL, context_tokens=1, weight_bytes=4, quantized="int4-g32").weights
    assert files.nbytes == sum(tensor.nbytes for tensor in stored.values()) == planned
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in files.quantized)
    assert "linear layers int4-g32" in (root / "int4" / "README.md").read_text()
    assert run_ranks(1, text_of, recipe, root / "int4")[0].startswith("\n")
    status, said = command(root, "import", root / "int4", "--out", root / "back", "--no-check")
    assert status == 0, said
    back = StoredTensors(checkpoint_at(root / "back" / "checkpoint")[0])
    up = back.read("decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(up, files.read("backbone.layers.1.mixer.up_proj.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-w8a8", "fp8-w8a8"])
def test_formats_that_round_inputs_are_compared_by_their_weights(recipe: Recipe, name: str) -> None:
    root = Path(recipe.run.folder)
    status, said = command(root, "export", root / "run", "--out", root / name, "--quantize", name, *CHECK)
    assert status == 0 and "The two agree." in said, said
    assert QuantizedFiles(root / name).form.rounds_inputs
    assert run_ranks(1, text_of, recipe, root / name)[0].startswith("\n")


@pytest.mark.slow
def test_layers_kept_in_full_precision_are_ignored_by_every_reader(recipe: Recipe) -> None:
    root = Path(recipe.run.folder)
    words = ["--quantize", "fp8-block", "--keep", "in_proj", "--dtype", "bf16", "--tolerance", "0.01"]
    status, said = command(root, "export", root / "run", "--out", root / "kept", *words, *CHECK)
    assert status == 0 and "The two agree." in said, said
    files = QuantizedFiles(root / "kept")
    assert read_config(root / "kept")[KEY]["ignore"] == ["lm_head", "re:.*\\.in_proj$"]
    assert "backbone.layers.0.mixer.in_proj.weight" not in files.quantized
    assert files.read_quantized("backbone.layers.0.mixer.out_proj.weight").scale.dtype == torch.bfloat16


@pytest.mark.slow
def test_files_that_transformers_reads_as_another_model_are_not_published(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(codes: torch.Tensor, *, bits: int) -> torch.Tensor:
        return packing.pack(codes.flip(1), bits=bits)

    monkeypatch.setattr(rounding, "pack", swapped)
    root = Path(recipe.run.folder)
    status, said = command(root, "export", root / "run", "--out", root / "bad", "--quantize", "int8", *CHECK)
    assert status == 1 and "is the first that drifts" in said and not (root / "bad").exists(), said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "int4-g23"], "'int4-g23' is not a format of quantised weights. Did you mean int4-g32?"),
        (["--quantize", "int4-g128"], "groups of 128 do not divide the inputs"),
        (["--quantize", "int8", "--keep", "inproj"], "no such linear layer. Did you mean in_proj?"),
        (["--calibrate", "4"], "--calibrate needs a format"),
        (["--quantize", "int8", "--calibrate", "999"], "--calibrate 999: the run has 8 training rows"),
    ],
)
def test_mistaken_options_are_one_error(recipe: Recipe, words: list[str], message: str) -> None:
    root = Path(recipe.run.folder)
    status, said = command(root, "export", root / "run", "--out", root / "never", *words, *CHECK)
    assert status == 2 and message in said and said.count("error:") == 1 and not (root / "never").exists(), said
