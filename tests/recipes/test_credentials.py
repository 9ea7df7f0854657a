"""Passwords and tokens in URLs reach nothing that is stored or shown: every writer of recipe text, of words and of messages."""

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from recipes_composed import composed
from rules.rooms import sources

from recipes.schema.errors import DataError, Problem
from recipes.schema.manifest import Manifest, manifest_text
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from train import stratum
from train.record.trackers.tracker import TrackedRun
from train.record.trackers.wandb_run import WeightsAndBiases

SECRET = "hunter2"
URL = f"https://me:{SECRET}@127.0.0.1:1/set"
SIGNED = f"s3://bucket/a.jsonl?X-Amz-Signature={SECRET}&token={SECRET}"
WORDS = ["-cn", "smoke", f"data.folder={URL}", f"data.sources.python.path={SIGNED}", f"data.cache.folder=x/{URL}"]
STAGES = f'stages: {{one: "train data.folder={URL}"}}\n'


def test_recipe_text_is_made_in_one_place() -> None:
    """`recipe_mapping` takes credentials out; run folders, checkpoints, exports and W&B get nothing else."""
    wrong = [
        source.path
        for source in sources()
        if source.name != "recipes.schema.read" and re.search(r"asdict\((self\.)?recipe\)|OmegaConf\.save", source.text)
    ]
    assert not wrong


def test_recipe_yaml_manifest_and_weights_and_biases_have_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = recipe_mapping(recipe_from_mapping(composed(*WORDS)))
    assert mapping["data"]["folder"] == "https://127.0.0.1:1/set"
    manifest = manifest_text(
        Manifest(recipe=mapping, step=0, position=0, layout={}, data_hash=None, tokenizer="", kernels={}, lineage={})
    )
    stored: list[object] = []
    backend = SimpleNamespace(Settings=SimpleNamespace, define_metric=lambda *_, **__: None)
    backend.init = lambda **given: (stored.append((given, list(sys.argv))), backend)[1]
    monkeypatch.setitem(sys.modules, "wandb", backend)
    monkeypatch.setattr(sys, "argv", ["stratum", "train", *WORDS])
    WeightsAndBiases(TrackedRun(tmp_path, "mine", 1, mapping), mode="offline", project="stratum")
    for text in (yaml.safe_dump(mapping), manifest, repr(stored)):
        assert "127.0.0.1:1/set" in text and SECRET not in text


@pytest.mark.parametrize(
    "words",
    [
        ["plan", *WORDS],
        ["plan", *WORDS, "--json"],
        ["plan", *WORDS, "run.steps=0"],
        ["plan", *WORDS, f"optim.lr={URL}"],
        ["plan", *WORDS, f"{URL}=3"],
        ["plan", *WORDS, f"--gpus={URL}"],
        ["stages", *WORDS, "--config-dir", "."],
        ["launch", "slurm", *WORDS, "--dry-run"],
        ["launch", "slurm", *WORDS, "--dry-run", "--prepare"],
        ["launch", "local", *WORDS, "--nproc", "3"],
        ["train", *WORDS, "optim.lr=x"],
        ["status", URL],
        ["generate", URL],
    ],
)
def test_no_command_prints_or_writes_credentials(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("# @package _global_\ndefaults: [smoke, _self_]\n" + STAGES)
    if words[0] == "stages":
        words[words.index("smoke")] = "mine"
    with contextlib.suppress(SystemExit):
        stratum.main(list(words))
    shown = capsys.readouterr()
    assert shown.out + shown.err and SECRET not in shown.out + shown.err
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "mine.yaml"]
    assert not [path for path in written if SECRET in path.read_text()]


def test_a_job_script_has_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    """They are in a file that only its owner can read (tests/launch/slurm/test_slurm_script.py)."""
    stratum.main(["launch", "slurm", *WORDS[:3], "--dry-run", "run.microbatch_rows=1"])
    shown = capsys.readouterr()
    assert shown.out + shown.err and SECRET not in shown.out + shown.err


def test_messages_have_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain(DataError(f"{URL} cannot be read")) == 2
    with pytest.raises(SystemExit):
        CommandParser("plan").error(f"{SIGNED} is no number")
    assert SECRET not in str(Problem("data.folder", f"{URL} is empty.", f"Use another than {URL}."))
    assert SECRET not in capsys.readouterr().err
