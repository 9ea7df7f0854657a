"""Scores of a merged model: held-out bits per byte, or tasks. Each is one number a part, and their mean decides."""

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from data.stream import Dataset
from data.tokenizer import Tokenizer
from recipes.schema.errors import NumericsError, RecipeError, refuse
from recipes.schema.objective_rules import language_model_problems
from recipes.schema.parallel import ParallelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_rules import tokenizer_problems
from recipes.schema.tools import MergeConfig
from train.build import check, mesh_of, model_on_ranks, open_data, open_tokenizer
from train.compress.parent import layout_recipe, parent_at, scoring_engine
from train.evaluate.ask import ask
from train.evaluate.decoder import BatchedDecoder
from train.evaluate.heldout_preferences import heldout_preferences
from train.evaluate.losses import heldout_bits_per_byte
from train.evaluate.score import forward_of_model
from train.evaluate.tasks.catalog import names_of, open_tasks
from train.evaluate.tasks.task import Task
from train.megatron import choose_device, use_device

HELDOUT = "heldout"
_BATCH_ROWS = 8


@dataclass(frozen=True)
class Scores:
    """Score of each part: a source of held-out data, or a task."""

    parts: dict[str, float]

    @property
    def mean(self) -> float:
        """The number that decides."""
        return statistics.fmean(self.parts.values())


class Scorer(Protocol):
    """Scores a run folder with a merged model."""

    higher_is_better: bool

    def __call__(self, run: Path) -> Scores:
        """The scores of its newest checkpoint. Raises StratumError; NumericsError if the model's numbers are not finite."""


def open_scorer(config: MergeConfig, recipe: Recipe, *, tokenizer: str, place: str) -> Scorer:
    """What `--evaluate` asks for, opened before any model is merged, so that its errors come first.

    tokenizer: fingerprint of the models' tokenizer, empty if unknown. place: a model, for messages. Raises StratumError.
    """
    device = choose_device(config.device)
    use_device(device)
    if config.evaluate == HELDOUT:
        dataset = open_data(recipe)
        _check_tokenizer(place, tokenizer, dataset.tokenizer.fingerprint, recipe.data.folder)
        return _Heldout(dataset, device=device, rows=config.rows)
    refuse(language_model_problems(recipe.model, place=f"--evaluate {config.evaluate}: {place}", key="--evaluate"))
    opened, file = open_tokenizer(recipe)
    _check_tokenizer(place, tokenizer, opened.fingerprint, str(file))
    tasks = open_tasks(names_of(config.evaluate), tokenizer=opened, seed=config.seed, items=config.items)
    if running := ", ".join(task.name for task in tasks if task.runs_code):
        raise RecipeError(f"--evaluate {running} would run code that the model wrote. Choose other tasks for a sweep.")
    return _Tasks(tasks, opened, device=device)


def _check_tokenizer(place: str, trained_with: str, ours: str, where: str) -> None:
    refuse(
        tokenizer_problems(place, trained_with, ours, where=where, otherwise="score with tasks of its own tokenizer")
    )


class _Heldout:
    """Bits per byte of each source of held-out data; of a reward model the loss of its pairs."""

    higher_is_better = False

    def __init__(self, dataset: Dataset, *, device: torch.device, rows: int) -> None:
        self._dataset, self._device, self._rows = dataset, device, rows

    def __call__(self, run: Path) -> Scores:
        parent = parent_at(run)
        recipe = layout_recipe(parent, replace(parent.recipe, parallel=ParallelConfig()), world=1)
        layout = check(recipe, world=1)
        with (
            mesh_of(recipe, layout, device=self._device, rank=0) as mesh,
            scoring_engine(parent, recipe, mesh) as engine,
        ):
            if parent.recipe.model.head == "scalar":
                results = heldout_preferences(engine, self._dataset, rows_per_source=self._rows)
                found = {one.name: one.metrics["loss"].value for one in results}
            else:
                found = heldout_bits_per_byte(engine, self._dataset, rows_per_source=self._rows)
        return _finite(found)


class _Tasks:
    """The first metric of each task."""

    def __init__(self, tasks: list[Task], tokenizer: Tokenizer, *, device: torch.device) -> None:
        """RecipeError if one task's metric should be high and another's low: their mean says nothing."""
        self._tasks, self._tokenizer, self._device = tasks, tokenizer, device
        low = [task.name for task in tasks if task.kind == "rolling"]
        if low and len(low) < len(tasks):
            raise RecipeError(
                f"--evaluate: {', '.join(low)} gives bits per byte and other tasks shares. Name tasks of one kind."
            )
        self.higher_is_better = not low

    def __call__(self, run: Path) -> Scores:
        parent = parent_at(run)
        with model_on_ranks(parent.recipe, parent.path, device=self._device, rank=0, world=1, tensor=1) as (
            model,
            mesh,
        ):
            row_tokens = parent.recipe.data.row_tokens
            forward = forward_of_model(model, row_tokens=row_tokens, microbatch_rows=_BATCH_ROWS, mesh=mesh)
            decoder = BatchedDecoder(model, parent.recipe.model, self._tokenizer, mesh=mesh)
            found = {}
            for task in self._tasks:
                metrics = ask(task, forward=forward, tokenizer=self._tokenizer, decoder=decoder).metrics
                found[task.name] = next(iter(metrics.values())).value
        return _finite(found)


def _finite(found: dict[str, float]) -> Scores:
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise NumericsError(f"the score of {', '.join(bad)} is not finite: the merged model's numbers overflow.")
    return Scores(found)
