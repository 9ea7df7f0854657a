"""Fit the planner's constants again: `python -m tests.bench.planner_fit`. Prints them, with errors of fit, test and the other
two thirds fitted instead (cross-validation). Nothing is written: constants go by hand into launch/plan/cost/efficiency.py and
launch/plan/published/software.py.

    python -m tests.bench.planner_fit                            the three thirds
    python -m tests.bench.planner_fit --leave-out publisher      one publisher at a time (model, gpu): fitted on the others' rows
    python -m tests.bench.planner_fit --experts                  only the constants of experts; and each family of models left out

The first row of every third configuration of each source is fitted on. A row weighs 1 over the root of how many its publisher
has of its GPU generation and format, so that no publisher rules a constant. Coordinate descent on the mean absolute log error,
capped at 0.5 so that no row rules. Leaving out starts from values that know no row (`NEUTRAL`): a constant none of the remaining
rows speaks of takes its nearest relative's value (`RELATIVES`).
"""

import argparse
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from launch.plan.cost.efficiency import Efficiency
from launch.plan.cost.time import Setting, step_time
from launch.plan.published import software as programs
from launch.plan.published.rows import PUBLISHED, PUBLISHED_LATER, OutOfScope, Published, published, read_rows
from launch.plan.published.validate import FIT_EVERY, Line, configuration, publisher, rank_correlations

HARDWARE = (
    ("ampere", "bf16"), ("hopper", "bf16"), ("hopper", "fp8"), ("blackwell", "bf16"), ("blackwell", "fp8"),
    ("blackwell", "fp4"), ("blackwell_ultra", "fp8"),
)  # fmt: skip
ATTENTION = ("ampere", "hopper", "blackwell")
SOFTWARE = {
    "foundry elementwise": programs.FOUNDRY.elementwise,
    "titan products": programs.TITAN.products,
    "2023 products on hopper": programs.FOUNDRY_HOPPER.products,
    "2023 attention on hopper": programs.FOUNDRY_HOPPER.attention,
}
HIGHEST = {"titan products": 1.0, "2023 products on hopper": 1.0, "2023 attention on hopper": 1.0, "hopper bf16": 0.80}
NEUTRAL = {name: 0.65 for name in (f"{generation} {form}" for generation, form in HARDWARE)} | {
    "ampere attention": 0.35, "hopper attention": 0.35, "blackwell attention": 0.35, "foundry elementwise": 1.5,
    "titan products": 1.0, "2023 products on hopper": 1.0, "2023 attention on hopper": 1.0,
}  # fmt: skip
RELATIVES = {
    "blackwell_ultra fp8": "blackwell fp8", "blackwell fp8": "hopper fp8",
    "blackwell bf16": "hopper bf16", "blackwell fp4": "blackwell fp8", "hopper bf16": "ampere bf16", "hopper fp8": "hopper bf16",
    "ampere bf16": "hopper bf16", "blackwell attention": "hopper attention", "hopper attention": "ampere attention",
    "ampere attention": "hopper attention",
}  # fmt: skip

EXPERTS = {
    "route": Efficiency().route, "expert hybrid": Efficiency().expert_hybrid,
    "expert host": programs.TUNED.expert_s, "expert graph": programs.GRAPH_S,
}  # fmt: skip
NEUTRAL |= {"route": 1.0, "expert hybrid": 1.0, "expert host": 1e-3, "expert graph": 1e-3}

Constants = dict[str, float]
Known = tuple[dict[str, str], Published]


def main() -> int:
    """Fit, test, cross-validate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--leave-out", choices=("publisher", "model", "gpu"), help="refit without each, predict it")
    parser.add_argument(
        "--experts", action="store_true", help="fit only the constants of experts, on rows with experts"
    )
    own = parser.parse_args()
    wanted = own.leave_out
    known: list[Known] = []
    for row in (row for file in (PUBLISHED, PUBLISHED_LATER) for row in read_rows(file)):
        try:
            known.append((row, published(row)))
        except OutOfScope:
            continue
    order: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    first: dict[tuple[str, ...], Known] = {}
    for row, found in known:
        key = configuration(row, found)
        if key not in first:
            first[key] = (row, found)
            order[row["src"]].append(key)
    place = {key: index for keys in order.values() for index, key in enumerate(keys)}
    if own.experts:
        fit_experts(known, first, place)
        return 0
    if wanted is not None:
        leave_out(wanted, known, first, place)
        return 0
    for turn in range(FIT_EVERY):
        fit = [one for key, one in first.items() if place[key] % FIT_EVERY == turn]
        test = [one for one in known if place[configuration(*one)] % FIT_EVERY != turn]
        constants = descend(fit, present())
        sys.stdout.write(f"third {turn + 1}: fitted on {len(fit)} rows {score(fit, constants)}; ")
        sys.stdout.write(f"tested on {len(test)} {score(test, constants)}\n")
        sys.stdout.write("".join(f"    {name:28} {value:.3f}\n" for name, value in constants.items()))
        sys.stdout.flush()
    return 0


def leave_out(
    what: str, known: Sequence[Known], first: dict[tuple[str, ...], Known], place: dict[tuple[str, ...], int]
) -> None:
    """Fit without each publisher, model or GPU generation and predict its rows."""
    group: dict[str, Callable[[Known], str]] = {
        "publisher": lambda one: publisher(one[0]),
        "model": lambda one: _family(one[0]["model"]),
        "gpu": lambda one: one[1].setting.device.generation,
    }
    of = group[what]
    fitting = [one for key, one in first.items() if place[key] % FIT_EVERY == 0]
    every: list[float] = []
    for name in sorted({of(one) for one in known}):
        out = [one for one in known if of(one) == name]
        fit = [one for one in fitting if of(one) != name]
        constants = with_relatives(descend(fit, dict(NEUTRAL), passes=12), fit)
        found = errors(out, constants)
        every += found
        lines = [
            Line(row, one, "", False, one.tokens_per_s / (1 + error), None)
            for (row, one), error in zip(out, found, strict=True)
        ]
        ranks = [rho for rho, _ in rank_correlations(lines).values()]
        rank = f"{statistics.median(ranks):.2f} ({len(ranks)})" if ranks else ""
        sys.stdout.write(
            f"| {name} | {len(out)} | {statistics.median(map(abs, found)):.1%} | {statistics.median(found):+.1%} | "
            f"{sum(abs(e) < 0.15 for e in found) / len(found):.0%} | {rank} |\n"
        )
        sys.stdout.flush()
    within = sum(abs(e) < 0.15 for e in every) / len(every)
    sys.stdout.write(
        f"all: {len(every)} rows, median {statistics.median(map(abs, every)):.1%}, within 15 % {within:.0%}\n"
    )


def fit_experts(known: Sequence[Known], first: dict[tuple[str, ...], Known], place: dict[tuple[str, ...], int]) -> None:
    """Fit the constants of experts on each third, then without each family of models, whose rows are predicted."""
    rows = [one for one in known if has_experts(one[1].setting)]
    distinct = [one for one in first.values() if has_experts(one[1].setting)]
    start = present() | {name: NEUTRAL[name] for name in EXPERTS}
    sys.stdout.write(
        f"neutral: {len(rows)} rows {score(rows, start)}; the constants in the code {score(rows, present())}\n"
    )
    for turn in range(FIT_EVERY):
        fit = [one for one in distinct if place[configuration(*one)] % FIT_EVERY == turn]
        test = [one for one in rows if place[configuration(*one)] % FIT_EVERY != turn]
        constants = descend(fit, start, only=EXPERTS, passes=14)
        sys.stdout.write(f"third {turn + 1}: fitted on {len(fit)} rows {score(fit, constants)}; ")
        sys.stdout.write(f"tested on {len(test)} {score(test, constants)}\n")
        sys.stdout.write("".join(f"    {name:28} {constants[name]:.5f}\n" for name in EXPERTS))
        sys.stdout.flush()
    every: list[float] = []
    for name in sorted({_family(row["model"]) for row, _ in rows}):
        out = [one for one in rows if _family(one[0]["model"]) == name]
        fit = [one for one in distinct if _family(one[0]["model"]) != name]
        found = errors(out, descend(fit, start, only=EXPERTS, passes=14))
        every += found
        sys.stdout.write(f"| without {name} | {len(out)} | {statistics.median(map(abs, found)):.1%} | ")
        sys.stdout.write(f"{statistics.median(found):+.1%} |\n")
        sys.stdout.flush()
    sys.stdout.write(f"all families: {len(every)} rows, median {statistics.median(map(abs, every)):.1%}\n")


def has_experts(setting: Setting) -> bool:
    return any("E" in stage for stage in setting.stages)


def _family(model: str) -> str:
    """Llama, Nemotron, GPT, MPT ...: the first word of a model's name; a size alone is nanotron's."""
    word = model.split()[0].split("-")[0].split("_")[0].rstrip("0123456789.").lower()
    return word or "nanotron"


def present() -> Constants:
    """The constants as they stand in the code."""
    now = Efficiency()
    found = {f"{generation} {form}": now.gemm[generation][form] for generation, form in HARDWARE}
    found |= {f"{generation} attention": now.attention[generation] for generation in ATTENTION}
    return found | SOFTWARE | EXPERTS


def with_constants(setting: Setting, constants: Constants) -> Setting:
    """A row's setting under other constants."""
    now = Efficiency()
    gemm = {generation: dict(forms) for generation, forms in now.gemm.items()}
    for generation, form in HARDWARE:
        gemm[generation][form] = constants[f"{generation} {form}"]
    gemm["blackwell_ultra"]["bf16"] = constants["blackwell bf16"]
    attention = dict(now.attention) | {name: constants[f"{name} attention"] for name in ATTENTION}
    attention["blackwell_ultra"] = attention["blackwell"]
    software = setting.software
    changes: dict[str, Any] = {}
    is_hopper = setting.device.generation == "hopper"
    if software.name == "llm-foundry":
        changes["elementwise"] = constants["foundry elementwise"]
        if is_hopper:
            changes["products"] = constants["2023 products on hopper"]
            changes["attention"] = constants["2023 attention on hopper"]
    elif software.name == "nanotron":
        changes["elementwise"] = constants["foundry elementwise"]
        changes["attention"] = constants["2023 attention on hopper"]
    elif software.name == "torchtitan":
        changes["elementwise"] = constants["foundry elementwise"]
        if is_hopper:
            changes["attention"] = constants["2023 attention on hopper"]
        changes["products"] = constants["titan products"]
    if software.expert_s == programs.TUNED.expert_s:
        changes["expert_s"] = constants["expert host"]
    elif software.expert_s == programs.GRAPH_S:
        changes["expert_s"] = constants["expert graph"]
    efficiency = replace(
        now,
        gemm=gemm,
        attention=attention,
        route=constants["route"],
        expert_hybrid=constants["expert hybrid"],
    )
    return replace(setting, software=replace(software, **changes), efficiency=efficiency)


def depends_on(setting: Setting) -> tuple[str, ...]:
    """The constants a row speaks of."""
    device, software = setting.device.generation, setting.software.name
    family = device.removesuffix("_ultra")
    names = [f"{family} attention", f"{family} bf16"]
    if setting.low is not None:
        names.append(f"{device} {setting.low}")
    if software in ("llm-foundry", "nanotron", "torchtitan"):
        names.append("foundry elementwise")
        if device == "hopper":
            names += ["2023 attention on hopper"] + (["2023 products on hopper"] if software == "llm-foundry" else [])
    if software == "torchtitan":
        names += ["titan products"]
    if has_experts(setting):
        names += ["route", "expert graph" if setting.software.expert_s == programs.GRAPH_S else "expert host"]
        names += ["expert hybrid"] * setting.is_expert_hybrid
    return tuple(name for name in names if name in NEUTRAL)


def errors(some: Sequence[Known], constants: Constants) -> list[float]:
    """Predicted over published step time, less 1."""
    return [step_time(with_constants(found.setting, constants)).seconds / found.step_s - 1 for _, found in some]


def descend(
    fit: Sequence[Known], constants: Constants, *, passes: int = 8, only: Collection[str] | None = None
) -> Constants:
    """Coordinate descent in steps of a shrinking factor. only: the constants that may change; None: all."""
    groups = [(publisher(row), found.setting.device.generation, found.setting.low) for row, found in fit]
    sizes = Counter(groups)
    weights = [sizes[group] ** -0.5 for group in groups]
    needs = [depends_on(found.setting) for _, found in fit]
    before: list[dict[tuple[float, ...], float]] = [{} for _ in fit]

    def loss(some: Constants) -> float:
        total = 0.0
        for (row, found), names, weight, memo in zip(fit, needs, weights, before, strict=True):
            key = tuple(some[name] for name in names)
            if key not in memo:
                memo[key] = errors([(row, found)], some)[0]
            total += weight * min(abs(math.log1p(memo[key])), 0.5)
        return total / sum(weights)

    constants = dict(constants)
    spoken = {name for names in needs for name in names if only is None or name in only}
    step = dict.fromkeys(sorted(spoken, key=list(constants).index), 0.12 if only is None else 0.4)
    best = loss(constants)
    for _ in range(passes):
        for name in step:
            for factor in (1 + step[name], 1 / (1 + step[name])):
                tried = constants | {name: min(constants[name] * factor, HIGHEST.get(name, math.inf))}
                cost = loss(tried)
                if cost < best - 1e-6:
                    constants, best = tried, cost
                    break
            else:
                step[name] /= 2
    return constants


def with_relatives(constants: Constants, fit: Sequence[Known]) -> Constants:
    """Constants no row speaks of take their nearest relative's value."""
    spoken = {name for _, found in fit for name in depends_on(found.setting)}
    full = dict(constants)
    for name in constants.keys() - spoken:
        relative, seen = RELATIVES.get(name, name), {name}
        while relative not in spoken and relative in RELATIVES and relative not in seen:
            seen.add(relative)
            relative = RELATIVES[relative]
        full[name] = constants[relative]
    return full


def score(some: Sequence[Known], constants: Constants) -> str:
    found = [abs(error) for error in errors(some, constants)]
    return f"(median error {statistics.median(found):.1%}, within 15 % {sum(e < 0.15 for e in found) / len(found):.0%})"


if __name__ == "__main__":
    sys.exit(main())
