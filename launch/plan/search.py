"""`stratum plan --search`: plan every layout of a recipe on a number of GPUs, rank them, show the best with reasons.

    degrees x virtual stages x microbatch x recompute --rules, memory, formats--> layouts that work --time--> ranked

Pipeline cuts balance the predicted seconds, including scan, scores and head. If this differs from the default cut, the overrides
contain the pattern with its `|`.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.plan.checks import facts_of
from launch.plan.cost.device import Device
from launch.plan.cost.time import layer_seconds
from launch.plan.part_names import PART_NAMES
from launch.plan.planner import Plan, make_plan, setting_of
from recipes.schema.errors import RecipeError
from recipes.schema.layout import Layout, lay_out
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import CUT, balanced_ranges, cut, layer_kinds
from recipes.schema.recipe import Recipe

MAX_MICROBATCH_ROWS = 8
VIRTUAL = (1, 2, 3, 4, 8)
"""Chunks of a stage to try."""
MORE_ROWS = 4
"""How many times more rows of a step the search tries, to see whether `run.global_rows` limits the speed."""
LIMITS = 1.10
"""A field is named if a step with more of it is at least this many times faster for each row."""


@dataclass(frozen=True)
class Candidate:
    """One layout that works."""

    plan: Plan
    overrides: list[str]
    """Overrides to add to the command line to train with this layout."""
    why: str
    """The parts of a step that explain its rank."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    best: list[Candidate]
    """Fastest first."""
    tried: int
    """Number of layouts planned."""
    fitting: int
    """Number of layouts without problems."""
    rejected: dict[str, int]
    """Reason -> number of layouts."""


def limiting_field(recipe: Recipe, found: SearchResult, *, world: int, device: Device) -> str:
    """Text: the field of the recipe that limits the speed and what more of it gives; "" if none was found.

    It is `run.global_rows` if a step with `MORE_ROWS` times as many uses the GPUs better. Of its layouts, those with the virtual
    stages and the recomputation of the best one are planned.
    """
    if not found.best:
        return ""
    rows, best = recipe.run.global_rows, found.best[0].plan
    larger = replace(recipe, run=replace(recipe.run, global_rows=MORE_ROWS * rows))
    more = search(larger, world=world, device=device, top=1, near=best.recipe.parallel)
    if not more.best or more.best[0].plan.tokens_per_s_per_gpu < LIMITS * best.tokens_per_s_per_gpu:
        return ""
    other = more.best[0].plan
    return (
        f"run.global_rows={rows:,} limits the speed: {rows / world:.3g} rows for each of {world:,} GPUs. With "
        f"run.global_rows={MORE_ROWS * rows:,}, {other.layout.describe()} reaches {other.mfu:.1%} MFU instead of {best.mfu:.1%} "
        f"({other.tokens_per_s_per_gpu / best.tokens_per_s_per_gpu:.1f} times the tokens/s). A larger step changes the training: "
        f"adapt optim.lr, or use fewer GPUs."
    )


def search(
    recipe: Recipe, *, world: int, device: Device, top: int = 8, near: ParallelConfig | None = None
) -> SearchResult:
    """Plan every layout of `recipe` on `world` GPUs. Model, data, precision and rows of a step are not changed. near: only
    layouts with its recomputation, and with its number of virtual stages or without any.

    If no data-parallel degree divides the rows of a step, `rejected` says so.
    """
    rejected: Counter[str] = Counter()
    plans: list[Plan] = []
    tried, facts = 0, facts_of(recipe, device)
    for parallel, rows in _layouts(recipe, world=world, device=device, near=near):
        tried += 1
        candidate = replace(recipe, parallel=parallel, run=replace(recipe.run, microbatch_rows=rows))
        try:
            layout = lay_out(
                model=_uncut(candidate).model,
                parallel=parallel,
                run=candidate.run,
                row_tokens=recipe.data.row_tokens,
                world=world,
            )
            plan = make_plan(
                _uncut(candidate),
                world=world,
                device=device,
                stages=balanced_cut(candidate, layout=layout, device=device),
                facts=facts,
            )
        except RecipeError as error:
            rejected[_reason(str(error))] += 1
            continue
        if plan.problems:
            rejected[_reason(plan.problems[0])] += 1
            continue
        plans.append(plan)
    if not tried:
        step_rows = recipe.run.global_rows
        rejected[
            f"no layout: run.global_rows={step_rows} is not a multiple of the data-parallel ranks of {world} GPUs. Use "
            f"run.global_rows={-(-step_rows // world) * world} or other --gpus"
        ] += 1
    plans.sort(key=lambda plan: (plan.time.seconds, plan.fullest.total))
    best = [
        Candidate(
            plan,
            _overrides(plan, recipe),
            _why(plan, plans[0] if index else plans[1] if len(plans) > 1 else None, index),
        )
        for index, plan in enumerate(plans[:top])
    ]
    return SearchResult(best=best, tried=tried, fitting=len(plans), rejected=dict(rejected.most_common()))


def balanced_cut(recipe: Recipe, *, layout: Layout, device: Device) -> list[str] | None:
    """The pipeline cut that minimises the predicted seconds of the slowest chunk; None for a single stage."""
    stages = layout.pipeline * layout.virtual
    if stages == 1:
        return None
    kinds = layer_kinds(recipe.model.pattern)
    if stages > len(kinds):
        raise RecipeError(f"parallel.pipeline x virtual_pipeline = {stages} stages for {len(kinds)} layers. Use fewer.")
    setting = setting_of(_uncut(recipe), layout=layout, stages=("".join(kinds),), device=device)
    low = setting.high_precision_layers
    seconds = [
        layer_seconds(setting, kind, is_low=setting.low is not None and index not in low)
        for index, kind in enumerate(kinds)
    ]
    seconds[-1] += layer_seconds(setting, "head")
    costs = [round(200 * one / max(seconds[:-1])) for one in seconds]
    return ["".join(kinds[start:end]) for start, end in balanced_ranges(costs, stages)]


def _layouts(
    recipe: Recipe, *, world: int, device: Device, near: ParallelConfig | None
) -> Iterator[tuple[ParallelConfig, int]]:
    """Every combination to try: degrees, virtual stages, rows of a microbatch, recomputation. Degrees divide the world, and those
    over matrices and sequences also divide their sizes."""
    model, row = recipe.model, recipe.data.row_tokens
    kinds = layer_kinds(model.pattern)
    recomputes = ("none", "full") if near is None else (near.recompute,)
    tensors = [d for d in _divisors(world, min(max(1, device.domain), 16)) if not model.vocab % d]
    contexts = [d for d in _divisors(world, 32) if d == 1 or (row // d >= 4096 and not row % (2 * d))]
    pipelines = _divisors(world, min(len(kinds), 32))
    for tensor, context, pipeline in itertools.product(tensors, contexts, pipelines):
        degrees = tensor * context * pipeline
        if world % degrees:
            continue
        stage = world // pipeline
        experts = [d for d in _divisors(stage, stage) if not model.experts.count % d] if "E" in kinds else [1]
        data = world // degrees
        if recipe.run.global_rows % data:
            continue
        share = recipe.run.global_rows // data
        rows = _divisors(share, MAX_MICROBATCH_ROWS)
        chunks = VIRTUAL if near is None else (1, near.virtual_pipeline)
        virtuals = [v for v in dict.fromkeys(chunks) if v == 1 or (pipeline > 1 and pipeline * v <= len(kinds))]
        for expert, virtual, count, recompute in itertools.product(experts, virtuals, rows, recomputes):
            yield (
                replace(
                    recipe.parallel,
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    context=context,
                    expert=expert,
                    expert_tensor=1,
                    sequence=tensor > 1,
                    recompute=recompute,  # type: ignore[arg-type]
                    overlap_grad_reduce=data * context > 1,
                    overlap_param_gather=data * context > 1,
                ),
                count,
            )


def _divisors(number: int, most: int) -> list[int]:
    return [value for value in range(1, min(number, most) + 1) if not number % value]


def _uncut(recipe: Recipe) -> Recipe:
    pattern = recipe.model.pattern.replace(CUT, "")
    return replace(recipe, model=replace(recipe.model, pattern=pattern))


def _overrides(plan: Plan, recipe: Recipe) -> list[str]:
    """The overrides that turn `recipe` into the plan's recipe."""
    words = []
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "sequence", "recompute",
                 "overlap_grad_reduce", "overlap_param_gather"):  # fmt: skip
        value = getattr(plan.recipe.parallel, name)
        if value != getattr(recipe.parallel, name):
            words.append(f"parallel.{name}={str(value).lower() if isinstance(value, bool) else value}")
    if plan.recipe.run.microbatch_rows != recipe.run.microbatch_rows:
        words.append(f"run.microbatch_rows={plan.recipe.run.microbatch_rows}")
    stages = plan.layout.pipeline * plan.layout.virtual
    if stages > 1:
        default = cut(recipe.model.pattern.replace(CUT, ""), stages, model=recipe.model)
        if list(plan.stages) != default or CUT in recipe.model.pattern:
            words.append(f"'model.pattern=\"{CUT.join(plan.stages)}\"'")
    elif CUT in recipe.model.pattern:
        words.append(f"'model.pattern=\"{''.join(plan.stages)}\"'")
    return words


def _why(plan: Plan, other: Plan | None, index: int) -> str:
    """Text: the parts of a step that explain the layout's rank. other: for the first layout the second, for others the first."""
    if other is None:
        return "the only one that works"
    step, compared = plan.time, other.time
    gaps = {name: step.parts[name] - compared.parts[name] for name in {*step.parts, *compared.parts}}
    if index == 0:
        gained = [(name, -gap) for name, gap in gaps.items() if gap < -0.002 * step.seconds]
        paid = [(name, gap) for name, gap in gaps.items() if gap > 0.002 * step.seconds]
        lead = compared.seconds / step.seconds - 1
        text = f"{lead:.1%} ahead of the next" if lead >= 0.0005 else "as fast as the next, with less memory"
        if gained:
            text += f": less {_list(gained, step.seconds)}"
        if paid:
            text += f"; pays {_list(paid, step.seconds)}"
        return text
    behind = step.seconds / compared.seconds - 1
    lost = [(name, gap) for name, gap in gaps.items() if gap > 0.002 * step.seconds]
    saved = [(name, -gap) for name, gap in gaps.items() if gap < -0.002 * step.seconds]
    text = f"{behind:.1%} behind the first"
    if lost:
        text += f": more {_list(lost, step.seconds)}"
    if saved:
        text += f"; saves {_list(saved, step.seconds)}"
    return text


def _list(parts: list[tuple[str, float]], whole: float) -> str:
    parts = sorted(parts, key=lambda item: -item[1])[:3]
    return ", ".join(f"{PART_NAMES[name]} {seconds / whole:.1%}" for name, seconds in parts)


def _reason(problem: str) -> str:
    """The kind of a problem, to count rejected layouts by."""
    first = problem.splitlines()[0]
    if first.startswith("memory:"):
        return "do not fit in memory"
    if first.startswith("precision.scaling="):
        return "break a shape rule of low precision (" + first.split(":")[0] + ")"
    if "virtual_pipeline" in first:
        return "break a rule of virtual pipeline stages"
    key = first.split("=")[0].split(" ")[0]
    return f"break a rule of {key}"
