"""Two executions of a step side by side: equal to the bit, equal to rounding, or the first tensor that differs."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from data.stream import Dataset
from data.system import disk
from recipes.schema.errors import CheckpointError, DataError, RecipeError
from recipes.schema.foreign import printable, read_json
from recipes.schema.options import run_named
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, as_number, read_metrics, recipe_in
from recipes.schema.tools import ReplayConfig
from recipes.schema.typed import FieldError, build
from train.build import open_data
from train.replay.execute import Execution, Statistic, execute, of_run, one_process
from train.resilience.spikes import documents_of_step, named

ROUNDING = 1e-3
"""Largest relative difference of a statistic between executions that differ only in rounding: other kernels, layouts or machines.
Chosen: bf16 has 8 bits of mantissa, 4e-3 for one number, and statistics are means over many."""


def replay(recipe: Recipe, config: ReplayConfig) -> int:
    """Print the comparison. -> exit status."""
    if config.step is None:
        raise RecipeError("no step was given. Use --step N, counted from 1 as in metrics.jsonl.")
    if config.step > recipe.run.steps:
        raise RecipeError(f"--step {config.step}: the run ends at step {recipe.run.steps}. Use a lower number.")
    run = Path(recipe.run.folder) / recipe.run.name
    mine, dataset = _of_run(recipe, run, config.step)
    if config.out is not None:
        disk.write_text(Path(config.out), json.dumps(asdict(mine)))
    if config.against is None:
        other, _ = _of_run(recipe, run, config.step)
        names = ("first", "second")
    elif Path(config.against).is_file():
        other, names = read_execution(Path(config.against)), ("here", printable(config.against))
    else:
        there = run_named(config.against)
        theirs = recipe_from_mapping(recipe_in(there))
        other, _ = _of_run(theirs, there, config.step)
        names = (printable(str(run)), printable(str(there)))
    if other.step != mine.step:
        raise RecipeError(
            f"{config.against} is of step {other.step}, not of step {mine.step}. Name a record of the same step."
        )
    try:
        seen = named(*documents_of_step(dataset, config.step, global_rows=recipe.run.global_rows))
    except (DataError, OSError) as error:
        seen = f"its documents cannot be named: {error}"
    sys.stdout.write(f"step {config.step}: {printable(seen)}\n")
    sys.stdout.writelines(f"{line}\n" for line in _recorded(run, mine))
    sys.stdout.writelines(f"{line}\n" for line in _table(mine, other, names))
    status, verdict = compare(mine, other)
    sys.stdout.write(f"{verdict}\n")
    return status


def _of_run(recipe: Recipe, run: Path, step: int) -> tuple[Execution, Dataset]:
    single = one_process(recipe)
    dataset = of_run(open_data(single), run)
    return execute(single, dataset, run=run, step=step), dataset


def read_execution(path: Path) -> Execution:
    """A file of --out. CheckpointError if it is not one."""
    try:
        plain = read_json(path)
        statistics = tuple(build(Statistic, one, "statistic") for one in plain.pop("statistics"))
        return Execution(**plain, statistics=statistics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FieldError) as error:
        raise CheckpointError(f"{path} is not a record of `stratum replay --out`: {error}") from error


def compare(a: Execution, b: Execution) -> tuple[int, str]:
    """(exit status, verdict): equal to the bit, equal to rounding, or the first tensor that differs."""
    ours = {(one.kind, one.name): one for one in a.statistics}
    theirs = {(one.kind, one.name): one for one in b.statistics}
    if ours.keys() != theirs.keys():
        return 1, "The executions have different tensors: they are of different models."
    pairs = [(one, theirs[key]) for key, one in ours.items()]
    first = next(((x, y) for x, y in pairs if x.digest != y.digest), None)
    if first is None:
        return 0, f"All {len(pairs)} tensors are equal to the bit."
    x, y = first
    where = f"The first tensor that differs: {x.kind} of {x.name} (root mean square {x.rms:.9g} and {y.rms:.9g})."
    worst = max(_relative(x, y) for x, y in pairs)
    if a.place != b.place and worst <= ROUNDING:
        return 0, f"Equal to rounding: no statistic differs by more than {worst:.1e} ({a.place}; {b.place}). {where}"
    return 1, f"{where} The largest relative difference of a statistic is {worst:.1e}."


def _relative(x: Statistic, y: Statistic) -> float:
    if not (math.isfinite(x.rms) and math.isfinite(y.rms)):  # NaN compares as if it were small
        return 0.0 if x.digest == y.digest else math.inf
    scale = max(abs(x.rms), abs(y.rms))
    return abs(x.rms - y.rms) / scale if scale else 0.0


def _recorded(run: Path, mine: Execution) -> Iterator[str]:
    """What the run itself recorded about the step."""
    try:
        lines = [line for line in read_metrics(run / METRICS) if line["kind"] == "step" and line["step"] == mine.step]
    except OSError:
        return
    if lines:
        loss, norm = as_number(lines[-1]["loss"]), as_number(lines[-1]["grad_norm"])
        yield f"{'':24}{'here':>16}{'recorded':>16}"
        yield f"{'loss':24}{mine.loss:>16.9g}{loss:>16.9g}"
        yield f"{'gradient norm':24}{mine.grad_norm:>16.9g}{norm:>16.9g}"


def _table(a: Execution, b: Execution, names: tuple[str, str]) -> Iterator[str]:
    theirs = {(one.kind, one.name): one for one in b.statistics}
    yield f"{'root mean square, largest':58}{names[0]:>26}{names[1]:>26}"
    for one in a.statistics:
        other = theirs.get((one.kind, one.name))
        if one.kind == "weights before" or other is None:
            continue  # they are compared, but do not say anything about the step
        mark = "" if one.digest == other.digest else "  differs"
        cells = "".join(f"{f'{x.rms:.6g}, {x.largest:.6g}':>26}" for x in (one, other))
        yield f"{one.kind + ' ' + one.name:58}{cells}{mark}"
