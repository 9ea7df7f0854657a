"""What a run shows and refuses when it is resumed: the table, changed recipes, lost checkpoints, torn pointers, other data,
another tokenizer. Real runs, forked."""

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashes import Act, Half, acts_of_saves, manifest_at
from killed_runs import contents_at, recipe_in
from ranks import RankFailed, run_ranks
from shards import TEXT, tokenizer_entry
from tiny import with_fields

from data.store.manifest import read_manifest, write_manifest
from data.tokenizer import train_tokenizer
from recipes.schema import checkpoint_steps as steps
from recipes.schema.data import SourceConfig, TokenizerConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics
from train.native import fingerprint, kernels, quantize
from train.record import machine
from train.run import train


def go(rank: int, recipe: Recipe) -> None:
    machine.peak_flops = lambda _device: 1e11
    train(recipe)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run of 8 steps on one rank that paused after the fourth, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("audit")
    recipe = recipe_in(folder, steps_=8)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_steps=2))
    run_ranks(1, go, replace(recipe, run=replace(recipe.run, stop_after_steps=4)))
    return folder, recipe


@pytest.fixture
def run(before: tuple[Path, Recipe], tmp_path: Path) -> Recipe:
    """A copy of it."""
    folder, recipe = before
    shutil.copytree(folder / recipe.run.name, tmp_path / recipe.run.name)
    shutil.copytree(folder / "data", tmp_path / "data")
    return changed(recipe, **{"run.folder": str(tmp_path), "data.folder": str(tmp_path / "data")})


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    new: Recipe = with_fields(recipe, changes)
    return new


def start(recipe: Recipe, world: int = 1) -> str:
    """Run to the end. -> the table that was shown."""
    run_ranks(world, go, recipe)
    return next(line["text"] for line in lines_of(recipe)[::-1] if line["kind"] == "audit")


def refusal(recipe: Recipe) -> str:
    """The run's error; it did not start and nothing in its folder changed."""
    folder = Path(recipe.run.folder) / recipe.run.name
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RankFailed) as caught:
        run_ranks(1, go, recipe)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return str(caught.value).split("\ntrain.errors.")[-1].split("\ndata.errors.")[-1]


def lines_of(recipe: Recipe) -> list[dict[str, Any]]:
    return read_metrics(Path(recipe.run.folder) / recipe.run.name / METRICS)


def row(text: str, name: str) -> list[str]:
    """Cells of a row of the table."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name} "))
    return re.split(r" {2,}", line.strip())


def die(rank: int, recipe: Recipe, target: str) -> None:
    """Killed in the middle of writing `target`."""

    def trap(act: Act) -> None:
        if act.name == "writev" and target in act.target:
            raise Half

    with acts_of_saves(trap):
        go(rank, recipe)


def test_a_kill_in_the_first_act_of_a_run_does_not_spoil_its_folder(run: Recipe) -> None:
    new = changed(run, **{"run.name": "new", "run.stop_after_steps": 2})
    folder = Path(new.run.folder) / "new"
    with pytest.raises(RankFailed, match="rank 0 died"):
        run_ranks(1, die, new, "recipe.yaml")
    assert {path.name for path in folder.iterdir()} == {".recipe.yaml.writing", "lease"}
    run_ranks(1, go, new)
    assert contents_at(folder / "checkpoints" / steps.name_of(2)) and not (folder / ".recipe.yaml.writing").exists()


def test_the_table_of_a_resume_shows_step_rows_and_learning_rate(run: Recipe) -> None:
    text = start(run)
    assert text.splitlines()[0].endswith("killed/checkpoints/step_00000004")
    assert row(text, "step") == ["step", "4", "continues with 5 of 8"]
    assert row(text, "tokens")[1] == str(4 * 2 * 16) and row(text, "position")[1] == f"row {4 * 2}"
    # Warm-up 2, decay over the last 4 of 8 steps: the fifth step is the first of the decay.
    rate = next(line["learning_rate"] for line in lines_of(run) if line["kind"] == "step" and line["step"] == 5)
    assert float(row(text, "learning rate")[1]) == float(row(text, "learning rate")[2]) == pytest.approx(rate, rel=1e-5)
    assert row(text, "layout") == ["layout", "TP1 PP1 DP1", "the same"]
    assert row(text, "optimizer") == ["optimizer", "4 updates", "the same"]
    assert row(text, "random state")[-1] == "restored" and row(text, "data")[-1] == "the same"
    assert "note:" not in text and row(text, "run.folder")[-1] == "safe"


def test_another_layout_and_safe_changes_are_reported(run: Recipe) -> None:
    text = start(changed(run, **{"parallel.tensor": 2, "run.device": "cpu", "checkpoint.keep_last": 9}), world=2)
    assert row(text, "layout") == ["layout", "TP1 PP1 DP1", "TP2 PP1 DP1"]
    assert row(text, "random state")[-1] == "seeded by seed and step (another layout)"
    text = start(changed(run, **{"run.steps": 8, "run.microbatch_rows": 2, "checkpoint.keep_last": 9}))
    assert row(text, "run.microbatch_rows") == ["run.microbatch_rows", "1", "2", "safe"]


def test_changes_of_data_order_and_arithmetic_need_a_word(run: Recipe) -> None:
    sources = {**run.data.sources, "one": SourceConfig(path="made by hand", weight=2.0)}
    other_order = changed(run, **{"data.sources": sources})
    said = refusal(other_order)
    assert "data.sources.one.weight: 1.0 in the run's folder, 2.0 now  (changes the data order)" in said
    assert "checkpoint.allow=[data_order]" in said

    both = changed(other_order, **{"optim.lr": 5e-4, "optim.weight_decay": 0.2})
    said = refusal(changed(both, **{"checkpoint.allow": ("data_order",)}))
    assert "optim.lr" in said and "optim.weight_decay" in said and "(changes arithmetic)" in said
    assert "data.sources" not in said and "checkpoint.allow=[arithmetic]" in said

    text = start(changed(both, **{"checkpoint.allow": ("data_order", "arithmetic")}))
    assert row(text, "data.sources.one.weight")[1:] == ["1.0", "2.0", "changes data order (allowed)"]
    assert row(text, "optim.lr")[1:] == ["0.001", "0.0005", "changes arithmetic (allowed)"]
    then, now = (float(cell) for cell in row(text, "learning rate")[1:])
    assert now == pytest.approx(then / 2, rel=1e-5)


def test_another_model_is_refused_even_with_checkpoint_allow(run: Recipe) -> None:
    said = refusal(changed(run, **{"model.ffn": 128, "checkpoint.allow": ("data_order", "arithmetic")}))
    assert "model.ffn: 64 in the run's folder, 128 now  (a fixed property of a run)" in said
    assert "Choose another run.name" in said


def test_a_run_whose_checkpoints_are_gone_does_not_start_fresh(run: Recipe) -> None:
    folder = Path(run.run.folder) / run.run.name
    kept = folder / "checkpoints" / steps.name_of(4)
    shutil.rmtree(folder / "checkpoints" / steps.name_of(2))
    (kept / "manifest.json").write_text("")
    said = refusal(run)
    assert "is complete" in said and str(kept / "manifest.json") in said and "Restore one, or move" in said
    shutil.rmtree(folder / "checkpoints")
    said = refusal(run)
    assert "is a run of 4 steps that wrote checkpoints" in said and "choose another run.name, or move" in said
    (folder / METRICS).unlink()  # nothing tells of checkpoints any more
    run_ranks(1, go, run)
    assert contents_at(folder / "checkpoints" / steps.name_of(8))


@pytest.mark.parametrize(
    ("pointer", "said"),
    [(None, "is missing"), ("", "is empty"), ("step_0000", "says 'step_0000'")],
    ids=["missing", "empty", "torn"],
)
def test_a_damaged_pointer_is_reported_and_loses_nothing(pointer: str | None, said: str, run: Recipe) -> None:
    path = Path(run.run.folder) / run.run.name / "checkpoints" / "latest"
    path.unlink()
    if pointer is not None:
        path.write_text(pointer)
    text = start(run)
    assert row(text, "step")[1] == "4"
    assert f"note: {path} {said}; the newest complete checkpoint is step_00000004" in text
    assert path.read_text() == "step_00000008\n"


def test_other_data_needs_a_word_and_another_tokenizer_is_refused(run: Recipe) -> None:
    folder = Path(run.data.folder)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, request={"made": "again"}))
    said = refusal(run)
    assert f"{run.data.folder} is now" in said and "checkpoint.allow=[data_order]" in said
    text = start(changed(run, **{"checkpoint.allow": ("data_order",)}))
    assert row(text, "data")[-1].endswith("DIFFERENT ROWS from here on (allowed)")

    other = train_tokenizer([TEXT[: len(TEXT) // 3].upper()], TokenizerConfig(vocab_size=290))
    write_manifest(folder, replace(manifest, tokenizer=tokenizer_entry(folder, other)))
    said = refusal(
        changed(run, **{"checkpoint.allow": ("data_order", "arithmetic"), "run.steps": 12, "schedule.total": 8})
    )
    assert f"with another tokenizer ({manifest.tokenizer.fingerprint[:12]})" in said and other.fingerprint[:12] in said
    assert "ids stand for other text" in said


def go_with_plain_kernels(rank: int, recipe: Recipe, ranks: tuple[int, ...]) -> str:
    """As on a machine without a compiler, on some ranks. -> what rank 0 warned of."""
    if rank in ranks:
        os.environ["STRATUM_NATIVE"] = "0"
        for cached in (kernels.library, quantize.library, fingerprint.kernels):
            cached.cache_clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train.run").addHandler(handler)
    go(rank, recipe)
    return "\n".join(said)


def test_other_kernels_change_bits_and_need_a_word(run: Recipe) -> None:
    path = Path(run.run.folder) / run.run.name
    then = manifest_at(path / "checkpoints", 4).kernels
    assert re.fullmatch(r"compiled for \d+ lanes", then)
    assert [line["kernels"] for line in lines_of(run) if line["kind"] in ("machine", "start")] == [then, then]
    with pytest.raises(
        RankFailed, match=rf"trained with kernels {then}, but they are plain torch now, so bits will differ"
    ):
        run_ranks(1, go_with_plain_kernels, run, (0,))
    allowed = changed(run, **{"checkpoint.allow": ("arithmetic",)})
    run_ranks(1, go_with_plain_kernels, allowed, (0,))
    table = next(line["text"] for line in lines_of(run)[::-1] if line["kind"] == "audit")
    assert re.search(rf"kernels +{then} +plain torch +bits will differ \(allowed\)", table), table
    assert manifest_at(path / "checkpoints", 8).kernels == "plain torch"


def test_ranks_that_run_different_kernels_are_named(run: Recipe) -> None:
    said, _ = run_ranks(2, go_with_plain_kernels, changed(run, **{"checkpoint.allow": ("arithmetic",)}), (1,))
    assert re.search(r"different kernels.*compiled for \d+ lanes on rank 0; plain torch on rank 1", said), said
    assert "plain torch on rank 1" in manifest_at(Path(run.run.folder) / run.run.name / "checkpoints", 8).kernels
