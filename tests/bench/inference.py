"""`make bench-inference`: tokens per second of the inference engine against transformers' `generate`. Prints Markdown.

The same weights in both: a model of transformers with random weights, copied into ours. Both generate greedily, the same
number of tokens after prompts of equal length (transformers pads ragged batches; this is its best case). They take turns in
one process, because the machine's speed drifts; the best of all rounds counts. The load of the machine is printed: on a busy
machine compare the figures of one line only, with `--threads 1 --clock cpu`: the processor's seconds instead of the wall's.

    python -m tests.bench.inference [--threads 1] [--rounds 3] [--tokens 128] [--hidden 256] [--part peers|context|profile]
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from parity.peers import peer_of, their_part
from tiny import RECIPE

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from recipes.schema.model import ModelConfig
from train.build import check, mesh_of
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling
from train.model.backend import ReferenceBackend
from train.model.build import build_model

VOCAB = 4096
PROMPT = 32
CLOCK = "wall"


def shapes(hidden: int) -> dict[str, ModelConfig]:
    """The families in small; widths grow with `hidden` as in the large models."""
    hybrid = ModelConfig(
        pattern="M-M*-M-M*-", hidden=hidden, vocab=VOCAB, ffn=4 * hidden, heads=hidden // 64, kv_heads=2, head_dim=64,
        mamba_heads=hidden // 32, mamba_head_dim=64, mamba_state=64, mamba_groups=2,
    )  # fmt: skip
    gemma = replace(
        hybrid, pattern="w-*-w-*-", activation="geglu", position="rope", window_tokens=512, attention_softcap=50.0,
        logit_softcap=30.0, norm_eps=1e-6, norm_offset=1, post_norms=True, scale_embedding=True, tie_embeddings=True,
    )  # fmt: skip
    return {"hybrid": hybrid, "gemma": gemma, "mamba": replace(hybrid, pattern="M-M-M-M-")}


@contextmanager
def ours_and_theirs(shape: ModelConfig) -> Iterator[tuple[Any, Any]]:
    """Our model and transformers' with the same weights."""
    theirs = peer_of(shape).eval()
    recipe = replace(RECIPE, model=shape)
    layout = check(recipe, world=1)
    with mesh_of(recipe, layout, device=torch.device("cpu"), rank=0) as mesh, torch.no_grad():
        (ours,) = build_model(
            shape, parallel=recipe.parallel, precision=recipe.precision, run=recipe.run, row_tokens=recipe.data.row_tokens,
            mesh=mesh, backend=ReferenceBackend(),
        )  # fmt: skip
        tensors = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(their_part(name, tensors, shape).view(parameter.shape))
        yield ours.eval(), theirs


def now() -> float:
    """Seconds of the chosen clock."""
    return time.process_time() if CLOCK == "cpu" else time.perf_counter()


def prompts_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def engine_tokens(model: Any, shape: ModelConfig, prompts: torch.Tensor, count: int) -> tuple[list[list[int]], float]:
    """-> (generated tokens, seconds)"""
    config = EngineConfig(rows=len(prompts), context_tokens=prompts.shape[1] + count, step_tokens=512)
    engine = InferenceEngine(model, shape, config)
    start = now()
    events = engine.run([Request(prompt, count, sampling=Sampling(temperature=0.0)) for prompt in prompts.tolist()])
    return [[e.token.id for e in one if e.token is not None] for one in events], now() - start


def their_tokens(model: Any, prompts: torch.Tensor, count: int) -> tuple[list[list[int]], float]:
    start = now()
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        use_cache=True, pad_token_id=0,
    )  # fmt: skip
    return out[:, prompts.shape[1] :].tolist(), now() - start


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def against_peers(arguments: argparse.Namespace) -> None:
    print(
        f"hidden {arguments.hidden}, prompts of {PROMPT} tokens, {arguments.tokens} new ones, "
        f"{arguments.threads} threads, seconds of the {CLOCK}\n"
    )
    print(
        "| family | batch | ours, tokens/s | theirs, tokens/s | ratio | equal tokens | machine |\n|---|---|---|---|---|---|---|"
    )
    for name, shape in shapes(arguments.hidden).items():
        if name == "mamba":
            continue
        with ours_and_theirs(shape) as (ours, theirs), torch.no_grad():
            for batch in (1, 16):
                prompts = prompts_of(batch, PROMPT)
                engine_tokens(ours, shape, prompts, 4)
                best = [float("inf"), float("inf")]
                same = 0
                for _ in range(arguments.rounds):
                    mine, seconds = engine_tokens(ours, shape, prompts, arguments.tokens)
                    best[0] = min(best[0], seconds)
                    peer, seconds = their_tokens(theirs, prompts, arguments.tokens)
                    best[1] = min(best[1], seconds)
                    same = sum(
                        a == b for one, two in zip(mine, peer, strict=True) for a, b in zip(one, two, strict=True)
                    )
                speed = [batch * arguments.tokens / seconds for seconds in best]
                print(
                    f"| {name} | {batch} | {speed[0]:,.0f} | {speed[1]:,.0f} | {speed[0] / speed[1]:.2f} | "
                    f"{same} of {batch * arguments.tokens} | {load()} |",
                    flush=True,
                )


def over_contexts(arguments: argparse.Namespace) -> None:
    """Time per token at growing contexts."""
    print("| family | context | ms per token | machine |\n|---|---|---|---|")
    for name, shape in shapes(arguments.hidden).items():
        with ours_and_theirs(shape) as (ours, _), torch.no_grad():
            for context in (1024, 4096, 16384, 32768):
                config = EngineConfig(rows=1, context_tokens=context + 33, step_tokens=1024)
                engine = InferenceEngine(ours, shape, config)
                engine.add(Request(prompts_of(1, context)[0].tolist(), 33, sampling=Sampling(temperature=0.0)))
                while not engine.stats().generated_tokens:
                    engine.step()
                start = now()
                while not engine.is_idle:
                    engine.step()
                print(f"| {name} | {context:,} | {(now() - start) / 32 * 1e3:.2f} | {load()} |", flush=True)


def profile(arguments: argparse.Namespace) -> None:
    """Where the time of a decode step goes."""
    import cProfile
    import pstats

    shape = shapes(arguments.hidden)["hybrid"]
    with ours_and_theirs(shape) as (ours, _), torch.no_grad():
        for batch in (1, 16):
            prompts = prompts_of(batch, PROMPT)
            engine_tokens(ours, shape, prompts, 4)
            profiler = cProfile.Profile()
            profiler.enable()
            engine_tokens(ours, shape, prompts, arguments.tokens)
            profiler.disable()
            print(f"batch {batch}")
            pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--part", choices=("peers", "context", "profile"), default="peers")
    arguments = parser.parse_args()
    global CLOCK
    CLOCK = arguments.clock
    torch.set_num_threads(arguments.threads)
    {"peers": against_peers, "context": over_contexts, "profile": profile}[arguments.part](arguments)


if __name__ == "__main__":
    main()
