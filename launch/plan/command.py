"""`stratum plan`: memory and time of a run, and its problems. Imports no torch."""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch.compose import compose
from launch.plan.cost.device import device_named, devices
from launch.plan.cost.memory import RankMemory
from launch.plan.goodput import add_options, draw_goodput, goodput_json, goodput_of, show_goodput
from launch.plan.picture import draw
from launch.plan.planner import Plan, make_plan, world_of
from launch.plan.scale import counts_of, draw_scale, scale, scale_json, show_scale
from launch.plan.search import limiting_field, search
from launch.plan.tables import show, show_search
from launch.user_errors import exit_status
from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable_lines
from recipes.schema.layout import rank_coordinates
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe
from recipes.schema.units import GIB

_EXAMPLES = r"""
stratum plan -cn smoke                                            the recipe without changes, on H100s
stratum plan -cn smoke model=nemotron_nano_12b_v2 precision=fp8_blockwise data.row_tokens=8192 \
    run.global_rows=128 run.microbatch_rows=1 --gpus 64 parallel.tensor=4 parallel.sequence=true     a layout of your options
stratum plan -cn nemotron_nano_12b_v2 run.global_rows=768 --gpus 256 --search     the best layouts, with reasons
stratum plan -cn nemotron_nano_12b_v2 --gpus 736 --json | jq .memory_gib_per_rank     for scripts
stratum plan -cn smoke --picture plan.png                         memory by stage, time by part
stratum plan -cn nemotron_nano_12b_v2 --gpus 736 --goodput        how often to save, and what failures cost
stratum plan -cn nemotron_nano_12b_v2 --scale 8,64 --picture scale.png     how much faster more GPUs are
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum plan`. -> exit status."""
    parser = CommandParser(
        "plan",
        about="Predict memory and time of a run and list its problems, before it starts. Needs no torch.",
        examples=_EXAMPLES,
        notes=f"""
Devices: {", ".join(devices())}.
Exit status: 0 the run can start; 1 it would fail (memory, formats); 2 the recipe cannot be used. docs/plan.md explains what is
counted, what is estimated, and how accurate the estimates are.
""",
        recipe=True,
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the run (default: launch.nodes x gpus_per_node, or the "
                        "smallest number that the degrees need)")  # fmt: skip
    parser.add_argument("--device", default="h100", metavar="KIND", help="kind of GPU (default: h100)")
    parser.add_argument("--search", action="store_true", help="find the best layouts instead")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="with --search: layouts to show (default: 8)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw memory by stage and time by part (.png, .svg, .pdf)"
    )
    parser.add_argument("--ranks", action="store_true", help="list every rank, even of a large world")
    parser.add_argument(
        "--scale", metavar="N,N,...", help="the best layout at each of these numbers of GPUs, in one table"
    )
    add_options(parser)
    options, words = parser.parse_recipe(arguments)
    if options.gpus is not None and options.gpus < 1:
        parser.error(f"--gpus {options.gpus} is less than 1. Use 1 or more.")
    modes = [name for name in ("search", "scale", "goodput") if getattr(options, name)]
    if len(modes) > 1:
        parser.error(f"--{modes[0]} and --{modes[1]} cannot be combined. Use one at a time.")
    notes: list[str] = []
    recipe = compose(words, program="plan", notes=notes)
    if isinstance(recipe, int):
        return recipe
    return exit_status(functools.partial(_answer, recipe, options, notes))


def _answer(recipe: Recipe, options: argparse.Namespace, notes: Sequence[str]) -> int:
    try:
        if options.scale is not None:
            return _scale(recipe, options)
        return _search(recipe, options) if options.search else _plan(recipe, options, notes)
    except StratumError as error:
        if options.json:
            sys.stdout.write(json.dumps({"problems": str(error).splitlines()}) + "\n")
        raise


def _plan(recipe: Recipe, options: argparse.Namespace, notes: Sequence[str]) -> int:
    plan = make_plan(recipe, world=world_of(recipe, options.gpus), device=device_named(options.device))
    plan = replace(plan, warnings=(*plan.warnings, *notes))
    goodput = goodput_of(plan, options) if options.goodput else None
    if options.picture is not None:
        draw(plan, options.picture) if goodput is None else draw_goodput(goodput, plan, options.picture)
    if options.json:
        extra = {} if goodput is None else {"goodput": goodput_json(goodput)}
        sys.stdout.write(json.dumps(as_json(plan, ranks=options.ranks) | extra) + "\n")
    elif goodput is not None:
        show_goodput(goodput, plan)
        for problem in plan.problems:
            sys.stdout.write(f"problem: {printable_lines(problem)}\n")
        if options.picture is not None:
            sys.stdout.write(f"Picture: {options.picture}\n")
    else:
        show(plan, every_rank=options.ranks)
        if options.picture is not None:
            sys.stdout.write(f"Picture: {options.picture}\n")
    return 1 if plan.problems else 0


def _scale(recipe: Recipe, options: argparse.Namespace) -> int:
    points = scale(recipe, counts_of(options.scale), device=device_named(options.device), options=options)
    if options.json:
        sys.stdout.write(json.dumps({"points": scale_json(points)}) + "\n")
    else:
        show_scale(points, recipe)
    if options.picture is not None:
        draw_scale(points, recipe, options.picture)
        if not options.json:
            sys.stdout.write(f"Picture: {options.picture}\n")
    return 0 if all(point.plan is not None for point in points) else 1


def _search(recipe: Recipe, options: argparse.Namespace) -> int:
    world, device = world_of(recipe, options.gpus), device_named(options.device)
    found = search(recipe, world=world, device=device, top=options.top)
    limit = limiting_field(recipe, found, world=world, device=device)
    if options.json:
        best = as_json(found.best[0].plan, ranks=False) if found.best else {"problems": list(found.rejected)}
        lines = [
            {
                "overrides": candidate.overrides,
                "why": candidate.why,
                "step_time_s": candidate.plan.time.seconds,
                "tokens_per_s_per_gpu": candidate.plan.tokens_per_s_per_gpu,
                "mfu": candidate.plan.mfu,
                "memory_gib_per_rank": candidate.plan.fullest.total / GIB,
            }
            for candidate in found.best
        ]
        sys.stdout.write(
            json.dumps({**best, "candidates": lines, "tried": found.tried, "rejected": found.rejected, "limit": limit})
            + "\n"
        )
    else:
        show_search(found, recipe, limit=limit)
        if options.picture is not None and found.best:
            draw(found.best[0].plan, options.picture)
            sys.stdout.write(f"Picture of the first: {options.picture}\n")
    return 0 if found.best else 1


def as_json(plan: Plan, *, ranks: bool) -> dict[str, Any]:
    """A plan as one JSON object. Values are in bytes, seconds and FLOPs unless the key names another unit."""
    layout = plan.layout
    found: dict[str, Any] = {
        "parameters": plan.parameters,
        "memory_gib_per_rank": plan.fullest.total / GIB,
        "step_time_s": plan.time.seconds,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "mfu": plan.mfu,
        "mfu_unmasked_attention": plan.mfu_unmasked,
        "peak_flops": plan.peak,
        "device": plan.device.name,
        "gpus": layout.world,
        "layout": asdict(layout),
        "fits": plan.fits,
        "problems": list(plan.problems),
        "warnings": list(plan.warnings),
        "tokens_per_step": plan.tokens_per_step,
        "steps": plan.recipe.run.steps,
        "days": plan.hours / 24,
        "gpu_hours": plan.gpu_hours,
        "energy_mwh": plan.energy_mwh,
        "checkpoint": asdict(plan.checkpoints),
        "memory_copies": asdict(plan.copies) if plan.copies is not None else None,
        "flops_per_token": {**asdict(plan.flops), "total": plan.flops.total},
        "step_flops_per_gpu": {name: part.flops for name, part in plan.traffic.parts.items()},
        "step_memory_bytes_per_gpu": {name: part.memory_bytes for name, part in plan.traffic.parts.items()},
        "step_wire_bytes_per_gpu": plan.traffic.wire_bytes,
        "step_time_parts_s": dict(plan.time.parts),
        "decode": [asdict(speed) for speed in plan.decode],
        "stages": [
            {
                "stage": stage,
                "patterns": list(plan.stages[stage :: layout.pipeline]),
                "memory_bytes": memory_parts(memory),
                "microbatches_in_flight": memory.in_flight,
                "microbatch_s": plan.time.stage_seconds[stage],
            }
            for stage, memory in enumerate(plan.memory)
        ],
    }
    if ranks:
        found["ranks"] = [asdict(rank_coordinates(layout, rank)) for rank in range(layout.world)]
    return found


def memory_parts(memory: RankMemory) -> dict[str, float]:
    """Memory of a rank by part, in bytes."""
    parts = asdict(memory)
    del parts["stage"], parts["in_flight"]
    return parts
