"""`stratum plan --scale 8,64,512,...`: the best layout for each number of GPUs, and the speed-up.

The rows of a step do not change, so the training result is the same (strong scaling).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from data.system.console import print_table
from data.system.figure import canvas
from launch.plan.cost.device import Device
from launch.plan.goodput import Goodput, goodput_of
from launch.plan.planner import Plan
from launch.plan.search import search
from launch.plan.tables import console
from recipes.schema import units
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import printable
from recipes.schema.recipe import Recipe
from recipes.schema.units import GIB


@dataclass(frozen=True)
class Point:
    """The result for one number of GPUs."""

    gpus: int
    plan: Plan | None
    """The fastest layout; None if none works."""
    goodput: Goodput | None
    reason: str
    """Why no layout works; "" if one does."""


def counts_of(text: str) -> list[int]:
    """The numbers in a text like `8,64,512`, ascending. Raises RecipeError for any other text."""
    words = [word for word in text.replace(",", " ").split() if word]
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise RecipeError(f"--scale {text}: give numbers of GPUs separated by commas, as in --scale 8,64,512.")
    return sorted({int(word) for word in words})


def scale(recipe: Recipe, counts: list[int], *, device: Device, options: argparse.Namespace) -> list[Point]:
    """Find the best layout for each number of GPUs, with its goodput."""
    points = []
    for gpus in counts:
        found = search(recipe, world=gpus, device=device, top=1)
        if found.best:
            plan = found.best[0].plan
            points.append(Point(gpus, plan, goodput_of(plan, options), ""))
        else:
            most = max(found.rejected, key=lambda reason: found.rejected[reason], default="no layout divides them")
            points.append(Point(gpus, None, None, most))
    return points


def show_scale(points: list[Point], recipe: Recipe) -> None:
    """Print a table with one line for each number of GPUs."""
    out = console()
    table = Table(
        title=f"{printable(recipe.run.name)}: {recipe.run.global_rows:,} rows of {recipe.data.row_tokens:,} tokens a step, "
        "best layouts",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for name in ("GPUs", "layout", "s/step", "tokens/s/GPU", "MFU", "of linear", "GiB", "without failures", "goodput",
                 "with failures", "save every"):  # fmt: skip
        table.add_column(name, justify="left" if name == "layout" else "right")
    first = next((point.plan for point in points if point.plan is not None), None)
    for point in points:
        if point.plan is None or point.goodput is None or first is None:
            table.add_row(f"{point.gpus:,}", f"none: {point.reason}")
            continue
        plan, advised = point.plan, point.goodput.advised
        table.add_row(
            f"{point.gpus:,}",
            plan.layout.describe(),
            f"{plan.time.seconds:.3g}",
            f"{plan.tokens_per_s_per_gpu:,.0f}",
            f"{plan.mfu:.0%}",
            f"{plan.tokens_per_s_per_gpu / first.tokens_per_s_per_gpu:.0%}",
            f"{plan.fullest.total / GIB:.1f}",
            units.span(3600 * plan.hours),
            f"{advised.goodput:.1%}",
            units.span(plan.recipe.run.steps * plan.time.seconds / advised.goodput),
            f"{advised.steps:,} steps",
        )
    print_table(out, table)
    out.print(
        "These are predictions: docs/plan.md says how accurate they are, and which failures and save times are assumed."
    )


def scale_json(points: list[Point]) -> list[dict[str, Any]]:
    """The result for scripts."""
    return [
        {"gpus": point.gpus, "works": False, "reason": point.reason}
        if point.plan is None or point.goodput is None
        else {
            "gpus": point.gpus,
            "works": True,
            "layout": point.plan.layout.describe(),
            "step_time_s": point.plan.time.seconds,
            "tokens_per_s_per_gpu": point.plan.tokens_per_s_per_gpu,
            "mfu": point.plan.mfu,
            "memory_gib_per_rank": point.plan.fullest.total / GIB,
            "days": point.plan.hours / 24,
            "goodput": point.goodput.advised.goodput,
            "advised_every_steps": point.goodput.advised.steps,
        }
        for point in points
    ]


def draw_scale(points: list[Point], recipe: Recipe, path: Path) -> None:
    """Draw speed compared with linear scaling, and days with and without failures."""
    good = [(p.gpus, p.plan, p.goodput.advised.goodput) for p in points if p.plan is not None and p.goodput is not None]
    if not good:
        raise RecipeError(f"--picture {path}: no number of GPUs works, so there is nothing to draw.")
    gpus = [count for count, _, _ in good]
    speeds = [plan.tokens_per_s_per_gpu * count for count, plan, _ in good]
    days = [plan.recipe.run.steps * plan.time.seconds / 86400 for _, plan, _ in good]
    with canvas(path, size=(12, 4.8)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(gpus, [speeds[0] * count / gpus[0] for count in gpus], "--", color="#b9b9b9", label="linear")
        left.plot(gpus, speeds, "o-", color="#1f5fa8", label="predicted")
        useful = [speed * share for speed, (_, _, share) in zip(speeds, good, strict=True)]
        left.plot(gpus, useful, "o-", color="#2a9d8f", label="predicted, with failures")
        for count, speed, (_, plan, _) in zip(gpus, speeds, good, strict=True):
            left.annotate(f"{plan.mfu:.0%}", (count, speed), xytext=(0, 8), textcoords="offset points", ha="center")
        left.set_ylabel("tokens/s (numbers: MFU)")
        left.set_title("Speed")
        right.plot(gpus, days, "o-", color="#1f5fa8", label="without failures")
        right.plot(
            gpus, [day / share for day, (_, _, share) in zip(days, good, strict=True)], "o-", color="#2a9d8f",
            label="with failures",
        )  # fmt: skip
        for count, day, (_, _, share) in zip(gpus, days, good, strict=True):
            right.annotate(f"{day / share:,.0f}", (count, day / share), xytext=(4, 5), textcoords="offset points")
        right.set_ylabel("days")
        tokens = recipe.run.steps * recipe.run.global_rows * recipe.data.row_tokens
        right.set_title(f"Time for {tokens / 1e12:,.3g} trillion tokens")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
            axes.set_xlabel("GPUs")
            axes.grid(alpha=0.25)
            axes.margins(x=0.08)
            axes.legend(frameon=False)
        figure.suptitle(f"{recipe.run.name} on {good[0][1].device.name}, the same rows a step for every number of GPUs")
