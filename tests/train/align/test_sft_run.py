"""A run of supervised fine-tuning on prepared chats, from another run's weights: killed in the middle, it ends bit for bit as
undisturbed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from chats import assistant, tokenizer_file, user, write_chats
from killed_runs import Kill, Run, contents_at, recipe_in
from rich.console import Console

from data.dataset import open_dataset
from data.prepare import prepare
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.recipe import Recipe

STEPS = 4


def recipe_of(folder: Path) -> Recipe:
    """A small hybrid on 150 short chats."""
    chats = [[user(f"Say {n}."), assistant(f"{n}!")] for n in range(150)]
    data = DataConfig(
        folder=str(folder / "chats"),
        sources={"chats": SourceConfig(path=str(write_chats(folder / "chats.jsonl", chats)), kind="chat")},
        tokenizer=TokenizerConfig(path=str(tokenizer_file())),
        row_tokens=64,
        reset_at_documents=True,
        heldout_fraction=0.1,
        workers=1,
    )
    prepare(data, console=Console(quiet=True))
    recipe = recipe_in(folder, steps_=STEPS)
    schedule = replace(recipe.schedule, decay=2)
    return replace(recipe, data=data, model=replace(recipe.model, vocab=400), schedule=schedule)


def test_a_killed_stage_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    before = replace(
        recipe, run=replace(recipe.run, name="before", steps=1), schedule=replace(recipe.schedule, warmup=0, decay=1)
    )
    Run(before, 1, folder=tmp_path / "said before").attempt(None)
    ends = []
    for name in ("undisturbed", "killed"):
        stage = replace(recipe, run=replace(recipe.run, name=name, start_from=str(tmp_path / "before")))
        run = Run(stage, 1, folder=tmp_path / f"said {name}")
        if name == "killed":
            assert run.attempt(Kill(steps=2, delay_s=0.0))
        run.attempt(None)
        steps = {line["step"]: line["loss"] for line in run.metrics if line["kind"] == "step"}
        assert sorted(steps) == list(range(1, STEPS + 1))
        ends.append((steps, contents_at(run.checkpoints / f"step_{STEPS:08d}")))
    assert ends[0] == ends[1]

    dataset, rows = open_dataset(recipe.data), recipe.run.global_rows
    labels = {line["step"]: line["labels"] for line in run.metrics if line["kind"] == "step"}
    for step in range(1, STEPS + 1):
        learned = dataset.training_rows(np.arange((step - 1) * rows, step * rows)).learned
        assert learned is not None and 0 < labels[step] == int(learned.sum())
