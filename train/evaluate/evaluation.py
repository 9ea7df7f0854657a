"""Runs `stratum evaluate`: opens the tasks and the model, scores each task, updates results.json, prints a table.

Each of several processes reads tasks and results.json itself; all score together; rank 0 writes and prints.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from data.system.console import open_console
from data.system.optional_package import optional_package
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.errors import BackendError, CheckpointError, DataError, NumericsError, RecipeError, refuse
from recipes.schema.foreign import printable
from recipes.schema.objective_rules import language_model_problems
from recipes.schema.parallel import ParallelConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_rules import tokenizer_problems
from recipes.schema.tools import EvaluateToolConfig
from train.build import check, mesh_of, model_on_ranks, open_data, open_tokenizer
from train.checkpoint.manager import checkpoint_at
from train.compress.parent import layout_recipe, parent_at, scoring_engine
from train.evaluate.ask import TaskResult, ask
from train.evaluate.contamination import find_overlap, tokenizer_in
from train.evaluate.decoder import BatchedDecoder
from train.evaluate.heldout_preferences import heldout_preferences
from train.evaluate.results import HARNESS, Results, Subject, overlap_table, results_table
from train.evaluate.score import Forward, forward_of_model
from train.evaluate.tasks.catalog import names_of, open_tasks
from train.evaluate.tasks.task import Task
from train.megatron import choose_device, use_device
from train.parallel.mesh import world_from_environment

_MATCHES_SHOWN = 20


@dataclass(frozen=True)
class _Opened:
    """A checkpoint with what is needed to evaluate it."""

    path: Path
    recipe: Recipe
    tokenizer: Tokenizer
    subject: Subject


def evaluate_checkpoint(config: EvaluateToolConfig, place: Path) -> int:
    """Evaluate the newest checkpoint of a run, or the checkpoint itself. -> exit status. Raises StratumError."""
    rank, world = world_from_environment()
    _check_ranks(world, tensor=config.tensor)
    console = open_console(quiet=rank != 0)
    device = choose_device(config.device)
    use_device(device)
    opened = _open(config, place)
    if config.heldout:
        return _evaluate_heldout(config, opened, console, device=device)
    tasks = open_tasks(names_of(config.tasks), tokenizer=opened.tokenizer, seed=config.seed, items=config.items)
    _check_code(tasks, is_allowed=config.run_code)
    harness = [HARNESS + name for name in names_of(config.harness)]
    row_tokens = config.row_tokens or opened.recipe.data.row_tokens
    settings = {"row_tokens": row_tokens, "items": config.items, "seed": config.seed}
    run_harness = _harness() if harness else None
    results = Results(_folder(config, opened.path), opened.subject)
    asked = [*(task.name for task in tasks), *harness]
    if config.resume:
        hashes = {**dict.fromkeys(harness), **{task.name: task.hash for task in tasks}}
        finished = [name for name in asked if results.finished(name, hash=hashes[name], settings=settings)]
        if finished:
            console.print(f"already in results.json: {', '.join(finished)}")
        tasks = [task for task in tasks if task.name not in finished]
        harness = [name for name in harness if name not in finished]
    if tasks or harness:
        with model_on_ranks(
            opened.recipe, opened.path, device=device, rank=rank, world=world, tensor=config.tensor
        ) as (model, mesh):
            forward = forward_of_model(model, row_tokens=row_tokens, microbatch_rows=config.batch_rows, mesh=mesh)
            decoder = BatchedDecoder(model, opened.recipe.model, opened.tokenizer, mesh=mesh)
            asking = _Asking(config, forward, opened.tokenizer, decoder, run_harness)
            for result, seconds in _results(asking, tasks, harness):
                results.add(result, settings=settings, seconds=seconds, is_written=rank == 0)
                asked += [] if result.name in asked else [result.name]  # a group of the harness has many tasks
                _report(result, console, row_tokens=row_tokens, seconds=seconds)
    shown = {name: entry for name, entry in results.tasks.items() if name in asked}
    console.print(results_table(shown, title=f"{opened.path} (step {opened.subject.step:,})"))
    console.print(f"{results.path}")
    return 0


def _evaluate_heldout(config: EvaluateToolConfig, opened: _Opened, console: Console, *, device: torch.device) -> int:
    """Score the held-out preferences of a reward model's own data, in one process. -> exit status."""
    if world_from_environment()[1] > 1:
        raise RecipeError("--heldout runs in one process: start it without torchrun.")
    dataset, parent = open_data(opened.recipe), parent_at(opened.path)
    results = Results(_folder(config, opened.path), opened.subject)
    recipe = layout_recipe(parent, replace(opened.recipe, parallel=ParallelConfig()), world=1)
    began = time.monotonic()
    with (
        mesh_of(recipe, check(recipe, world=1), device=device, rank=0) as mesh,
        scoring_engine(parent, recipe, mesh) as engine,
    ):
        found = heldout_preferences(engine, dataset, rows_per_source=config.heldout)
    if not found:
        raise DataError(
            f"{opened.recipe.data.folder} has no held-out preferences. Set data.heldout_fraction and prepare the data again."
        )
    for result in found:
        results.add(result, settings={"rows": config.heldout}, seconds=time.monotonic() - began)
    shown = {result.name: results.tasks[result.name] for result in found}
    console.print(results_table(shown, title=f"{opened.path} (step {opened.subject.step:,})"))
    console.print(f"{results.path}")
    return 0


def search_data(config: EvaluateToolConfig, folder: Path) -> int:
    """Search a folder of prepared data for the tasks' texts. -> exit status. Raises StratumError."""
    console = open_console()
    tokenizer = tokenizer_in(folder)
    tasks = open_tasks(names_of(config.tasks), tokenizer=tokenizer, seed=config.seed, items=config.items)
    found = find_overlap(tasks, folder)
    for match in found.matches[:_MATCHES_SHOWN]:
        where = f"{match.file} record {match.record:,} (source {match.source}, document {match.document:,})"
        console.print(printable(f"{match.task} {match.item}: {where}: {match.text!r}"))
    count = len(found.matches) + found.left_out
    if count > _MATCHES_SHOWN:
        console.print(f"... and {count - _MATCHES_SHOWN:,} more")
    console.print(overlap_table(found, title=f"{folder}: {found.documents:,} documents, {found.tokens:,} tokens"))
    if config.out is not None:
        console.print(f"{found.write(Path(config.out), folder)}")
    return 0


def _check_ranks(world: int, *, tensor: int) -> None:
    if world % tensor:
        raise RecipeError(
            f"--tensor {tensor} needs a multiple of {tensor} processes, and there {'is' if world == 1 else 'are'} {world}. Start "
            f"them: torchrun --nproc-per-node {tensor} -m train.stratum evaluate ... --tensor {tensor}."
        )


def _open(config: EvaluateToolConfig, place: Path) -> _Opened:
    path, manifest = checkpoint_at(place)
    if not manifest.recipe:
        raise CheckpointError(f"{path} has no recipe, so its model is not known.")
    recipe = recipe_from_mapping(manifest.recipe)
    if config.heldout and recipe.model.head == "vocabulary":
        raise RecipeError(
            f"--heldout {config.heldout}: {path} is a language model. Name tasks instead: --tasks needle-1k."
        )
    if not config.heldout:
        refuse(language_model_problems(recipe.model, place=str(path)))
    if config.tokenizer is not None:
        file = Path(config.tokenizer)
        tokenizer = load_tokenizer(file, recipe.data.tokenizer)
    else:
        tokenizer, file = open_tokenizer(recipe)
    refuse(
        tokenizer_problems(
            str(path),
            manifest.tokenizer,
            tokenizer.fingerprint,
            where=str(file),
            otherwise="give the right --tokenizer",
        ),
        CheckpointError,
    )
    if tokenizer.vocab_size > recipe.model.vocab:
        raise CheckpointError(
            f"{file} has {tokenizer.vocab_size:,} tokens, the model of {path} only {recipe.model.vocab:,}. Give the right "
            f"--tokenizer."
        )
    subject = Subject(str(path), manifest.step, manifest.fingerprint, tokenizer.fingerprint, manifest.recipe)
    return _Opened(path, recipe, tokenizer, subject)


def _folder(config: EvaluateToolConfig, checkpoint: Path) -> Path:
    """Default folder for results: in the run's folder, or next to a checkpoint without a run."""
    if config.out is not None:
        return Path(config.out)
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "evaluations" / checkpoint.name
    return checkpoint.with_name(f"{checkpoint.name}.evaluation")


def _check_code(tasks: list[Task], *, is_allowed: bool) -> None:
    named = ", ".join(task.name for task in tasks if task.runs_code)
    if named and not is_allowed:
        raise BackendError(
            f"{named} runs code that the model wrote. Allow it with --run-code: the code runs without network, in a temporary "
            f"folder, with limits of time and memory."
        )


@dataclass(frozen=True)
class _Asking:
    """The forward pass and the decoder that score tasks."""

    config: EvaluateToolConfig
    forward: Forward
    tokenizer: Tokenizer
    decoder: BatchedDecoder
    run_harness: Callable[..., list[TaskResult]] | None


def _results(asking: _Asking, tasks: list[Task], harness: list[str]) -> Iterator[tuple[TaskResult, float]]:
    """(result, seconds) of each task. CheckpointError if the model's output is NaN or infinite."""
    folder = asking.config.harness_folder
    try:
        for task in tasks:
            began = time.monotonic()
            result = ask(task, forward=asking.forward, tokenizer=asking.tokenizer, decoder=asking.decoder)
            yield result, time.monotonic() - began
        for name in harness:
            assert asking.run_harness is not None
            began = time.monotonic()
            for result in asking.run_harness(
                name.removeprefix(HARNESS),
                folder=None if folder is None else Path(folder),
                forward=asking.forward,
                tokenizer=asking.tokenizer,
                decoder=asking.decoder,
                items=asking.config.items,
            ):
                yield result, time.monotonic() - began
    except NumericsError as error:
        raise CheckpointError(f"{error} Evaluate an earlier checkpoint.") from error


def _harness() -> Callable[..., list[TaskResult]]:
    """The function that runs tasks of lm-evaluation-harness. BackendError if it is not installed."""
    with optional_package("lm_eval", extra="evaluate"):
        from train.evaluate.harness import run_harness  # an optional package, and seconds of imports

        return run_harness


def _report(result: TaskResult, console: Console, *, row_tokens: int, seconds: float) -> None:
    """Print a line for a finished task, and one for contexts that were cut."""
    values = ", ".join(f"{name} {metric.value:.4f}" for name, metric in result.metrics.items())
    console.print(f"{result.name}: {result.items:,} items, {values} ({seconds:.1f} s)")
    if result.cut_contexts:
        console.print(
            f"  warning: {result.cut_contexts:,} contexts lost their beginning, because a row has {row_tokens:,} tokens. Allow "
            f"longer rows with --row-tokens."
        )
