"""`make bench-model`: how fast both families train here, against transformers with the same shapes. Prints Markdown.

One step is forward, backward, clipping and update. Ours runs in this process; transformers' models run in processes of
their own, one as installed and one with this project's memory setting (freed memory is kept: docs/log.md), and all take
turns, because the machine's speed drifts. Medians. Compare figures of one table only. On a machine that others use too,
`--threads 1 --clock cpu` counts the processor's seconds instead of the wall's.

    python -m tests.bench.model [--part families|mamba|muon|share] [--lengths 256 1024] [--rounds 5] [--threads 2] [--clock cpu]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from recipes.schema.model import ModelConfig

VOCAB = 8192
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
STEP_TOKENS = 2048
"""Tokens of a step, as whole rows; longer rows are steps of one row."""
PEER_BYTES = 10 * 2**30
"""transformers' eager attention keeps about five [S, S] score matrices a head and layer; beyond this it is not started."""
KEEP_FREED_MEMORY = f"glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={1 << 40}"


def shapes() -> dict[str, ModelConfig]:
    hybrid = ModelConfig(
        pattern="M-M*M-", hidden=256, vocab=VOCAB, ffn=1024, heads=4, kv_heads=2, head_dim=64,
        mamba_heads=8, mamba_head_dim=64, mamba_state=64, mamba_groups=1, mamba_chunk=64,
    )  # fmt: skip
    gemma = replace(
        hybrid, pattern="w-*-w-*-w-*-", activation="geglu", position="rope", window_tokens=512, attention_softcap=50.0,
        logit_softcap=30.0, norm_eps=1e-6, norm_offset=1, post_norms=True, scale_embedding=True, tie_embeddings=True,
    )  # fmt: skip
    return {"hybrid": hybrid, "gemma": gemma}


@dataclass(frozen=True)
class Timing:
    """How steps are timed: CPU threads of each process, and the clock."""

    threads: int
    clock: Literal["wall", "cpu"]

    def now(self) -> float:
        """Seconds of the chosen clock."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


def rows_of(length: int) -> int:
    return max(1, STEP_TOKENS // length)


def tokens_for(rows: int, length: int, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


# ---- transformers, in a separate process: reads "family length" lines, prints the seconds of one step for each


def serve_peer(timing: Timing) -> None:
    from parity.peers import peer_of
    from torch.nn import functional as F

    torch.set_num_threads(timing.threads)
    family, model, optimizer = None, None, None
    for line in sys.stdin:
        name, length = line.split()
        if name != family:
            model = peer_of(shapes()[name])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
            family = name
        assert model is not None and optimizer is not None
        tokens, labels = tokens_for(rows_of(int(length)), int(length))
        start = timing.now()
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sys.stdout.write(f"{timing.now() - start}\n")
        sys.stdout.flush()


class Peer:
    """A process that trains transformers' models, a step at a time."""

    def __init__(self, *, keeps_memory: bool, timing: Timing) -> None:
        environment = dict(os.environ, TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS=str(timing.threads))
        if keeps_memory:
            environment["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY
        command = [sys.executable, "-m", "tests.bench.model", "--serve-peer"]
        command += ["--threads", str(timing.threads), "--clock", timing.clock]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)

    def step(self, family: str, length: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{family} {length}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- ours


def ours(
    model: ModelConfig, length: int, timing: Timing, *, optimizer: Literal["adamw", "muon"] = "adamw"
) -> AbstractContextManager[Callable[[], float]]:
    """Context manager of a function that runs one step and returns its seconds."""
    from tiny import RECIPE, engine_of, one_document_rows

    from train.record.stopwatch import Stopwatch
    from train.step import train_step

    rows = rows_of(length)
    recipe = replace(
        RECIPE,
        model=model,
        run=replace(RECIPE.run, global_rows=rows, microbatch_rows=rows),
        data=replace(RECIPE.data, row_tokens=length),
        optim=replace(RECIPE.optim, kind=optimizer),
    )
    tokens, labels = tokens_for(rows, length, model.vocab)
    batch = one_document_rows(tokens, labels)

    @contextmanager
    def opened() -> Iterator[Callable[[], float]]:
        with engine_of(recipe, rank=0, world=1) as engine:
            torch.set_num_threads(timing.threads)

            def step() -> float:
                start = timing.now()
                train_step(engine, [batch], step=0, learning_rate=1e-3, watch=Stopwatch())
                return timing.now() - start

            yield step

    return opened()


def gemm_peak(timing: Timing) -> float:
    """FLOPs a second of the best of 24 fp32 products of 1024 x 1024 matrices, by torch's own product or by ours."""
    from train.native.gemm import multiply

    a = torch.randn(1024, 1024)
    seconds = []
    for turn in range(24):
        start = timing.now()
        (torch.mm, multiply)[turn % 2](a, a)
        seconds.append(timing.now() - start)
    return 2 * 1024**3 / min(seconds)


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def in_turn(
    family: str, length: int, peers: list[Peer], *, rounds: int, timing: Timing
) -> tuple[list[float], list[list[float]]]:
    """Seconds of `rounds` of our steps and of each peer's, one after the other; a first round does not count."""
    mine: list[float] = []
    theirs: list[list[float]] = [[] for _ in peers]
    with ours(shapes()[family], length, timing) as step:
        for turn in range(rounds + 1):
            found = [step(), *(peer.step(family, length) for peer in peers)]
            if turn:
                for seconds, figure in zip([mine, *theirs], found, strict=True):
                    seconds.append(figure)
    return mine, theirs


def families_part(peak: float) -> None:
    from recipes.schema.pattern import flops_per_token

    print("| model | row | ours, tokens/s | share of GEMM peak | transformers | ours / theirs "
          "| with our memory setting | ours / theirs |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    peers = [Peer(keeps_memory=keeps, timing=TIMING) for keeps in (False, True)]
    for family, model in shapes().items():
        if ARGUMENTS.family and family != ARGUMENTS.family:
            continue
        for length in ARGUMENTS.lengths:
            rows = rows_of(length)
            attention = sum(kind in "*w" for kind in model.pattern)
            fits = 5 * 4 * rows * model.heads * length**2 * attention < PEER_BYTES
            seconds, spent = in_turn(family, length, peers if fits else [], rounds=ARGUMENTS.rounds, timing=TIMING)
            mine, tokens = median(seconds), rows * length
            share = tokens * flops_per_token(model, length).total / mine / peak
            figures = [f"{tokens / mine:,.0f}", f"{share:.2f}"]
            for theirs in map(median, spent):
                figures += [f"{tokens / theirs:,.0f}", f"{theirs / mine:.2f}"]
            figures += ["does not fit", "-"] * (len(peers) - len(spent))
            print(f"| {family} | {rows} x {length} | " + " | ".join(figures) + " |", flush=True)
    for peer in peers:
        peer.close()


def mamba_part() -> None:
    """Layers of Mamba-2 alone: the time of a token must not depend on the row's length."""
    hybrid = shapes()["hybrid"]
    pure = replace(hybrid, pattern="MMMM", vocab=256)
    print("| Mamba-2 alone, row | us per token |\n|---|---|")
    for length in ARGUMENTS.lengths:
        with ours(pure, length, TIMING) as step:
            step()
            seconds = median([step() for _ in range(ARGUMENTS.rounds)])
        print(f"| {rows_of(length)} x {length} | {1e6 * seconds / (rows_of(length) * length):.1f} |", flush=True)


def muon_part() -> None:
    """A step of Muon against one of AdamW, in turns of a few steps each."""
    print("| row | AdamW, ms a step | Muon, ms a step | Muon / AdamW |\n|---|---|---|---|")
    for length in ARGUMENTS.lengths:
        spent: dict[str, list[float]] = {"adamw": [], "muon": []}
        for _ in range(ARGUMENTS.rounds):
            for name, seconds in spent.items():
                with ours(shapes()["hybrid"], length, TIMING, optimizer=name) as step:  # type: ignore[arg-type]
                    step()
                    seconds += [step() for _ in range(3)]
        adamw, muon = (1000 * median(seconds) for seconds in spent.values())
        print(f"| {rows_of(length)} x {length} | {adamw:.0f} | {muon:.0f} | {muon / adamw:.2f} |", flush=True)


GROUPS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::baddbmm_"),
    "scan with convolution and gate": ("_MambaCore", "_MambaCoreBackward"),
    "attention": ("_Capped", "_CappedBackward", "aten::scaled_dot_product_attention", "ScaledDotProduct"),
    "loss": ("CrossEntropy",),
}


def share_part(peak: float) -> None:
    """Where the time of a step goes: torch's profiler, time of each operation without those it calls."""
    from torch.profiler import ProfilerActivity, profile

    for family, model in shapes().items():
        length = ARGUMENTS.lengths[0]
        with ours(model, length, TIMING) as step:
            step()
            bare = median([step() for _ in range(ARGUMENTS.rounds)])
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                step()
        events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"\n{family}, {rows_of(length)} x {length}: {1000 * bare:.0f} ms a step\n")
        print("| operation | share | calls |\n|---|---|---|")
        for event in events[: ARGUMENTS.top]:
            print(f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.count} |")


def main() -> None:
    torch.set_num_threads(ARGUMENTS.threads)
    peak = gemm_peak(TIMING)
    print(
        f"GEMM peak, fp32 1024^3: {peak / 1e9:.0f} GFLOP/s, {ARGUMENTS.threads} threads, {ARGUMENTS.clock} clock\n",
        flush=True,
    )
    if ARGUMENTS.part in ("families", "all"):
        families_part(peak)
    if ARGUMENTS.part in ("mamba", "all"):
        mamba_part()
    if ARGUMENTS.part in ("muon", "all"):
        muon_part()
    if ARGUMENTS.part in ("share", "all"):
        share_part(peak)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.model", description=__doc__)
    parser.add_argument(
        "--part", choices=["all", "families", "mamba", "muon", "share"], default="all", help="what to measure"
    )
    parser.add_argument("--family", choices=["hybrid", "gemma"], help="only this family")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="row lengths")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what is measured (default wall)")
    parser.add_argument("--top", type=int, default=16, help="operations listed by `share` (default 16)")
    parser.add_argument("--serve-peer", action="store_true", help=argparse.SUPPRESS)
    ARGUMENTS = parser.parse_args()
    TIMING = Timing(ARGUMENTS.threads, ARGUMENTS.clock)
    if ARGUMENTS.serve_peer:
        serve_peer(TIMING)
    else:
        main()
