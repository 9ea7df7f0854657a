"""The commands of the guides and of README.md: all name commands, options, recipes and fields that exist; marked ones run."""

import argparse
import contextlib
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from guides import GUIDES, STORY, blocks, pages, write_files
from recipes_composed import composed

from recipes.schema.read import recipe_from_mapping
from train import stratum
from train.hf.recipe import Imported, recipe_text

ROOT = Path(__file__).resolve().parents[1]


class Parsed(Exception):
    """Raised in place of running a command, when its words are parsed."""


@contextlib.contextmanager
def only_parse() -> Iterator[None]:
    """Commands end with Parsed(their words) as soon as these are parsed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, name)

            def stop(self: Any, *arguments: Any, _original: Any = original, **named: Any) -> Any:
                raise Parsed(_original(self, *arguments, **named))

            patch.setattr(argparse.ArgumentParser, name, stop)
        yield


def parsed(words: list[str]) -> argparse.Namespace:
    """What a command makes of its words. Fails the test if it refuses them."""
    with only_parse(), pytest.raises(Parsed) as found:
        status = stratum.main(words)
        pytest.fail(f"stratum {' '.join(words)}: ended with {status}")
    return found.value.args[0]


def test_commands_of_guides_name_commands_options_recipes_and_fields_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run and every shipped recipe are replaced by the smoke recipe, so that five compositions are enough."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    model = recipe_from_mapping(composed("-cn", "smoke")).model
    base = Imported(
        name="base", source="exports/web8b", checkpoint=Path("imports/base/checkpoint"), model=model, params="fp32",
        tokenizer=None, end_of_document=None, begin_of_document=None, row_tokens=128,
    )  # fmt: skip
    (tmp_path / "imports" / "base" / "base.yaml").write_text(recipe_text(base))
    recipes: dict[tuple[str, ...], dict[str, str]] = {}  # {recipe: {key: override}}: one composition for each recipe
    for page in pages():
        for block in blocks(page):
            for words in block.commands:
                options = parsed(words)
                if not hasattr(options, "config_name"):
                    continue
                fields = [word for word in options.words if "=" in word]
                if block.mark == "run":
                    fields += block.argument.split()
                recipe: tuple[str, ...] = ("-cn", options.config_name or "smoke")
                if options.config_dir:
                    recipe = (f"--config-dir={options.config_dir}", *recipe)
                else:  # a shipped recipe, which other tests compose: here only its overrides count
                    assert (ROOT / "recipes" / f"{recipe[1]}.yaml").is_file(), words
                    recipe = ("-cn", "smoke")
                recipes.setdefault(recipe, {}).update({word.split("=")[0]: word for word in fields})
    assert len(recipes) == 5, recipes.keys()
    for recipe, overrides in recipes.items():
        recipe_from_mapping(composed(*recipe, *overrides.values()))


def _corpus(folder: Path) -> None:
    """Eight plays as parquet and as notes, in the places that the guides name."""
    with gzip.open(ROOT / "data" / "corpora" / "shakespeare.jsonl.gz", "rt") as file:
        plays = [json.loads(line)["text"] for line in file]
    texts = [play[at : at + 4000] for play in plays for at in range(0, len(play), 4000)]
    (folder / "corpus").mkdir()
    (folder / "notes").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"text": texts[part::2]}), folder / "corpus" / f"{part:05d}.parquet", row_group_size=50)
    (folder / "notes" / "mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::3]))


@pytest.mark.slow
def test_marked_commands_of_guides_run_in_order(tmp_path: Path) -> None:
    _corpus(tmp_path)
    for page in STORY:
        for block in blocks(GUIDES / page):
            if block.mark == "file":  # not earlier: an import makes the folder of one of them
                path = tmp_path / block.argument
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            for words in block.commands if block.mark == "run" else []:
                done = subprocess.run(
                    [sys.executable, "-P", "-m", "train.stratum", *words, *block.argument.split()],
                    cwd=tmp_path, capture_output=True, text=True, check=False,
                    env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                )  # fmt: skip
                assert done.returncode == 0, (page, words, done.stdout[-2000:], done.stderr[-2000:])
