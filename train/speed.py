"""`train/speed.py -cn RECIPE [key=value ...]`: speed of a recipe's training step, without data, run folder or saves.

The same model, optimizer and `train_step` as a run, on rows of random tokens (one document a row); the first steps do not count.
One process or torchrun's. It is for machines tested before anything is prepared on them (`stratum doctor --qualify`), and
for shapes whose checkpoint one would not write. Prints one JSON object:

    {"parameters", "device", "precision", "backend", "kernels", "tokens_per_s", "step_s": [...], "mfu", "memory_bytes", ...}

tokens_per_s is of all ranks, from the median step; mfu is a share of the device's dense bf16 peak (null if it is unknown);
memory_bytes is this rank's peak.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from recipes.schema.command import dotted_keys, run_command
from recipes.schema.errors import USER_ERRORS
from recipes.schema.options import CommandParser
from recipes.schema.pattern import parameters, trained_flops_per_token
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.rules import backend_name, problems, refuse
from recipes.schema.scaling import describe_precision
from train.build import build_engine, check, mesh_of
from train.megatron import choose_device, use_device
from train.model.backend import this_machine
from train.native.kernel_versions import describe
from train.parallel.mesh import world_from_environment
from train.record.machine import peak_flops, peak_memory_bytes
from train.record.stopwatch import Stopwatch
from train.step import train_step

WARM_UP = 3
"""Steps that do not count: kernels are compiled and memory is allocated in them."""


def main(arguments: Sequence[str]) -> int:
    """Entry point. -> exit status."""
    parser = CommandParser(
        "speed", about="Speed of a recipe's training step on random tokens; one JSON object.", recipe=True
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    options, words = parser.parse_recipe(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps} is less than 1. Use 1 or more.")

    def report(composed: Any) -> int:
        found = measure(read_recipe(composed), options.steps)
        if world_from_environment()[0] == 0:
            sys.stdout.write(json.dumps(found) + "\n")
        return 0

    return run_command(report, words, program="speed", keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def measure(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Train `WARM_UP` + `steps` steps of random rows. -> the JSON object above. Collective over the world.

    Raises RecipeError or BackendError where the recipe cannot run on this machine.
    """
    rank, world = world_from_environment()
    machine = this_machine()
    refuse(problems(recipe, world=world, machine=machine))
    device = choose_device(recipe.run.device)
    use_device(device)
    torch.set_num_threads(recipe.run.threads or torch.get_num_threads())
    with mesh_of(recipe, check(recipe, world=world), device=device, rank=rank) as mesh:
        engine = build_engine(recipe, mesh)
        seconds, losses = [], []
        for step in range(WARM_UP + steps):
            rows = _random_rows(recipe, rank=mesh.data_rank, ranks=mesh.layout.data, step=step)
            started = time.perf_counter()
            result = train_step(engine, rows, step=step, learning_rate=recipe.optim.lr / 100, watch=Stopwatch())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
            losses.append(float(mesh.sum_over_world(result.loss.detach().double())))
        flops = trained_flops_per_token(recipe.model, recipe.data.row_tokens)
        peak = peak_flops(device)
        rate = recipe.run.global_rows * recipe.data.row_tokens / statistics.median(seconds[WARM_UP:])
        return {
            "parameters": parameters(recipe.model).total,
            "device": machine.name if device.type == "cuda" else "cpu",
            "world": world,
            "precision": describe_precision(recipe.model, recipe.precision, tokens=0),
            "backend": backend_name(recipe.precision, machine),
            "kernels": describe(device) or "of the device",
            "tokens_per_s": rate,
            "step_s": seconds[WARM_UP:],
            "warm_up_s": seconds[:WARM_UP],
            "mfu": rate * flops / world / peak if peak else None,
            "memory_bytes": peak_memory_bytes(device),
            "losses": losses,
        }


def _random_rows(recipe: Recipe, *, rank: int, ranks: int, step: int) -> list[Batch]:
    """This data rank's microbatches: rows of random tokens, one document each."""
    size, length = recipe.run.microbatch_rows, recipe.data.row_tokens
    batches = []
    for start in range(rank * size, recipe.run.global_rows, ranks * size):
        generator = torch.Generator().manual_seed(1_000_003 * step + start)
        both = torch.randint(0, recipe.model.vocab, (size, length + 1), generator=generator)
        batches.append(
            Batch(
                tokens=both[:, :-1].contiguous(),
                labels=both[:, 1:].contiguous(),
                document_index=torch.zeros((size, length), dtype=torch.int32),
                source=torch.zeros(size, dtype=torch.int32),
                positions=np.arange(start, start + size),
            )
        )
    return batches


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
