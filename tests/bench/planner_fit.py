"""Fit the planner's constants again: `python -m tests.bench.planner_fit`. Prints them, with errors of fit, test and the other
two thirds fitted instead (cross-validation). Nothing is written: constants go by hand into train/cost/efficiency.py and
launch/published.py.

The first row of every third configuration of each source is fitted on; a row weighs 1 over the root of how many its source
has. Coordinate descent on the mean absolute log error, capped at 0.5 so that no row rules; starts from the present constants.
"""

import math
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import replace

from launch import published as rows_of
from launch.published import PUBLISHED, OutOfScope, Published, published, read_rows
from launch.validate import FIT_EVERY, configuration
from train.cost.efficiency import Efficiency
from train.cost.time import Setting, step_time

HARDWARE = (
    ("ampere", "bf16"), ("hopper", "bf16"), ("hopper", "fp8"), ("blackwell", "fp8"), ("blackwell", "fp4"),
    ("blackwell_ultra", "fp8"),
)  # fmt: skip
ATTENTION = ("ampere", "hopper", "blackwell")
SOFTWARE = {
    "foundry elementwise": rows_of.FOUNDRY.elementwise,
    "titan eager elementwise": rows_of.TITAN_EAGER.elementwise,
    "titan compiled elementwise": rows_of.TITAN_COMPILED.elementwise,
    "titan products": rows_of.TITAN_EAGER.products,
    "2023 products on hopper": rows_of.FOUNDRY_HOPPER.products,
    "2023 attention on hopper": rows_of.FOUNDRY_HOPPER.attention,
}
HIGHEST = {"titan products": 1.0, "2023 products on hopper": 1.0, "hopper bf16": 0.75, "hopper fp8": 0.75}

Constants = dict[str, float]
Known = tuple[dict[str, str], Published]


def main() -> int:
    """Fit, test, cross-validate."""
    known: list[Known] = []
    for row in read_rows(PUBLISHED):
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
    for turn in range(FIT_EVERY):
        fit = [one for key, one in first.items() if place[key] % FIT_EVERY == turn]
        test = [one for one in known if place[configuration(*one)] % FIT_EVERY != turn]
        constants = descend(fit, present())
        sys.stdout.write(f"third {turn + 1}: fitted on {len(fit)} rows {score(fit, constants)}; ")
        sys.stdout.write(f"tested on {len(test)} {score(test, constants)}\n")
        sys.stdout.write("".join(f"    {name:28} {value:.3f}\n" for name, value in constants.items()))
    return 0


def present() -> Constants:
    """The constants as they stand in the code."""
    now = Efficiency()
    found = {f"{generation} {form}": now.gemm[generation][form] for generation, form in HARDWARE}
    found |= {f"{generation} attention": now.attention[generation] for generation in ATTENTION}
    return found | SOFTWARE


def with_constants(setting: Setting, constants: Constants) -> Setting:
    """A row's setting under other constants."""
    now = Efficiency()
    gemm = {generation: dict(forms) for generation, forms in now.gemm.items()}
    for generation, form in HARDWARE:
        gemm[generation][form] = constants[f"{generation} {form}"]
    attention = dict(now.attention) | {name: constants[f"{name} attention"] for name in ATTENTION}
    attention["blackwell_ultra"] = attention["blackwell"]
    software, changes = setting.software, {}
    if software.name == "llm-foundry":
        changes["elementwise"] = constants["foundry elementwise"]
        if setting.device.generation == "hopper":
            changes["products"] = constants["2023 products on hopper"]
            changes["attention"] = constants["2023 attention on hopper"]
    elif software.name == "nanotron":
        changes["elementwise"] = constants["foundry elementwise"]
        changes["attention"] = constants["2023 attention on hopper"]
    elif software.name == "torchtitan":
        compiled = software.elementwise == rows_of.TITAN_COMPILED.elementwise
        changes["elementwise"] = constants[f"titan {'compiled' if compiled else 'eager'} elementwise"]
        changes["products"] = constants["titan products"]
    efficiency = replace(now, gemm=gemm, attention=attention)
    return replace(setting, software=replace(software, **changes), efficiency=efficiency)


def errors(some: list[Known], constants: Constants) -> list[float]:
    """Predicted over published step time, less 1."""
    return [step_time(with_constants(found.setting, constants)).seconds / found.step_s - 1 for _, found in some]


def descend(fit: list[Known], constants: Constants, *, passes: int = 8) -> Constants:
    """Coordinate descent in steps of a shrinking factor."""
    sizes = Counter(row["src"] for row, _ in fit)
    weights = [sizes[row["src"]] ** -0.5 for row, _ in fit]

    def loss(some: Constants) -> float:
        found = errors(fit, some)
        return sum(w * min(abs(math.log1p(e)), 0.5) for w, e in zip(weights, found, strict=True)) / sum(weights)

    best, constants = loss(constants), dict(constants)
    step = dict.fromkeys(constants, 0.12)
    for _ in range(passes):
        for name in constants:
            for factor in (1 + step[name], 1 / (1 + step[name])):
                tried = constants | {name: min(constants[name] * factor, HIGHEST.get(name, math.inf))}
                cost = loss(tried)
                if cost < best - 1e-6:
                    constants, best = tried, cost
                    break
            else:
                step[name] /= 2
    return constants


def score(some: list[Known], constants: Constants) -> str:
    found = [abs(error) for error in errors(some, constants)]
    return f"(median error {statistics.median(found):.1%}, within 15 % {sum(e < 0.15 for e in found) / len(found):.0%})"


if __name__ == "__main__":
    sys.exit(main())
