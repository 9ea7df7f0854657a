"""Tokens per second with and without speculation, same weights, in one process. Prints Markdown.

    python -m tests.bench.speculation RUN [--draft RUN] [--tokens 128] [--rounds 3] [--rows 1 4] [--temperature 0] [--clock cpu]
    python -m tests.bench.speculation --part rollback

The prompts are four lines of the shipped plays, given three times: texts with repeats. Engines take turns, because the machine's
speed drifts; the best of all rounds counts. `rollback` compares two ways to bring a Mamba-2 layer's states back to the last
accepted token: to repeat the scan over stored inputs (what the engine does), and to store the state after each token.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from tiny import RECIPE

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from launch.plan.cost.inference import cache_bytes, cache_sizes, state_bytes
from recipes.schema.model import ModelConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from train.build import check, mesh_of, models_for_inference, open_tokenizer
from train.checkpoint.manager import checkpoint_at
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.draft_model import DraftModel
from train.inference.drafters import Drafter, PromptLookup
from train.inference.forward import Read, read_tokens, settle
from train.inference.pools import Pools
from train.inference.request import Request, Sampling
from train.model.backend import ReferenceBackend
from train.model.build import build_model
from train.model.few_tokens import FewTokens

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The wall's seconds, or the processor's: for a busy machine."""


def prompts(count: int) -> list[str]:
    """Texts with repeats."""
    with gzip.open(ROOT / "data" / "corpora" / "shakespeare.jsonl.gz", "rt") as records:
        lines = [line for record in records for line in json.loads(record)["text"].splitlines() if len(line) > 30]
    return ["\n".join(lines[100 * n : 100 * n + 4] * 3) + "\n" for n in range(count)]


def seconds_a_token(engine: InferenceEngine, requests: list[Request], now: Callable[[], float]) -> float:
    """Without the time in which prompts are read: from the step after which every text has a token."""
    ids = {engine.add(request) for request in requests}
    while ids:
        ids -= {event.request for event in engine.step()}
    begin, count = now(), 0
    while not engine.is_idle:
        count += len(engine.step())
    return (now() - begin) / count


def compare(
    run: str,
    draft: str | None,
    now: Callable[[], float],
    *,
    rows: list[int],
    tokens: int,
    rounds: int,
    temperature: float,
) -> None:
    """The table of a run, with look-up and with a draft model."""
    path, manifest = checkpoint_at(run)
    recipe = recipe_from_mapping(manifest.recipe)
    tokenizer, _ = open_tokenizer(recipe)
    sources = [(recipe, path)]
    if draft is not None:
        place, its_manifest = checkpoint_at(draft)
        sources.append((replace(recipe_from_mapping(its_manifest.recipe), precision=recipe.precision), place))
    with models_for_inference(sources, device=torch.device("cpu")) as (model, *others):
        drafters: dict[str, Callable[[], Drafter | None]] = {"none": lambda: None, "look-up": PromptLookup}
        if others:
            shape = sources[1][0].model
            drafters[f"draft model ({shape.pattern}, hidden {shape.hidden})"] = lambda: DraftModel(others[0], shape)
        print("| texts | guesses by | tokens/s | times | accepted | tokens per step |\n|---|---|---|---|---|---|")
        for count in rows:
            requests = [
                Request(tokenizer.prompt(text), tokens, sampling=Sampling(temperature, seed=index))
                for index, text in enumerate(prompts(count))
            ]
            context = max(len(request.prompt) for request in requests) + tokens
            engines = {
                name: InferenceEngine(
                    model, recipe.model, EngineConfig(rows=count, context_tokens=context), drafter=make()
                )
                for name, make in drafters.items()
            }
            best = dict.fromkeys(engines, float("inf"))
            for _ in range(rounds):
                for name, engine in engines.items():
                    best[name] = min(best[name], seconds_a_token(engine, requests, now))
            for name, engine in engines.items():
                stats, speed, times = engine.stats(), 1 / best[name], best["none"] / best[name]
                rates = f"{stats.acceptance_rate:.0%} | {stats.tokens_per_step:.2f}"
                print(f"| {count} | {name} | {speed:,.0f} | {times:.2f} | {rates} |")


def rollback(rounds: int, widths: list[int]) -> None:
    """Seconds and bytes of both ways, for one text with four guesses, two of them right."""
    guesses, accepted = 4, 3
    print(
        "| hidden | repeat the scan, us | store states, us | bytes of inputs | bytes of states |\n|---|---|---|---|---|"
    )
    for hidden in widths:
        shape = ModelConfig(
            pattern="M-M*-M-M*-", hidden=hidden, vocab=4096, ffn=4 * hidden, heads=hidden // 64, kv_heads=2, head_dim=64,
            mamba_heads=hidden // 32, mamba_head_dim=64, mamba_state=128, mamba_groups=2,
        )  # fmt: skip
        recipe: Recipe = replace(RECIPE, model=shape)
        with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=0) as mesh, torch.no_grad():
            (model,) = build_model(
                shape, parallel=recipe.parallel, precision=recipe.precision, run=recipe.run,
                row_tokens=recipe.data.row_tokens, mesh=mesh, backend=ReferenceBackend(),
            )  # fmt: skip
            sizes = cache_sizes(
                shape, rows=1, context_tokens=256, page_tokens=16, step_tokens=64, number_bytes=4, snapshots=guesses + 1,
                trial_tokens=guesses + 1,
            )  # fmt: skip
            pools = Pools(shape, sizes, dtype=torch.float32, device=torch.device("cpu"))
            pools.extend(0, 64)
            reads = [Read(0, [1] * (guesses + 1), 32, is_trial=True)]
            few = FewTokens(model.eval())
            read_tokens(model, [Read(0, [1] * 16, 0)], pools, few=few)
            read_tokens(model, reads, pools, few=few)
            times = {"repeat": float("inf"), "store": float("inf")}
            for _ in range(rounds * 20):
                begin = time.perf_counter()
                settle(model, reads, [accepted], pools)
                middle = time.perf_counter()
                for slot in range(1, guesses + 2):
                    pools.copy_states(0, slot)
                times["repeat"] = min(times["repeat"], middle - begin)
                times["store"] = min(times["store"], time.perf_counter() - middle)
            layers = shape.pattern.count("M")
            inputs = cache_bytes(shape, sizes, number_bytes=4).trial_inputs
            states = layers * (guesses + 1) * state_bytes(shape)
            print(
                f"| {hidden} | {times['repeat'] * 1e6:,.0f} | {times['store'] * 1e6:,.0f} | {inputs:,} | {states:,} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--part", choices=["compare", "rollback"], default="compare")
    words = parser.parse_args()
    torch.set_num_threads(1)
    print(f"\nload {os.getloadavg()[0]:.1f}, {' '.join(sys.argv[1:])}\n")
    if words.part == "rollback":
        rollback(words.rounds, words.hidden)
    elif words.run is None:
        parser.error("name a run")
    else:
        options = {"tokens": words.tokens, "rounds": words.rounds, "temperature": words.temperature}
        compare(words.run, words.draft, CLOCKS[words.clock], rows=words.rows, **options)


if __name__ == "__main__":
    main()
