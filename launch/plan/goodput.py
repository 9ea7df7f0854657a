"""`stratum plan --goodput`: how often a run should save, and what share of its time is useful if nodes fail.

By default, the times to save and load come from the plan, and nodes fail as often as in the training of Llama 3.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from data.system.console import print_table
from data.system.figure import canvas
from launch.plan.cost.goodput import (
    LLAMA_NODE_MTBF_S,
    Failures,
    Outcome,
    Saving,
    best_interval,
    daly_interval,
    expected_goodput,
    longest_interval,
    simulate,
    young_interval,
)
from launch.plan.planner import STORAGE_PER_NODE, Plan
from launch.plan.tables import console
from recipes.schema import units
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import printable

_MARKS = ("#b02a30", "#e9a23b", "#2a9d8f", "#8a5a9e", "#555555")
RESTART_S = 300.0
"""Seconds from a failure until all processes run again. An assumption: a dead process is detected at once, a hang after
`launch.timeout_s`; scheduling, imports and connections take the rest."""


@dataclass(frozen=True)
class Choice:
    """One save interval and its result."""

    name: str
    steps: int
    """Steps between saves."""
    saving: Saving
    goodput: float
    """Expected share of useful time."""
    simulated: Outcome


@dataclass(frozen=True)
class Goodput:
    """Goodput of a planned run at several save intervals."""

    failures: Failures
    nodes: int
    node_mtbf_s: float
    choices: tuple[Choice, ...]
    memory: float
    """Expected goodput with copies of the state in other nodes' memory instead of on storage."""

    @property
    def advised(self) -> Choice:
        """The longest interval that loses at most 0.1 % compared with the best."""
        return self.choices[-1]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `--goodput`."""
    group = parser.add_argument_group("goodput", "a run with failures (docs/plan.md)")
    group.add_argument("--goodput", action="store_true", help="best save interval, and expected share of useful time")
    group.add_argument(
        "--node-mtbf-hours", type=float, metavar="H", default=LLAMA_NODE_MTBF_S / 3600,
        help="hours a node runs between failures that interrupt the job (default: 6,335, as Llama 3's did)",
    )  # fmt: skip
    group.add_argument(
        "--restart-s", type=float, metavar="S", default=RESTART_S,
        help="seconds from a failure until all processes run again (default: 300)",
    )  # fmt: skip
    for name, text in (("load", "to read a checkpoint"), ("stall", "that training waits for a save"),
                       ("write", "to write a save in the background")):  # fmt: skip
        group.add_argument(f"--{name}-s", type=float, metavar="S", help=f"seconds {text} (default: as planned)")


def goodput_of(plan: Plan, options: argparse.Namespace) -> Goodput:
    """Expected and simulated goodput at the recipe's save interval and at recommended ones. Raises RecipeError for negative
    times."""
    for name in ("node_mtbf_hours", "restart_s", "load_s", "stall_s", "write_s"):
        value = getattr(options, name)
        if value is not None and (value < 0 or (name == "node_mtbf_hours" and value == 0)):
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: use a number above 0.")
    nodes = max(1, -(-plan.layout.world // plan.device.node))
    mean = options.node_mtbf_hours * 3600 / nodes
    load = load_seconds(plan) if options.load_s is None else options.load_s
    failures = Failures(mean, options.restart_s, load)
    stall = plan.checkpoints.stall_s if options.stall_s is None else options.stall_s
    write = plan.checkpoints.write_s if options.write_s is None else options.write_s
    step = plan.time.seconds
    best = best_interval(failures, stall_s=stall, write_s=write)
    intervals: list[tuple[str, float]] = []
    if plan.recipe.checkpoint.every_steps:
        intervals.append(("the recipe's", plan.recipe.checkpoint.every_steps * step))
    intervals += [
        ("Young's", young_interval(failures, stall)),
        ("Daly's", daly_interval(failures, stall)),
        ("best", best),
        ("advised", longest_interval(failures, stall_s=stall, write_s=write)),
    ]
    choices = []
    for name, seconds in intervals:
        steps = max(1, round(seconds / step))
        saving = Saving(steps * step, stall, write)
        choices.append(
            Choice(name, steps, saving, expected_goodput(failures, saving), simulate(failures, saving, count=20_000))
        )
    return Goodput(failures, nodes, options.node_mtbf_hours * 3600, tuple(choices), _in_memory(plan, failures, stall))


def load_seconds(plan: Plan) -> float:
    """Seconds in which the ranks of a node read their state: weights (each data-parallel copy reads them), masters, moments."""
    rank = plan.fullest
    node = (rank.weights + rank.masters + rank.moments) * min(plan.device.node, plan.layout.world)
    return node / STORAGE_PER_NODE


def _in_memory(plan: Plan, failures: Failures, stall: float) -> float:
    """Expected goodput if each node keeps a copy of its state in the memory of one other node, and each failure leaves a copy."""
    rank = plan.fullest
    seconds = (rank.weights + rank.masters + rank.moments) / plan.device.network
    near = replace(failures, load_s=seconds)
    interval = best_interval(near, stall_s=stall, write_s=seconds)
    return expected_goodput(near, Saving(interval, stall, seconds))


def show_goodput(found: Goodput, plan: Plan) -> None:
    """Print the result."""
    out = console()
    failures = found.failures
    out.print(
        f"Goodput: {found.nodes:,} node{'s' * (found.nodes > 1)}, each fails every {found.node_mtbf_s / 3600:,.0f} h: one "
        f"failure every {units.span(failures.mean_s)}. A restart takes {failures.restart_s:,.0f} s, loading "
        f"{failures.load_s:,.0f} s. A save stalls training for {found.choices[0].saving.stall_s:.2g} s and is durable "
        f"{found.choices[0].saving.write_s:.2g} s later."
    )
    table = Table(title="Share of useful time", title_justify="left", title_style="bold")
    for name in (
        "save every",
        "steps",
        "seconds",
        "expected",
        "simulated",
        "stalls",
        "repeated",
        "restarts",
        "whole run",
    ):
        table.add_column(name, justify="left" if name == "save every" else "right")
    seconds = plan.recipe.run.steps * plan.time.seconds
    for choice in found.choices:
        simulated = choice.simulated
        share = [part / simulated.elapsed for part in (simulated.stalled, simulated.lost, simulated.restarting)]
        table.add_row(
            choice.name,
            f"{choice.steps:,}",
            f"{choice.saving.interval_s:,.0f}",
            f"{choice.goodput:.2%}",
            f"{simulated.goodput:.2%} ± {2 * simulated.error:.2%}",
            *[f"{part:.2%}" for part in share],
            units.span(seconds / choice.goodput) if choice.goodput > 1e-6 else "never",
        )
    print_table(out, table)
    advised = found.advised
    expected = seconds / advised.goodput / failures.mean_s if advised.goodput > 1e-6 else float("inf")
    busy = min(1.0, advised.saving.write_s / advised.saving.cycle_s)
    out.print(
        f"Advised: checkpoint.every_steps={advised.steps}, the longest interval within 0.1 % of the best (storage is busy "
        f"{busy:.1%} of the time). Expect about {expected:,.1f} failures until the last step. With copies of the state in "
        f"other nodes' memory (run.memory_copies) the share would be {found.memory:.2%}."
    )


def goodput_json(found: Goodput) -> dict[str, Any]:
    """The result for scripts: seconds and shares."""
    return {
        "nodes": found.nodes,
        "failures": asdict(found.failures),
        "choices": [
            {"name": c.name, "every_steps": c.steps, **asdict(c.saving), "goodput": c.goodput, "simulated": c.simulated.goodput,
             "standard_error": c.simulated.error}
            for c in found.choices
        ],
        "advised_every_steps": found.advised.steps,
        "goodput": found.advised.goodput,
        "goodput_with_memory_copies": found.memory,
    }  # fmt: skip


def draw_goodput(found: Goodput, plan: Plan, path: Path) -> None:
    """Draw goodput against the save interval: the expected curve and the simulated choices."""
    first = found.choices[0].saving
    shortest = min(choice.saving.interval_s for choice in found.choices)
    span = [shortest / 30 * 10 ** (k / 60) for k in range(240)]
    with canvas(path, size=(8, 4.8)) as figure:
        axes = figure.subplots()
        curve = [expected_goodput(found.failures, replace(first, interval_s=interval)) for interval in span]
        axes.plot(span, curve, color="#1f5fa8", label="expected")
        named: dict[int, list[Choice]] = {}
        for choice in found.choices:
            named.setdefault(choice.steps, []).append(choice)
        for (steps, same), color in zip(named.items(), _MARKS, strict=False):
            axes.errorbar(
                same[0].saving.interval_s, same[0].simulated.goodput, yerr=2 * same[0].simulated.error, fmt="o", color=color,
                label=f"{', '.join(choice.name for choice in same)}: {steps:,} steps, {same[0].goodput:.2%}", capsize=3,
            )  # fmt: skip
        worst = min(choice.goodput for choice in found.choices)
        axes.set_xscale("log")
        axes.set_ylim(max(0.0, 1 - 4 * (1 - worst)), 1 + 0.2 * (1 - worst))
        axes.set_xlabel("seconds of training between saves")
        axes.set_ylabel("share of useful time")
        axes.set_title(
            f"{printable(plan.recipe.run.name)} on {plan.layout.world:,} x {plan.device.name}: a failure every "
            f"{units.span(found.failures.mean_s)}"
        )
        axes.legend(frameon=False, loc="lower center")
        axes.grid(alpha=0.25)
