"""Tasks that are scored during training (`evaluate.tasks`), with the model that trains.

Tasks without generated text work at any layout. Generated text needs all layers and whole sequences on each tensor rank
(`recipes.schema.tasks.task_problems`); data-parallel ranks share the prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data.tokenizer import Tokenizer
from recipes.schema.errors import NumericsError
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from train.engine import Engine, live_model
from train.evaluate.ask import ask
from train.evaluate.decoder import BatchedDecoder
from train.evaluate.score import forward_of_engine
from train.evaluate.tasks.catalog import open_tasks
from train.evaluate.tasks.task import Task


def open_training_tasks(recipe: Recipe, tokenizer: Tokenizer) -> list[Task]:
    """The recipe's tasks, with every item read and checked before the first step. Raises DataError."""
    config = recipe.evaluate
    return open_tasks(config.tasks, tokenizer=tokenizer, seed=recipe.run.seed, items=config.task_items)


def task_scores(
    engine: Engine, tasks: Sequence[Task], tokenizer: Tokenizer, *, shape: ModelConfig
) -> dict[str, dict[str, Any]]:
    """Hash, items and metrics of each task by name, as metrics.jsonl records them. Collective over the world; the same on
    every rank. shape: of the model. Raises NumericsError if a log-probability is not finite."""
    forward = forward_of_engine(engine)
    decoder = None
    if any(task.judge is not None for task in tasks):
        decoder = BatchedDecoder(live_model(engine), shape, tokenizer, mesh=engine.mesh)
    found = {}
    for task in tasks:
        try:
            result = ask(task, forward=forward, tokenizer=tokenizer, decoder=decoder)
        except NumericsError as error:
            raise NumericsError(f"{error} Continue from an earlier checkpoint with a lower learning rate.") from error
        metrics = {name: asdict(metric) for name, metric in result.metrics.items()}
        found[task.name] = {
            "hash": result.hash, "items": result.items, "cut_contexts": result.cut_contexts, "metrics": metrics,
        }  # fmt: skip
    return found
