"""`python -m tests.bench.injections [--rounds 40] [--clean 2000] [--seed 1]`: how many planted bit flips are found, as a table.

Two data-parallel ranks of a small mixture of experts, checked at every step: products and collectives by sums, the rest by the
comparison of state and replays. Each injection flips one random bit of one random element on one random rank: a weight, a moment
or master, a buffer (biases of experts), an activation or the gradient that flows back through it, a product, or what a collective
delivers. Found: a finding in that step. Culprit: the findings name that rank and no other. Injections below the rounding floor of
the sums are counted apart. --clean: steps without an
injection, with all checks, for false alarms.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from corruption import BITS, FaultyProducts, FaultyTransit, flip, state_kept
from expert_models import MIXTURE
from ranks import run_ranks
from tiny import engine_of, recipe_with

from recipes.schema.errors import CorruptionError
from recipes.schema.integrity import IntegrityConfig
from tests.train.integrity.test_integrity import SMALL, Trial
from train.native.product_check import LAMBDA

WORLD = 2
STATE = IntegrityConfig(enabled=True, compare_every_steps=1, replay_fraction=1.0)
SUMS = IntegrityConfig(
    enabled=True, compare_every_steps=0, replay_fraction=0.0, collectives=True,
    products=("attention", "mamba", "mlp", "experts", "output"),
)  # fmt: skip
PLACES = ("weight", "master or moment", "buffer", "activation", "gradient", "product", "collective")
MODEL = SMALL | MIXTURE | {"run.global_rows": WORLD, "run.microbatch_rows": 1, "precision.params": "bf16"}


class _Once:
    """Flips a bit of a module's output, or of the gradient of it, at its forward pass number `at` from now."""

    def __init__(self, module: torch.nn.Module, draw: random.Random, *, at: int, is_gradient: bool) -> None:
        self.calls, self._at, self._draw, self._is_gradient = 0, at, draw, is_gradient
        self._handle = module.register_forward_hook(self._change)

    def remove(self) -> None:
        self._handle.remove()

    def _flip(self, values: torch.Tensor) -> torch.Tensor:
        changed = values.clone().contiguous()
        bits = 8 * changed.element_size()
        flip(changed, element=self._draw.randrange(changed.numel()), bit=self._draw.randrange(bits))
        return changed

    def _change(self, _module: Any, _inputs: Any, output: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        if call != self._at:
            return None
        first = output[0] if isinstance(output, tuple) else output
        if self._is_gradient:
            first.register_hook(self._flip)
            return None
        changed = first.clone()
        with torch.no_grad():
            changed.copy_(self._flip(first.detach()))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def inject(rank: int, rounds: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """-> counts by place: planted, found, culprit, below the floor."""
    counts: dict[str, Counter[str]] = {place: Counter() for place in PLACES}
    recipe = recipe_with(**MODEL | {"run.integrity": SUMS})
    with engine_of(recipe, rank=rank, world=WORLD) as engine:
        whole = Trial(engine, recipe, folder, STATE)
        sums = Trial(engine, recipe, folder, SUMS)
        products, transit = FaultyProducts(), FaultyTransit(engine.mesh)
        draw = random.Random(seed)  # the same on both ranks

        def step(trial: Trial) -> list[dict[str, Any]]:
            count = len(trial.events)
            with suppress(CorruptionError):
                trial.take()
            return [event for event in trial.events[count:] if event["kind"] == "corruption"]

        with products.installed(), transit.installed():
            whole.take()
            products.calls, transit.calls = 0, []
            sums.take()
            calls = engine.mesh.gather_objects((products.calls, len(transit.calls)))
            for number in range(rounds * len(PLACES)):
                place, guilty = PLACES[number % len(PLACES)], draw.randrange(WORLD)
                mine = random.Random(f"{seed} {number} {rank}")
                is_sums = place in ("product", "collective")
                trial = sums if is_sums else whole
                with state_kept(engine):
                    buffers = [b for chunk in engine.chunks for b in chunk.module.buffers()]
                    kept = [b.clone() for b in buffers]
                    trial.watch.forget()
                    assert not step(trial), "a false alarm"
                    hook, products.target, transit.target = None, None, None
                    transit.hit = None
                    if rank == guilty:
                        hook = _plant(place, engine, whole, mine)
                        if place == "product":
                            products.calls, products.change = 0, 0.0
                            products.target, products.element = mine.randrange(calls[rank][0]), mine.randrange(10**6)
                            products.bit = mine.randrange(32)
                        elif place == "collective":
                            transit.calls, transit.element = [], mine.randrange(10**6)
                            transit.target, transit.bit = mine.randrange(calls[rank][1]), mine.randrange(32)
                    found = step(trial)
                    if hook is not None:
                        hook.remove()
                    with torch.no_grad():
                        for buffer, copy in zip(buffers, kept, strict=True):
                            buffer.copy_(copy)
                counted = True
                if place == "product" and rank == guilty:
                    counted = not products.change <= products.floor
                elif place == "collective" and rank == guilty:
                    # two ranks: one rounding of a sum; norms of both inputs
                    counted = transit.hit is not None and not transit.change <= 4 * LAMBDA * transit.unit * transit.norm
                counted = engine.mesh.gather_objects(counted)[guilty]
                named = {one for event in found for one in event["ranks"]}
                counts[place]["planted"] += 1
                counts[place]["above"] += counted
                counts[place]["found"] += counted and bool(found)
                counts[place]["culprit"] += counted and named == {guilty}
                counts[place]["found below"] += not counted and bool(found)
    return counts


def _plant(place: str, engine: Any, trial: Trial, draw: random.Random) -> _Once | None:
    modules = [chunk.module for chunk in engine.chunks]
    state, replay = trial.watch._state, trial.watch._replay
    assert state is not None and replay is not None
    if place in ("activation", "gradient"):
        layers = [layer for module in modules for layer in module.decoder.layers]
        # replays of own rows (and of lent ones) come before the step itself
        passes = 1 + len(replay.neighbours())
        return _Once(draw.choice(layers), draw, at=passes, is_gradient=place == "gradient")
    match place:
        case "weight":
            tensors = [p for module in modules for p in module.parameters()]
        case "master or moment":
            tensors = [one.tensor for one in state._own if not one.name.startswith("weight")]
        case "buffer":
            tensors = [one.tensor for one in state._buffers]
        case _:
            return None
    tensor = draw.choice([one for one in tensors if one.numel() and one.dtype in BITS])
    flip(tensor, element=draw.randrange(tensor.numel()), bit=draw.randrange(8 * tensor.element_size()))
    return None


def clean(rank: int, steps: int, folder: Path) -> int:
    """-> false alarms in steps with every check at every step."""
    config = replace(SUMS, compare_every_steps=1, replay_fraction=1.0)
    recipe = recipe_with(**MODEL | {"run.integrity": config})
    with engine_of(recipe, rank=rank, world=WORLD) as engine:
        trial = Trial(engine, recipe, folder, config)
        for _ in range(steps):
            trial.take()
        return sum(event["kind"] == "corruption" for event in trial.events)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clean", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = run_ranks(WORLD, inject, options.rounds, options.seed, Path(folder), timeout_s=3600)[0]
        injected_s = time.monotonic() - began
        alarms = run_ranks(WORLD, clean, options.clean, Path(folder), timeout_s=3600)[0] if options.clean else None
    out = "| bit flips in | planted | above the rounding floor | found | only the culprit named |\n|---|---|---|---|---|\n"
    total: Counter[str] = sum(counts.values(), Counter())
    for place, one in [*counts.items(), ("all", total)]:
        shares = [f"{one[name]} ({one[name] / max(one['above'], 1):.1%})" for name in ("found", "culprit")]
        out += f"| {place} | {one['planted']} | {one['above']} | {' | '.join(shares)} |\n"
    out += f"\ninjections: {injected_s:.0f} s"
    if alarms is not None:
        out += f"; {options.clean} clean steps: {alarms} false alarms, {time.monotonic() - began - injected_s:.0f} s"
    sys.stdout.write(out + "\n")


if __name__ == "__main__":
    main()
