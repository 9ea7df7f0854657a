"""A run in a notebook: the trainer's own loss, activations of every layer, nothing changed on the disk."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from shards import random_documents, write_folder
from teachers import save_teacher
from tiny import RECIPE

from recipes.schema.data import SourceConfig
from recipes.schema.errors import RecipeError
from recipes.schema.ledger import Ledger
from recipes.schema.manifest import MANIFEST, manifest_text, read_manifest
from recipes.schema.read import recipe_mapping, recipe_yaml
from train.build import open_data
from train.notebook import open_run


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file of a run."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def work(rank: int, folder: str) -> dict[str, Any]:
    """What a notebook does; in a process of its own, because Megatron's groups are of the process."""
    with open_run(folder) as run:
        batch = run.batch(2)
        before = run.look(batch)
        same = run.look(batch, modules="output_layer")
        first = run.step(batch, learning_rate=1e-2)
        after = run.look(batch)
        refused = []
        for act in (lambda: run.batch(99), lambda: run.look(batch, modules="nothing")):
            try:
                act()
            except RecipeError as error:
                refused.append(str(error))
        return {
            "rows": tuple(batch.tokens.shape),
            "losses": (before.loss, same.loss, first.loss, after.loss),
            "grad_norm": first.grad_norm,
            "shapes": {name: tuple(value.shape) for name, value in before.activations.items()},
            "logits": [tuple(value.shape) for value in same.activations.values()],
            "step": run.step_of_checkpoint,
            "skips_left_out_rows": np.array_equal(
                batch.tokens, open_data(run.recipe).training_rows(np.arange(8, 12)).tokens
            ),
            "refused": refused,
        }


def test_five_lines_load_a_run_and_a_batch_step_it_and_show_activations(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data", {"one": [random_documents(120, seed=3)]})
    run = tmp_path / "mine"
    recipe = replace(
        RECIPE,
        run=replace(RECIPE.run, folder=str(tmp_path), name="mine"),
        model=replace(RECIPE.model, vocab=300),
        data=replace(RECIPE.data, folder=str(tmp_path / "data"), sources={"one": SourceConfig(path="made by hand")}),
    )
    path = save_teacher(run, recipe, tokenizer=manifest.tokenizer.fingerprint)
    ledger = Ledger(left_out=((4, 8),), rollbacks=1)  # the run went back and left the rows of its second step out
    (path / MANIFEST).write_text(manifest_text(replace(read_manifest(path), ledger=ledger)))
    (run / "recipe.yaml").write_text(recipe_yaml(recipe_mapping(recipe)))
    on_disk = digests(run)
    (found,) = run_ranks(1, work, str(run))
    before, same, first, after = found["losses"]
    assert before == same and first == pytest.approx(
        before, rel=1e-6
    )  # the trainer's loss of the same weights and rows
    assert found["skips_left_out_rows"]
    assert after < before and found["grad_norm"] > 0 and found["step"] == 3
    assert found["rows"] == (4, 64)
    layers = {f"decoder.layers.{i}": (64, 4, 64) for i in range(len(RECIPE.model.pattern))}
    assert found["shapes"] == layers and found["logits"] == [(64, 4, 300)]
    assert "Use 1 to run.steps=8" in found["refused"][0] and "`run.modules()`" in found["refused"][1]
    assert digests(run) == on_disk


def test_a_run_that_learns_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    mapping = recipe_mapping(RECIPE)
    mapping["objective"]["kind"] = "dpo"
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(mapping))
    with pytest.raises(RecipeError, match=r"objective\.kind=dpo"):
        with open_run(tmp_path):
            pass
