"""Tasks during training: at their interval, the same at every layout and after a resume, in the record and the report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from shards import random_documents, write_folder
from task_files import CAPITALS, CHOICES, task_in
from tiny import RECIPE, TINY

from recipes.schema.data import SourceConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics
from train import run
from train.build import model_on_ranks, open_tokenizer
from train.checkpoint.manager import checkpoint_at
from train.evaluate.ask import ask
from train.evaluate.decoder import BatchedDecoder
from train.evaluate.score import forward_of_model
from train.evaluate.training_tasks import open_training_tasks
from train.report.summary import write_report

WRITTEN: dict[str, Any] = {"verifier": "contains", "max_new_tokens": 6, "stop": []}
"""Fields of a task whose answers the model writes."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_folder(tmp_path / "data", {"a": [random_documents(300, seed=3)]})
    letters = [{"prompt": prompt, "target": letter} for prompt in ("the", "a lazy", " fox") for letter in "eoa"]
    clozes = [{"prompt": "the quick", "target": " brown fox"}, {"prompt": "a lazy", "target": " dog"}] * 5
    tasks = (
        task_in(tmp_path, CAPITALS, name="capitals", **CHOICES),
        task_in(tmp_path / "cloze", clozes, kind="cloze", name="words"),
        task_in(tmp_path / "letters", letters, kind="generate", name="letters", **WRITTEN),
    )
    return replace(
        RECIPE,
        run=replace(RECIPE.run, folder=str(tmp_path), name="run", device="cpu", steps=5),
        model=replace(TINY, pattern="M-M*", vocab=300),
        data=replace(
            RECIPE.data, folder=str(tmp_path / "data"), row_tokens=64, sources={"a": SourceConfig(path="made")}
        ),
        optim=replace(RECIPE.optim, lr=0.01),
        checkpoint=replace(RECIPE.checkpoint, every_steps=100),
        evaluate=replace(
            RECIPE.evaluate, every_steps=0, tasks=tuple(map(str, tasks)), tasks_every_steps=2, task_items=8
        ),
    )


def trained(rank: int, recipe: Recipe) -> str:
    torch.set_num_threads(1)
    return run.train(recipe).reason


def lines(folder: Path, kind: str) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_metrics(folder / METRICS) if line["kind"] == kind}


def of_checkpoint(rank: int, recipe: Recipe) -> dict[str, dict[str, float]]:
    """The tasks scored on the last checkpoint, in one process, by the command's forward pass."""
    torch.set_num_threads(1)
    folder = Path(recipe.run.folder) / recipe.run.name
    tokenizer, _ = open_tokenizer(recipe)
    with model_on_ranks(recipe, checkpoint_at(folder)[0], device=torch.device("cpu"), rank=0, world=1) as (model, mesh):
        forward = forward_of_model(model, row_tokens=64, microbatch_rows=3, mesh=mesh)
        decoder = BatchedDecoder(model, recipe.model, tokenizer, mesh=mesh)
        found = [
            ask(task, forward=forward, tokenizer=tokenizer, decoder=decoder)
            for task in open_training_tasks(recipe, tokenizer)
        ]
    return {result.name: {name: metric.value for name, metric in result.metrics.items()} for result in found}


def test_tasks_are_scored_at_their_interval_and_survive_a_resume(recipe: Recipe, tmp_path: Path) -> None:
    """At 0, 2, 4 and the end; held-out rows at start and end only. A run stopped after 3 steps gives the same numbers."""
    assert run_ranks(1, trained, recipe) == ["finished"]
    whole = lines(tmp_path / "run", "tasks")
    assert list(whole) == [0, 2, 4, 5] and list(lines(tmp_path / "run", "evaluation")) == [0, 5]
    words = [line["tasks"]["words"] for line in whole.values()]
    assert {entry["items"] for entry in words} == {8} and len({entry["hash"] for entry in words}) == 1
    bits = [entry["metrics"]["bits_per_byte"] for entry in words]
    assert all(one["low"] <= one["value"] <= one["high"] for one in bits) and len({one["value"] for one in bits}) == 4

    ((on_disk,),) = (run_ranks(1, of_checkpoint, recipe),)
    for task, metrics in on_disk.items():
        for name, value in metrics.items():
            assert whole[5]["tasks"][task]["metrics"][name]["value"] == pytest.approx(value, rel=1e-6)

    part = replace(recipe, run=replace(recipe.run, name="part", stop_after_steps=3))
    assert run_ranks(1, trained, part) == ["paused"] and list(lines(tmp_path / "part", "tasks")) == [0, 2]
    assert run_ranks(1, trained, replace(part, run=replace(part.run, stop_after_steps=None))) == ["finished"]
    again = lines(tmp_path / "part", "tasks")
    assert {step: line["tasks"] for step, line in again.items()} == {
        step: line["tasks"] for step, line in whole.items()
    }

    strange = [{"tasks": []}, {"step": 1}, {"step": 2, "tasks": {"a": {"metrics": {"b": 1, "$c$": {}}}, "d": {}}}]
    strange += [{"step": 7, "tasks": {"|x$": {"metrics": {"y": {"value": "?"}, "z": 3}}}}]
    with (tmp_path / "run" / METRICS).open("a") as stream:
        stream.writelines(json.dumps({"kind": "tasks", **line}) + "\n" for line in strange)
    write_report(tmp_path / "run")
    text = (tmp_path / "run" / "summary.md").read_text()
    assert (
        "## Tasks" in text
        and "| letters | score | 8 | " in text
        and "| words | bits_per_byte | 8 | " in text
        and "| capitals | accuracy | 3 | " in text
    )
    assert (tmp_path / "run" / "tasks.png").read_bytes()[:4] == b"\x89PNG"


def test_tensor_and_data_parallel_ranks_score_what_one_process_scores(recipe: Recipe, tmp_path: Path) -> None:
    """Likelihoods and generated answers, of which each data-parallel rank writes and judges its part."""
    assert run_ranks(1, trained, recipe) == ["finished"]
    four = replace(recipe, run=replace(recipe.run, name="four"), parallel=replace(recipe.parallel, tensor=2))
    assert run_ranks(4, trained, four) == ["finished"] * 4
    one, two = (lines(tmp_path / name, "tasks") for name in ("run", "four"))
    assert {0, 1} != {line["tasks"]["letters"]["metrics"]["score"]["value"] for line in one.values()}, (
        "too easy or hard"
    )
    assert list(one) == list(two)
    for step, line in one.items():
        for task, entry in line["tasks"].items():
            for name, metric in entry["metrics"].items():
                found = two[step]["tasks"][task]["metrics"][name]["value"]
                assert found == pytest.approx(metric["value"], rel=1e-4), (step, task, name)
