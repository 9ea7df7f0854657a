"""A run over phases, a ramp, a source that runs out and best-fit rows: stopped in the middle, it ends as if it had not been."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import RankFailed, run_ranks
from shards import random_documents, write_folder
from tiny import recipe_with

from data import trace
from data.dataset import open_dataset
from data.trace import TraceConfig
from recipes.schema.data import DataConfig, PhaseConfig, SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics

STEPS, GLOBAL = 12, 4


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Shares 3 : 1 up to step 4, moving to 1 : 3 from 5 to 8; source a runs out after 15 rows."""
    documents = random_documents(400, seed=1)
    write_folder(tmp_path / "data", {"a": [documents[:100], documents[100:200]], "b": [documents[200:]]})
    rows = open_dataset(DataConfig(folder=str(tmp_path / "data"), sources={"a": SourceConfig("-")}, row_tokens=64))
    data = DataConfig(
        folder=str(tmp_path / "data"),
        sources={
            "a": SourceConfig("-", weight=3, max_epochs=15 / rows.train[0].count),
            "b": SourceConfig("-", weight=1),
        },
        row_tokens=64,
        packing="best_fit",
        reset_at_documents=True,
        phases=(PhaseConfig(GLOBAL * 64 * 4, {"a": 1, "b": 3}, ramp_tokens=GLOBAL * 64 * 4),),
        on_exhausted="continue",
    )
    changes = {"model.pattern": "M*-", "model.vocab": 304, "run.steps": STEPS, "run.folder": str(tmp_path),
               "checkpoint.every_steps": 5, "evaluate.every_steps": 0, "evaluate.rows_per_source": 2,
               "telemetry.log_every_steps": 1, "telemetry.tensorboard": False}  # fmt: skip
    return replace(recipe_with(**changes), data=data)


def train_run(rank: int, recipe: Recipe) -> str:
    from train.run import train

    return train(recipe).reason


def record(recipe: Recipe, name: str) -> dict[int, tuple[float, float]]:
    lines = read_metrics(Path(recipe.run.folder) / name / METRICS)
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"}


def named(recipe: Recipe, name: str, **changes: object) -> Recipe:
    return replace(recipe, run=replace(recipe.run, name=name, **changes))  # type: ignore[arg-type]


def test_stopped_in_the_middle_of_a_ramp_it_ends_the_same_and_is_traced_both_ways(recipe: Recipe, capsys) -> None:
    refused = replace(recipe, data=replace(recipe.data, on_exhausted="error"))
    from train.build import open_data

    with pytest.raises(DataError, match=r"(?s)source 'a' runs out at step 6 .* max_epochs=.*on_exhausted=continue"):
        open_data(refused)
    assert run_ranks(1, train_run, named(recipe, "parts", stop_after_steps=6)) == ["paused"]
    assert run_ranks(1, train_run, named(recipe, "parts")) == ["finished"]
    assert run_ranks(1, train_run, named(recipe, "whole")) == ["finished"]
    assert record(recipe, "parts") == record(recipe, "whole") and len(record(recipe, "whole")) == STEPS

    folder = Path(recipe.run.folder)
    write_folder(folder / "foreign", {n: [random_documents(200, seed=2)] for n in ("a", "b")}, vocab=290)
    foreign = replace(recipe, data=replace(recipe.data, folder=str(folder / "foreign")))
    with pytest.raises(
        RankFailed, match=r"start_from=.*whole was trained with another tokenizer .*: the same ids stand for other text"
    ):
        run_ranks(1, train_run, named(foreign, "other_words", start_from=str(folder / "whole")))

    dataset = open_dataset(recipe.data)
    seen: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for step in (2, 5, 7, 11):  # before, in the ramp, where a has run out in it, after
        trace._show_step(dataset, TraceConfig(step=step, json=True, chars=10), GLOBAL, steps=STEPS)
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["position"] for row in rows] == list(range((step - 1) * GLOBAL, step * GLOBAL))
        batch = dataset.training_rows(np.arange((step - 1) * GLOBAL, step * GLOBAL))
        assert [dataset.source_names[i] for i in batch.source] == [row["source"] for row in rows]
        assert {row["source"] for row in rows} == ({"a", "b"} if step < 6 else {"b"})
        for row in rows:
            assert sum(piece["tokens"] for piece in row["documents"]) == 64
            for piece in row["documents"]:
                seen.setdefault((row["source"], piece["document"]), set()).add((step, row["position"]))
    for (source, document), places in list(seen.items())[::7]:
        which = dataset.source_names.index(source)
        trace._show_document(dataset, TraceConfig(json=True), which, document, steps=STEPS, global_rows=GLOBAL)
        found = json.loads(capsys.readouterr().out)["seen"]
        assert places <= {(place["step"], place["position"]) for place in found}
