"""Samples at each held-out evaluation: when, the same at another layout and after a resume, in the record and the report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from shards import random_documents, write_folder
from tiny import RECIPE, TINY

from recipes.schema.data import SourceConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics
from train import run
from train.report.facts import MOST_SAMPLED_STEPS, describe, read_reported

PROMPTS = ("the quick", "a lazy", "")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_folder(tmp_path / "data", {"a": [random_documents(300, seed=3)]})
    return replace(
        RECIPE,
        run=replace(RECIPE.run, folder=str(tmp_path), name="run", device="cpu", steps=5),
        model=replace(TINY, pattern="M-M*", vocab=300),
        data=replace(
            RECIPE.data, folder=str(tmp_path / "data"), row_tokens=64, sources={"a": SourceConfig(path="made")}
        ),
        optim=replace(RECIPE.optim, lr=0.01),
        checkpoint=replace(RECIPE.checkpoint, every_steps=100),
        evaluate=replace(RECIPE.evaluate, every_steps=2, sample_prompts=PROMPTS, sample_tokens=12),
    )


def trained(rank: int, recipe: Recipe) -> str:
    torch.set_num_threads(1)
    return run.train(recipe).reason


def texts(folder: Path) -> dict[int, list[str]]:
    """By step, the prompts checked."""
    found = {}
    for line in read_metrics(folder / METRICS):
        if line["kind"] == "samples":
            assert tuple(sample["prompt"] for sample in line["samples"]) == PROMPTS
            found[line["step"]] = [sample["text"] for sample in line["samples"]]
    return found


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / METRICS) if line["kind"] == "step"]


def test_samples_at_each_evaluation(recipe: Recipe, tmp_path: Path) -> None:
    """At 0, 2, 4 and the end. A resumed run writes the same texts; so do two data-parallel groups of two tensor ranks at step
    0, where the weights are equal to the last bit. The losses are those of a run without samples."""
    assert run_ranks(1, trained, recipe) == ["finished"]
    whole = texts(tmp_path / "run")
    assert list(whole) == [0, 2, 4, 5] and len({tuple(of_step) for of_step in whole.values()}) > 1

    part = replace(recipe, run=replace(recipe.run, name="part", stop_after_steps=3))
    assert run_ranks(1, trained, part) == ["paused"] and list(texts(tmp_path / "part")) == [0, 2]
    assert run_ranks(1, trained, replace(part, run=replace(part.run, stop_after_steps=None))) == ["finished"]
    assert texts(tmp_path / "part") == whole

    none = replace(recipe, run=replace(recipe.run, name="none"), evaluate=replace(recipe.evaluate, sample_prompts=()))
    assert run_ranks(1, trained, none) == ["finished"]
    assert losses(tmp_path / "none") == losses(tmp_path / "run") and not texts(tmp_path / "none")

    four = replace(recipe, run=replace(recipe.run, name="four"), parallel=replace(recipe.parallel, tensor=2))
    assert run_ranks(4, trained, four) == ["finished"] * 4
    assert list(texts(tmp_path / "four")) == list(whole) and texts(tmp_path / "four")[0] == whole[0]

    (tmp_path / "run" / METRICS).open("a").writelines(
        line + "\n"
        for line in (
            '{"kind": "samples", "step": 2, "samples": [{"prompt": "\\u001b[31m", "text": "</script>"}, 3]}',
            '{"kind": "samples", "step": "x", "samples": []}',
            '{"kind": "samples", "step": 3, "samples": 7}',
            *(f'{{"kind": "samples", "step": {n}, "samples": []}}' for n in range(6, 500)),
        )
    )
    shown = describe(read_reported(tmp_path / "run"))["continued"]
    steps = [entry["step"] for entry in shown]
    assert len(steps) <= MOST_SAMPLED_STEPS and steps == sorted(steps) and steps[-1] == 499
