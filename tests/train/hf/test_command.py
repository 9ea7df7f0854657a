"""`stratum hf` as its users run it: export with card, import with a recipe that continues, check with exit statuses."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hf_command import call, command
from hf_models import FAMILIES, recipe_of
from pruning_folder import shell
from ranks import run_ranks
from recipes_composed import composed
from safetensors.torch import load_file, save_file
from texts import VOCAB, prepared_in, write_texts

from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics
from recipes.schema.tools import GenerateConfig
from train.checkpoint.manager import checkpoint_at
from train.run import train

CHECK = ["--rows", "2", "--tokens", "33"]


def run_of(rank: int, recipe: Recipe) -> None:
    train(recipe)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each family on real files, with evaluations; `bf16` has bf16 weights with fp32 masters."""
    root = tmp_path_factory.mktemp("runs")
    data = prepared_in(write_texts(root))
    made = {}
    for family, model in {**FAMILIES, "bf16": FAMILIES["nemotron_h"]}.items():
        recipe = recipe_of(replace(model, vocab=VOCAB), params="bf16" if family == "bf16" else "fp32")
        recipe = replace(
            recipe,
            run=replace(recipe.run, name=family, folder=str(root), steps=3),
            data=data,
            evaluate=replace(recipe.evaluate, rows_per_source=2),
            telemetry=replace(recipe.telemetry, progress=False, tensorboard=False),
        )
        run_ranks(1, run_of, recipe)
        made[family] = root / family
    return made


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path]) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        run = runs[family]
        text = run.parent / "code.jsonl"
        out = run.parent / "exports" / family
        status, output = command(run.parent, "export", run, "--out", out, *CHECK, "--text", text.with_name("verse"))
        assert status == 0, output
        assert "The two agree." in output and "transformers]" not in output, output
        made[family] = out
    return made


def test_the_model_card_describes_the_model(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    for family, out in exports.items():
        card = (out / "README.md").read_text()
        _, manifest = checkpoint_at(runs[family])
        evaluations = [line for line in read_metrics(runs[family] / METRICS) if line["kind"] == "evaluation"]
        last = evaluations[-1]["bits_per_byte"]
        for fact in (manifest.data_hash, manifest.tokenizer, f"| verse | {evaluations[0]['bits_per_byte']['verse']:.3f} |",
                     f"{last['code']:.3f}", "loss.png", "recipe.yaml", "step_00000003", "| model.layers.1 |" if
                     family == "gemma2" else "| backbone.layers.6 |", "20 of 20 tokens the same", "random weights"):  # fmt: skip
            assert fact in card, fact
        head = yaml.safe_load(card.split("---")[1])
        assert head["library_name"] == "transformers" and family in head["tags"]
        assert yaml.safe_load((out / "recipe.yaml").read_text()) == manifest.recipe
        assert (out / "loss.png").stat().st_size > 10_000
        parameters = sum(t.numel() for t in load_file(out / "model.safetensors").values())
        assert f"{parameters:,} parameters" in card


@pytest.mark.parametrize("words", [[], ["--quantize", "int4-g32"]], ids=["as stored", "quantised"])
def test_a_bf16_run_is_compared_by_its_bf16_weights(runs: dict[str, Path], tmp_path: Path, words: list[str]) -> None:
    """Its fp32 masters are other numbers than the weights that are written."""
    out = tmp_path / "out"
    text = ["--text", str(runs["bf16"].parent / "verse")]
    status, output = command(tmp_path, "export", runs["bf16"], "--out", out, *CHECK, *text, *words)
    assert status == 0 and "The two agree." in output, output


def test_transformers_loads_it_as_its_users_do(exports: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    for out in exports.values():
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = tokenizer("line 3 über naïve", return_tensors="pt")
        assert tokenizer.decode(ids["input_ids"][0]) == "line 3 über naïve"
        model = AutoModelForCausalLM.from_pretrained(out)
        settings = GenerationConfig.from_pretrained(out)
        assert settings.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
        assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 3


def test_an_import_trains_and_generates(runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path) -> None:
    root = runs["nemotron_h"].parent
    text = ["--text", str(root / "verse")]
    status, output = command(tmp_path, "import", exports["nemotron_h"], "--out", tmp_path / "mine", *CHECK, *text)
    assert status == 0 and "The two agree." in output, output
    _, manifest = checkpoint_at(tmp_path / "mine" / "checkpoint")
    assert manifest.tokenizer == checkpoint_at(runs["nemotron_h"])[1].tokenizer
    words = ["--config-dir", str(tmp_path / "mine"), "-cn", "mine", f"data.folder={root}/prepared",
             "~data.sources.shakespeare", "~data.sources.python", f"+data.sources.verse.path={root}/verse",
             f"+data.sources.code.path={root}/code.jsonl", "+data.sources.code.text_field=content", "data.row_tokens=16",
             "run.folder=" + str(tmp_path), "run.steps=1", "run.name=on", "schedule.warmup=0", "schedule.decay=0",
             "evaluate.rows_per_source=2", "telemetry.tensorboard=false"]  # fmt: skip
    status, said = run_ranks(1, shell, tmp_path, ["train", *words])[0]
    assert status == 0, said
    there = [line for line in read_metrics(runs["nemotron_h"] / METRICS) if line["kind"] == "evaluation"]
    here = [line for line in read_metrics(tmp_path / "on" / METRICS) if line["kind"] == "evaluation"]
    for name, score in there[-1]["bits_per_byte"].items():
        assert here[0]["bits_per_byte"][name] == pytest.approx(score, rel=1e-5)

    recipe = yaml.safe_load((tmp_path / "mine" / "mine.yaml").read_text())
    assert recipe["run"]["start_from"] == str(tmp_path / "mine" / "checkpoint")
    written = run_ranks(1, first_words, manifest.recipe, tmp_path)[0]
    assert written.startswith("line 4") and len(written) > len("line 4")


def first_words(rank: int, mapping: dict[str, object], folder: Path) -> str:
    from train.inference.text import stream_text

    os.chdir(folder)
    return "".join(stream_text(recipe_from_mapping(mapping), GenerateConfig(prompt="line 4", tokens=8, temperature=0)))


def test_check_refuses_and_says_where(runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path) -> None:
    text = ["--text", str(runs["gemma2"].parent / "verse")]
    status, output = command(tmp_path, "check", runs["gemma2"], exports["gemma2"], *CHECK, *text)
    assert status == 0 and "39 of 39" not in output and "tensors hold the same numbers" in output, output
    bad = tmp_path / "bad"
    shutil.copytree(exports["gemma2"], bad)
    tensors = load_file(bad / "model.safetensors")
    a, b = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    status, output = command(tmp_path, "check", runs["gemma2"], bad, *CHECK, *text)
    assert status == 1 and "model.layers.1 (ours: layer 2 `*` and 3 `-`) is the first that drifts" in output, output
    assert f"not {a}, {b}" in output and "2 tensors hold other numbers" in output

    status, output = command(tmp_path, "import", bad, "--out", tmp_path / "ours", *CHECK, *text)
    assert status == 0  # the import is right: it has the weights of the changed directory
    config = json.loads((bad / "config.json").read_text()) | {"final_logit_softcapping": None}
    (bad / "config.json").write_text(json.dumps(config))
    status, output = command(tmp_path, "check", runs["gemma2"], bad, *CHECK, *text)
    assert status == 2 and "model.logit_softcap: 3.0 in the checkpoint, None in config.json" in output


def test_a_published_clamp_is_reported_and_does_not_prevent_an_import(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    text = [*CHECK, "--text", str(runs["gemma2"].parent / "verse")]
    clamped = tmp_path / "published"
    shutil.copytree(exports["nemotron_h"], clamped)
    config = json.loads((clamped / "config.json").read_text()) | {"time_step_min": 0.05, "auto_map": {"x": "y.py"}}
    (clamped / "config.json").write_text(json.dumps(config))
    status, output = command(tmp_path, "check", runs["nemotron_h"], clamped, *text)
    assert status == 1 and "--open-clamp compares without" in output, output
    assert command(tmp_path, "check", runs["nemotron_h"], clamped, *text, "--open-clamp")[0] == 0
    status, output = command(tmp_path, "import", clamped, "--out", tmp_path / "mine", *text)
    assert status == 0 and "clamps dt at time_step_min=0.05" in output and "The two agree" in output, output
    status, output = command(
        tmp_path, "export", tmp_path / "mine", "--out", tmp_path / "again", *text, "--dtype", "fp32"
    )
    assert status == 0, output
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", clamped))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "imported_from" in (tmp_path / "again" / "README.md").read_text()


def test_models_that_disagree_are_not_written(runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path) -> None:
    """Two implementations round differently, so at a tolerance near zero they disagree. Bytes are the ids without a tokenizer."""
    bare = tmp_path / "bare"
    shutil.copytree(exports["gemma2"], bare, ignore=shutil.ignore_patterns("*token*"))
    for words in (["export", runs["gemma2"]], ["import", exports["nemotron_h"]]):
        status, output = command(tmp_path, *words, "--out", tmp_path / "x", "--tolerance", "1e-15")
        assert status == 1 and "x was not written" in output, output
        assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))
    status, output = command(tmp_path, "import", bare, "--out", tmp_path / "x")
    assert status == 0 and "ids are the bytes of the text" in output and "The two agree." in output, output


def test_mistakes_are_explained_and_leave_nothing(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    run, out = runs["nemotron_h"], exports["nemotron_h"]
    for words, message in (
        (["export", run, "--out", out], "is not empty. Choose another --out; nothing is overwritten."),
        (["export", tmp_path, "--out", tmp_path / "x"], "is neither a checkpoint"),
        (["import", tmp_path, "--out", tmp_path / "x"], "config.json cannot be read"),
        (["export", run, "--out", tmp_path / "x", "--tokenizer", tmp_path / "none.json"], "no tokenizer at"),
        (["check", run, exports["gemma2"]], "describes a different model than"),
    ):
        status, output = command(tmp_path, *words)
        assert status == 2 and message in output, output
    (tmp_path / "other").mkdir()
    shutil.copyfile(out / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    other = json.loads((out / "tokenizer.json").read_text())
    other["added_tokens"].append(dict(other["added_tokens"][0], id=VOCAB, content="<pad>"))
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    words = ["export", run, "--out", tmp_path / "x", "--tokenizer", tmp_path / "other" / "tokenizer.json"]
    status, output = command(tmp_path, *words)
    assert status == 2 and "this checkpoint was trained with another tokenizer" in output, output
    shutil.copytree(out, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    status, output = command(tmp_path, "import", tmp_path / "pickled", "--out", tmp_path / "x")
    assert status == 2 and "only pickles" in output
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def without_transformers(rank: int, words: list[str], folder: Path) -> tuple[int, str]:
    sys.modules["transformers"] = None  # type: ignore[assignment]
    return call(rank, words, folder)


def test_conversion_works_without_transformers_and_says_it_was_not_compared(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = str(runs["gemma2"])
    words = ["export", run, "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    status, output = run_ranks(1, without_transformers, words, tmp_path)[0]
    assert status == 0 and "NOT COMPARED with transformers" in output and "pip install -e '.[hf]'" in output, output
    assert "**Not compared with transformers**" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    status, output = run_ranks(1, without_transformers, ["check", run, str(tmp_path / "out")], tmp_path)[0]
    assert status == 2 and "pip install -e '.[hf]'" in output


def test_the_recipe_in_the_manifest_is_the_one_in_the_file(exports: dict[str, Path], tmp_path: Path) -> None:
    words = ["import", exports["gemma2"], "--out", tmp_path / "mine", "--no-check", "--vocab-multiple", "64"]
    status, output = command(tmp_path, *words)
    assert status == 0 and "NOT COMPARED" in output and "--no-check was given" in output
    _, manifest = checkpoint_at(tmp_path / "mine" / "checkpoint")
    assert manifest.recipe["model"]["vocab"] == 320
    theirs = json.loads((exports["gemma2"] / "config.json").read_text())["vocab_size"]
    assert manifest.recipe["model"]["vocab_padding"] == 320 - theirs > 0
    composed_mapping = recipe_mapping(recipe_from_mapping(composed(f"--config-dir={tmp_path / 'mine'}", "-cn", "mine")))
    assert composed_mapping["model"] == manifest.recipe["model"] and composed_mapping["data"] == manifest.recipe["data"]
