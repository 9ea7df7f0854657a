"""`make bench-inference`: tokens per second of the inference engine against transformers' `generate` and vLLM. Prints Markdown.

The same weights in both: a model of transformers with random weights, copied into ours. Both generate greedily, the same
number of tokens after prompts of equal length (transformers pads ragged batches; this is its best case). They take turns in
one process, because the machine's speed drifts; the best of all rounds counts. The load of the machine is printed: on a busy
machine compare the figures of one line only, with `--threads 1 --clock cpu`: the processor's seconds instead of the wall's.

vLLM (its CPU build, tests/parity/install_vllm.sh; left out where it is not installed) reads the same weights from a folder that
transformers saved, in a process of its own, with as many threads.

Parts: peers (the table of speeds), context (time per token at growing contexts), profile, equal (a hybrid against a transformer
of equal parameters at the largest batches of one budget), tensor (one rank and two).

    python -m tests.bench.inference [--threads 1] [--rounds 3] [--tokens 128] [--hidden 256] [--part peers]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from parity.peers import peer_of, their_part
from ranks import run_ranks
from tiny import RECIPE
from transformers import Qwen3Config, Qwen3ForCausalLM

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from launch.plan.cost.inference import cache_bytes, cache_sizes, inference_memory
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import parameters
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
    with built(shape) as ours, torch.no_grad():
        tensors = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(their_part(name, tensors, shape).view(parameter.shape))
        yield ours, theirs


def now() -> float:
    """Seconds of the chosen clock."""
    return time.process_time() if CLOCK == "cpu" else time.perf_counter()


def prompts_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def engine_tokens(
    model: Any, shape: ModelConfig, prompts: torch.Tensor, count: int, is_prepared: bool = True
) -> tuple[list[list[int]], float]:
    """-> (generated tokens, seconds). is_prepared: steps of one token a text take the short way (train/model/few_tokens.py)."""
    config = EngineConfig(rows=len(prompts), context_tokens=prompts.shape[1] + count, step_tokens=512)
    engine = InferenceEngine(model, shape, config)
    if not is_prepared:
        engine._few = None  # type: ignore[assignment]
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


class VLLM:
    """vLLM in its own process, with a model that transformers saved."""

    def __init__(self, theirs: Any, folder: Path, *, context_tokens: int, threads: int) -> None:
        theirs.save_pretrained(folder)
        self.process = subprocess.Popen(
            [VLLM_PYTHON, ROOT / "tests/bench/vllm_speed.py", folder, str(context_tokens)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self._line("ready")

    def _line(self, begin: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(begin):
                return line[len(begin) :]
        raise RuntimeError("vLLM has ended; run tests/bench/vllm_speed.py by itself to see why")

    def tokens(self, prompts: torch.Tensor, count: int) -> tuple[list[list[int]], float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts.tolist(), "tokens": count}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._line("answer"))
        return answer["ids"], answer["seconds"]


VLLM_PYTHON = ROOT / ".oracle/vllm/bin/python"


@contextmanager
def vllm_or_none(theirs: Any, arguments: argparse.Namespace) -> Iterator[VLLM | None]:
    """None where vLLM is not installed; also for `--clock cpu`, which measures this process only."""
    if not (ROOT / ".oracle/vllm/.installed").exists() or arguments.clock == "cpu":
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        vllm = VLLM(theirs, Path(folder), context_tokens=PROMPT + arguments.tokens, threads=arguments.threads)
        try:
            yield vllm
        finally:
            vllm.process.kill()


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def against_peers(arguments: argparse.Namespace) -> None:
    print(
        f"hidden {arguments.hidden}, prompts of {PROMPT} tokens, {arguments.tokens} new ones, "
        f"{arguments.threads} threads, seconds of the {CLOCK}\n"
    )
    print(
        "| family | batch | ours, tokens/s | transformers | ratio | vLLM | ratio | equal tokens | machine |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in arguments.families:
        shape = shapes(arguments.hidden)[name]
        with ours_and_theirs(shape) as (ours, theirs), torch.no_grad(), vllm_or_none(theirs, arguments) as vllm:
            for batch in (1, 16):
                prompts = prompts_of(batch, PROMPT)
                engine_tokens(ours, shape, prompts, 4)
                ways: dict[str, Callable[[torch.Tensor, int], tuple[list[list[int]], float]]] = {
                    "ours": partial(engine_tokens, ours, shape),
                    "transformers": partial(their_tokens, theirs),
                }
                if vllm is not None:
                    ways["vLLM"] = vllm.tokens
                    vllm.tokens(prompts, 4)
                found = {}
                best = dict.fromkeys(ways, float("inf"))
                for _ in range(arguments.rounds):
                    for way, tokens in ways.items():
                        found[way], seconds = tokens(prompts, arguments.tokens)
                        best[way] = min(best[way], seconds)
                speed = {way: batch * arguments.tokens / seconds for way, seconds in best.items()}
                pairs = zip(found["ours"], found["transformers"], strict=True)
                same = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))
                other = (
                    f"{speed['vLLM']:,.0f} | {speed['ours'] / speed['vLLM']:.2f}"
                    if vllm is not None
                    else "not measured | "
                )
                print(
                    f"| {name} | {batch} | {speed['ours']:,.0f} | {speed['transformers']:,.0f} | "
                    f"{speed['ours'] / speed['transformers']:.2f} | {other} | {same} of {batch * arguments.tokens} | {load()} |",
                    flush=True,
                )


def over_contexts(arguments: argparse.Namespace) -> None:
    """Time per token at growing contexts."""
    print("| family | context | ms per token | machine |\n|---|---|---|---|")
    for name in arguments.families:
        shape = shapes(arguments.hidden)[name]
        with ours_and_theirs(shape) as (ours, _), torch.no_grad():
            for context in arguments.contexts:
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


def equal_parameters(arguments: argparse.Namespace) -> None:
    """A hybrid and a transformer of equal parameters, each at the largest batch that one budget holds.

    8k in, 16k out on an A10G are scaled by 1/64: 128 in, 256 out. The budget has the A10G's proportion to the hybrid's weights:
    20.96 GiB usable for 16.56 GiB (fp32 here).
    """
    read, written = 128, 256
    hybrid = shapes(arguments.hidden)["hybrid"]
    # Like Qwen3-8B: attention and gated MLP in turn, a quarter as many key/value heads, rotary positions.
    dense = replace(
        hybrid,
        pattern="*-" * 6,
        activation="swiglu",
        position="rope",
        kv_heads=max(1, hybrid.heads // 4),
        ffn=3 * hybrid.hidden,
    )
    budget = parameters(hybrid).total * 4 * 20.96 / 16.56
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=dense.hidden, intermediate_size=dense.ffn, num_hidden_layers=6,
        num_attention_heads=dense.heads, num_key_value_heads=dense.kv_heads, head_dim=dense.head_dim, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    qwen = Qwen3ForCausalLM(config).eval()
    found: dict[str, list[float]] = {}
    print(
        "| model | parameters | batch | ours, tokens/s | transformers, tokens/s | machine |\n|---|---|---|---|---|---|"
    )
    for name, shape in (("hybrid", hybrid), ("transformer", dense)):
        with built(shape) as ours, torch.no_grad():
            theirs = peer_of(shape).eval() if name == "hybrid" else qwen
            room = budget - parameters(shape).total * 4
            one = cache_bytes(shape, engine_sizes(shape, 1, read + written), number_bytes=4).total
            batch = max(1, int(room // one))
            prompts, best = prompts_of(batch, read), [float("inf"), float("inf")]
            for _ in range(arguments.rounds):
                best[0] = min(best[0], engine_tokens(ours, shape, prompts, written)[1])
                best[1] = min(best[1], their_tokens(theirs, prompts, written)[1])
            # The roofline's bytes of a step, at the mean context.
            memory = inference_memory(
                shape, context_tokens=read + written // 2, batch=batch, weight_bytes=4, cache_bytes=4
            )
            moved = memory.weights - 4 * parameters(shape).embedding + memory.keys_values + 2 * memory.mamba_states
            speeds = [batch * written / seconds for seconds in best]
            found[name] = [*speeds, batch / moved]
            print(
                f"| {name} | {parameters(shape).total:,} | {batch} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {load()} |",
                flush=True,
            )
    ratios = [a / b for a, b in zip(found["hybrid"], found["transformer"], strict=True)]
    print(f"\nhybrid / transformer: ours {ratios[0]:.2f}, transformers {ratios[1]:.2f}, bytes alone {ratios[2]:.2f}")


def engine_sizes(shape: ModelConfig, rows: int, context_tokens: int) -> Any:
    return cache_sizes(shape, rows=rows, context_tokens=context_tokens, page_tokens=16, step_tokens=512, number_bytes=4)


@contextmanager
def built(shape: ModelConfig, *, rank: int = 0, tensor: int = 1) -> Iterator[Any]:
    """Our model with random weights, or a tensor rank's part."""
    recipe = replace(RECIPE, model=shape, parallel=replace(RECIPE.parallel, tensor=tensor, sequence=False))
    layout = check(recipe, world=tensor)
    with mesh_of(recipe, layout, device=torch.device("cpu"), rank=rank) as mesh, torch.no_grad():
        (ours,) = build_model(
            shape, parallel=recipe.parallel, precision=recipe.precision, run=recipe.run, row_tokens=recipe.data.row_tokens,
            mesh=mesh, backend=ReferenceBackend(),
        )  # fmt: skip
        yield ours.eval()


def tensor_rank(rank: int, tensor: int, hidden: int, tokens: int, rounds: int) -> list[tuple[int, bool, float]]:
    """For `run_ranks`: (batch, whether steps are prepared, tokens/s) of this rank."""
    torch.set_num_threads(1)
    shape, found = shapes(hidden)["hybrid"], []
    with built(shape, rank=rank, tensor=tensor) as model, torch.no_grad():
        for batch in (1, 16):
            for is_prepared in (True, False):
                best = float("inf")
                for _ in range(rounds):
                    best = min(best, engine_tokens(model, shape, prompts_of(batch, PROMPT), tokens, is_prepared)[1])
                found.append((batch, is_prepared, batch * tokens / best))
    return found


def over_tensor_ranks(arguments: argparse.Namespace) -> None:
    print("| tensor ranks | batch | prepared steps | tokens/s | machine |\n|---|---|---|---|---|")
    for tensor in (1, 2):
        for batch, is_prepared, speed in run_ranks(
            tensor, tensor_rank, tensor, arguments.hidden, arguments.tokens, arguments.rounds
        )[0]:
            print(f"| {tensor} | {batch} | {'yes' if is_prepared else 'no'} | {speed:,.0f} | {load()} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parts = {
        "peers": against_peers, "context": over_contexts, "profile": profile, "equal": equal_parameters,
        "tensor": over_tensor_ranks,
    }  # fmt: skip
    parser.add_argument("--part", choices=parts, default="peers")
    parser.add_argument("--families", nargs="+", choices=("hybrid", "gemma", "mamba"))
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 32768])
    arguments = parser.parse_args()
    global CLOCK
    CLOCK = arguments.clock
    torch.set_num_threads(arguments.threads)
    if arguments.families is None:
        arguments.families = ["hybrid", "gemma"] if arguments.part == "peers" else ["hybrid", "gemma", "mamba"]
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
