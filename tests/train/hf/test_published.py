"""Export restores the files of a published directory: config, generation config, tokenizer files, licence."""

import json
from pathlib import Path

import pytest
import yaml
from hf_command import command
from hf_models import FAMILIES, exported, recipe_of, scrambled, trained
from prepared_files import documents_of
from pruning_folder import shell
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data import prepare as _prepare  # noqa: F401  imported here, so that the processes forked below need not import it
from data.make.corpus import documents
from data.store.manifest import read_manifest
from data.tokenizer import load_tokenizer, train_tokenizer
from recipes.schema.data import SourceConfig, TokenizerConfig
from train import run as _run  # noqa: F401  likewise
from train.compress import commands as _compress  # noqa: F401  likewise
from train.hf import tokens
from train.hf.config import NO_CLAMP

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def add_bos_template(path: Path, bos: str, number: int) -> None:
    """Give a tokenizer.json the template of published ones: a token before every text."""
    parsed = json.loads(path.read_text())
    parsed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    path.write_text(json.dumps(parsed))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories as they are published, of both families."""
    made = {}
    texts = [d.text for d in documents("plays", SourceConfig(path="package:shakespeare", max_bytes=100_000))]
    settings = TokenizerConfig(vocab_size=258, end_of_document="<eos>", special_tokens={"<eos>": 1, "<bos>": 0})
    for family, model in FAMILIES.items():
        root = tmp_path_factory.mktemp(family)
        model = type(model)(**{**vars(model), "vocab": 264})
        path = scrambled(trained(root / "run", recipe_of(model), world=1), root / "scrambled")
        folder = exported(path, root / "theirs", model)
        train_tokenizer(texts, settings).save(folder / "tokenizer.json")
        add_bos_template(folder / "tokenizer.json", "<bos>", 0)
        config = json.loads((folder / "config.json").read_text())
        config |= {"max_position_embeddings": 131072, "eos_token_id": [1, 7], "bos_token_id": 0, "pad_token_id": 1,
                   "transformers_version": "4.48.0", "auto_map": {"AutoModel": "x.Model"}, "made_by": "me"}  # fmt: skip
        if family == "nemotron_h":
            config["time_step_min"] = 0.001
        files = {
            "config.json": config,
            "generation_config.json": {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True},
            "tokenizer_config.json": {"model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast",
                                      "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE},
            "special_tokens_map.json": {"bos_token": "<bos>", "eos_token": "<eos>"},
        }  # fmt: skip
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "LICENSE.md").write_text("Do as you like.")
        (folder / "README.md").write_text("---\nlicense: gemma\nlanguage: [en]\n---\n# Theirs\n")
        made[family] = folder
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_changes_nothing_that_is_not_ours(family: str, published: dict[str, Path], tmp_path: Path) -> None:
    theirs, ours, back = published[family], tmp_path / "ours", tmp_path / "back"
    words = ["--vocab-multiple", "16", "--no-check"]
    status, output = command(tmp_path, "import", theirs, "--out", ours, *words)
    assert status == 0, output
    status, output = command(tmp_path, "export", ours, "--out", back, "--no-check")
    assert status == 0, output
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((back / name).read_text()) == json.loads((theirs / name).read_text()), name
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE.md"):
        assert (back / name).read_bytes() == (theirs / name).read_bytes(), name
    head = yaml.safe_load((back / "README.md").read_text().split("---")[1])
    assert head["license"] == "gemma" and head["language"] == ["en"]
    weights = {name: t for path in theirs.glob("*.safetensors") for name, t in load_file(path).items()}
    again = {name: t for path in back.glob("*.safetensors") for name, t in load_file(path).items()}
    assert weights.keys() == again.keys() and all(weights[name].equal(again[name]) for name in weights)


def test_weights_imported_without_a_tokenizer_go_out_without_one(published: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in published["gemma2"].iterdir():
        if "token" not in path.name and "template" not in path.name:
            (bare / path.name).write_bytes(path.read_bytes())
    assert command(tmp_path, "import", bare, "--out", tmp_path / "ours", "--no-check")[0] == 0
    status, output = command(tmp_path, "export", tmp_path / "ours", "--out", tmp_path / "back", "--no-check")
    assert status == 0 and "imported without a tokenizer" in output, output
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_a_differing_head_of_a_tied_model_is_not_dropped(published: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "untied"
    folder.mkdir()
    (folder / "config.json").write_bytes((published["gemma2"] / "config.json").read_bytes())
    weights = {n: t for path in published["gemma2"].glob("*.safetensors") for n, t in load_file(path).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    status, output = command(tmp_path, "import", folder, "--out", tmp_path / "ours", "--no-check")
    assert status == 2 and "lm_head.weight is not model.embed_tokens.weight" in output, output
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert command(tmp_path, "import", folder, "--out", tmp_path / "ours", "--no-check")[0] == 0


def test_an_exported_tokenizer_gives_a_stranger_the_ids_of_training(published: dict[str, Path], tmp_path: Path) -> None:
    """Prepared data has no `<bos>`, so the files must not add one; nor may they cut texts."""
    path = tmp_path / "tokenizer.json"
    parsed = json.loads((published["gemma2"] / "tokenizer.json").read_text())
    parsed["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(parsed))
    tokenizer = load_tokenizer(path, TokenizerConfig(end_of_document="<eos>"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    tokens.write_tokenizer(tmp_path / "out", path, tokenizer, max_positions=64)
    text = "To be, or not to be"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer.encode(text)


TEXT = "the quick brown fox jumps over the lazy dog, 1234 times\n"
LITTLE = (
    "data.folder=prepared", "~data.sources.shakespeare", "~data.sources.python", "+data.sources.words.path=words.txt",
    "data.row_tokens=32", "run.steps=1", "run.global_rows=1", "schedule.warmup=0", "schedule.decay=0",
    "evaluate.rows_per_source=2", "telemetry.tensorboard=false", "run.threads=1", "data.workers=1",
)  # fmt: skip
CHECK = ("--text", "words.txt", "--tokens", "33", "--rows", "1")


def stratum(folder: Path, family: str, *words: str) -> str:
    """`stratum WORDS` on an import's recipe, in a separate process. -> what it printed."""
    recipe = ["--config-dir", f"imports/{family}", "-cn", family, *LITTLE]
    ((status, text),) = run_ranks(1, shell, folder, [words[0], *words[1:2], *recipe, *words[2:]])
    assert status == 0, text
    return text


@pytest.fixture(scope="module")
def imports(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both families imported, and their text prepared with the same tokenizer."""
    root = tmp_path_factory.mktemp("continued")
    (root / "words.txt").write_text("\n\n".join(f"{n} {TEXT * 3}" for n in range(60)))
    for family, theirs in published.items():
        status, output = command(root, "import", theirs, "--out", f"imports/{family}", *CHECK)
        assert status == 0 and "other special tokens" not in output, output
    stratum(root, "gemma2", "prepare")
    return root


def test_an_import_continues_with_its_begin_of_document_token(imports: Path, published: dict[str, Path]) -> None:
    """After import, preparation, training and export, each document begins with `<bos>`, and so does a text in a plain call."""
    recipe = yaml.safe_load((imports / "imports/gemma2/gemma2.yaml").read_text())
    assert recipe["data"]["tokenizer"]["begin_of_document"] == "<bos>"
    (entry,) = read_manifest(imports / "prepared").sources["words"].splits["train"]
    assert all(ids[0] == 0 and ids[-1] == 1 for ids in documents_of(imports / "prepared", entry))
    stratum(imports, "gemma2", "train", "run.name=on")
    status, output = command(imports, "export", "runs/on", "--out", "on", *CHECK)
    assert status == 0 and "The two agree." in output, output
    tokenizer = load_tokenizer(imports / "imports/gemma2/tokenizer.json", TokenizerConfig(end_of_document="<eos>"))
    theirs = AutoTokenizer.from_pretrained(imports / "on")
    assert all(theirs(text)["input_ids"] == [0, *tokenizer.encode(text)] for text in tokens.ODD_TEXTS)
    assert theirs.chat_template == TEMPLATE and theirs.bos_token_id == 0
    assert (imports / "on/tokenizer.json").read_bytes() == (published["gemma2"] / "tokenizer.json").read_bytes()
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (published["gemma2"], imports / "on")
    )
    assert after == before, "training changes weights only"
    again = load_file(imports / "on/model.safetensors")
    weights = {name: t for path in published["gemma2"].glob("*.safetensors") for name, t in load_file(path).items()}
    assert again.keys() == weights.keys() and not any(weights[name].equal(again[name]) for name in weights)


def test_without_the_begin_token_prepare_and_export_say_so(imports: Path) -> None:
    without = ("data.tokenizer.begin_of_document=null", "data.folder=without")
    assert "template puts '<bos>' before a text" in " ".join(stratum(imports, "gemma2", "prepare", *without).split())
    stratum(imports, "gemma2", "train", "run.name=without", *without)
    status, output = command(imports, "export", "runs/without", "--out", "without_bos", *CHECK)
    assert status == 0 and "puts '<bos>' before a text, but the model was trained with" in output, output
    assert AutoTokenizer.from_pretrained(imports / "without_bos")("the quick")["input_ids"][0] != 0


@pytest.mark.parametrize(("family", "changes"), [
    ("nemotron_h", {"intermediate_size": 64, "mamba_num_heads": 4}),
    ("gemma2", {"intermediate_size": 64}),
])  # fmt: skip
def test_an_import_that_was_pruned_keeps_what_pruning_did_not_change(
    family: str, changes: dict[str, int], imports: Path, published: dict[str, Path]
) -> None:
    sizes = {"intermediate_size": "ffn", "mamba_num_heads": "mamba_heads"}
    target = (f"+compress.{sizes[name]}={value}" for name, value in changes.items())
    settings = (f"run.name={family}_cut", f"+compress.parent=imports/{family}/checkpoint", "+compress.folder=cut",
                "+compress.calibration_rows=2", "+compress.depth_rows=2", *target)  # fmt: skip
    stratum(imports, family, "compress", "score", *settings)
    stratum(imports, family, "compress", "prune", *settings)
    status, output = command(imports, "export", f"cut/{family}_cut", "--out", f"{family}_cut", *CHECK)
    assert status == 0 and "The two agree." in output, output
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (published[family], imports / f"{family}_cut")
    )
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    assert changed.pop("time_step_min", NO_CLAMP) == NO_CLAMP
    assert changed == changes and before.keys() == after.keys()
    card = (imports / f"{family}_cut" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "gemma" and "imported_from" in card
    assert (imports / f"{family}_cut" / "LICENSE.md").exists()


def test_rows_within_one_chunk_prove_no_scan(published: dict[str, Path], tmp_path: Path) -> None:
    status, output = command(tmp_path, "import", published["nemotron_h"], "--out", tmp_path / "ours", "--tokens", "16")
    assert status == 2 and "--tokens 16 is within one chunk of the scan (16 tokens)" in output, output
