"""`make bench`: how fast the smoke recipe trains, and against what. Prints a Markdown table; nothing is written.

Everything is measured in one process, in turn (ours, theirs, ours, theirs, ...), because the machine's speed drifts:
compare figures of one table only. Medians. Needs `make smoke`'s data only by shape: tokens are random.

    python -m tests.bench [--rounds 8] [--threads 2]
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / ".oracle")]

import numpy as np
import torch
from tiny import RECIPE, engine_of

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from data.batch import Batch
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import flops_per_token, parameters
from recipes.schema.recipe import Recipe
from recipes.schema.schedule import learning_rate_factor
from recipes.schema.telemetry import TelemetryConfig
from train.engine import Engine
from train.model import ssd
from train.native.scan import ScanSizes, ScanWeights
from train.record.machine import peak_flops
from train.record.stopwatch import Stopwatch
from train.record.telemetry import Telemetry
from train.resilience.faults import StopSignals, check_grad_norm
from train.step import train_step

ROWS, ROW_TOKENS = 8, 256
TOKENS = ROWS * ROW_TOKENS
SMOKE = ModelConfig(
    pattern="M-M*-M-M*-", hidden=256, vocab=4096, ffn=1024, heads=4, kv_heads=2, head_dim=64,
    mamba_heads=8, mamba_head_dim=64, mamba_state=64, mamba_groups=2, mamba_chunk=64,
)  # fmt: skip
PEER = replace(SMOKE, pattern="M-M*M-", vocab=8192, mamba_groups=1)
"""The shape transformers' Nemotron-H is compared at."""


def recipe_of(model: ModelConfig) -> Recipe:
    run = replace(RECIPE.run, global_rows=ROWS, microbatch_rows=ROWS)
    return replace(RECIPE, model=model, run=run, data=replace(RECIPE.data, row_tokens=ROW_TOKENS))


def batch_of(vocab: int) -> Batch:
    both = torch.randint(0, vocab, (ROWS, ROW_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=both[:, :-1].contiguous(),
        labels=both[:, 1:].contiguous(),
        document_index=torch.zeros(ROWS, ROW_TOKENS, dtype=torch.int32),
        source=torch.zeros(ROWS, dtype=torch.int32),
        positions=np.arange(ROWS),
    )


def in_turn(rounds: int, *works: Callable[[], object], warmup: int = 2) -> list[float]:
    """Median seconds of each of `works`, run one after the other `rounds` times."""
    seconds: list[list[float]] = [[] for _ in works]
    for index in range(rounds + warmup):
        for work, spent in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if index >= warmup:
                spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in seconds]


def bare_step(engine: Engine, batch: Batch) -> None:
    """Forward, backward and update, and nothing else."""
    train_step(engine, [batch], step=0, learning_rate=1e-3, watch=Stopwatch())


def loop_body(
    engine: Engine, batch: Batch, telemetry: Telemetry, recipe: Recipe, signals: StopSignals
) -> Callable[[], None]:
    """One turn of train.loop: everything around the step that is not evaluation or saving."""
    steps = iter(range(1, 1 << 30))

    def turn() -> None:
        step, watch = next(steps), Stopwatch()
        watch.lap("data")
        factor = learning_rate_factor(recipe.schedule, step=step, tokens=0, total_steps=1 << 30, tokens_per_step=TOKENS)
        result = train_step(engine, [batch], step=0, learning_rate=1e-3 * factor, watch=watch)
        check_grad_norm(step, grad_norm=result.grad_norm, advice=str)
        telemetry.record(
            step, loss=result.loss, grad_norm=result.grad_norm, learning_rate=1e-3, seconds=watch.seconds()
        )
        engine.mesh.any_rank(signals.received is not None)

    return turn


def smoke_rows(rounds: int, peak: float) -> list[tuple[str, str]]:
    recipe = recipe_of(SMOKE)
    batch = batch_of(SMOKE.vocab)
    with engine_of(recipe, rank=0, world=1) as engine, TemporaryDirectory() as folder, StopSignals() as signals:
        torch.set_num_threads(THREADS)
        telemetry = Telemetry(
            Path(folder),
            TelemetryConfig(progress=False),
            is_writer=True,
            reduce=engine.mesh.sum_over_world,
            device=engine.mesh.device,
            total_steps=1 << 30,
            first_step=0,
            tokens_per_step=TOKENS,
            flops_per_token=1.0,
            peak_flops=1.0,
            recipe_dict={},
        )
        bare, looped = in_turn(
            rounds, lambda: bare_step(engine, batch), loop_body(engine, batch, telemetry, recipe, signals)
        )
        telemetry.close()
    flops = flops_per_token(SMOKE, ROW_TOKENS)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        ("smoke recipe", f"{TOKENS / looped:,.0f} tokens/s ({parameters(SMOKE).total:,} parameters)"),
        ("share of the GEMM peak", f"{TOKENS * flops.total / looped / peak:.2f} (target 0.6)"),
        ("whole loop over the bare step", f"{100 * (looped / bare - 1):+.1f} % (target at most 3 %)"),
        ("peak memory so far", f"{memory:.2f} GiB"),
    ]


def peer_rows(rounds: int, peak: float) -> list[tuple[str, str]]:
    """Against transformers' Nemotron-H of the same shape, with torch's fused AdamW and clipping."""
    from parity.peers import peer_of
    from torch.nn import functional as F

    torch.set_num_threads(THREADS)
    oracle = peer_of(PEER)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    batch = batch_of(PEER.vocab)

    def theirs() -> None:
        optimizer.zero_grad()
        logits = oracle(batch.tokens).logits
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()

    with engine_of(recipe_of(PEER), rank=0, world=1) as engine:
        torch.set_num_threads(THREADS)
        ours_s, theirs_s = in_turn(rounds, lambda: bare_step(engine, batch), theirs)
    share = TOKENS * flops_per_token(PEER, ROW_TOKENS).total / ours_s / peak
    return [
        ("ours, peer's shape", f"{TOKENS / ours_s:,.0f} tokens/s, {share:.2f} of the GEMM peak"),
        ("transformers' Nemotron-H", f"{TOKENS / theirs_s:,.0f} tokens/s"),
        ("ours / theirs", f"{theirs_s / ours_s:.2f} x (target 1.5; both with this process's memory setting)"),
    ]


def scan_rows(rounds: int) -> list[tuple[str, str]]:
    """Forward and backward of the scan against the torch reference that mamba-ssm ships (`make test-oracle` brings it)."""
    if not (ROOT / ".oracle").is_dir():
        return [("scan", "not compared: run `make test-oracle` once to fetch mamba-ssm's reference")]
    from parity import triton_on_cpu

    triton_on_cpu.install()
    from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref

    torch.set_num_threads(THREADS)
    g = torch.Generator().manual_seed(0)
    heads, width, state = SMOKE.mamba_heads, SMOKE.mamba_head_dim, SMOKE.mamba_state
    inner, groups = heads * width, SMOKE.mamba_groups

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    zxbcdt = randn(ROW_TOKENS, ROWS, 2 * inner + 2 * groups * state + heads)
    conv_weight, conv_bias = randn(inner + 2 * groups * state, 4), randn(inner + 2 * groups * state)
    dt_bias, A_log, D = randn(heads), randn(heads), randn(heads)
    weights = torch.randn(ROW_TOKENS, ROWS, inner, generator=g)
    x, dt = randn(ROWS, ROW_TOKENS, heads, width), randn(ROWS, ROW_TOKENS, heads)
    B, C = randn(ROWS, ROW_TOKENS, groups, state), randn(ROWS, ROW_TOKENS, groups, state)
    z = randn(ROWS, ROW_TOKENS, heads, width)

    parameters = ScanWeights(conv_weight, conv_bias, dt_bias, A_log, D)
    sizes = ScanSizes(heads=heads, head_dim=width, state=state, groups=groups, chunk=SMOKE.mamba_chunk)

    def ours() -> None:  # convolution, scan and gate
        y = ssd.mamba_core(zxbcdt, parameters, sizes=sizes)
        torch.autograd.grad(y, [zxbcdt, *parameters], weights)

    def reference() -> None:  # scan and gate only
        y = ssd_chunk_scan_combined_ref(
            x, dt, -torch.exp(A_log), B, C, SMOKE.mamba_chunk, D=D, z=z, dt_bias=dt_bias, dt_softplus=True
        )
        torch.autograd.grad(
            y, [x, dt, A_log, B, C, D, z, dt_bias], weights.view(ROW_TOKENS, ROWS, heads, width).transpose(0, 1)
        )

    ours_s, reference_s = in_turn(rounds, ours, reference)
    return [
        ("scan with convolution, ours", f"{1000 * ours_s:.1f} ms forward + backward, one layer of the smoke recipe"),
        ("scan, mamba-ssm's torch reference", f"{1000 * reference_s:.1f} ms, without the convolution"),
        ("reference / ours", f"{reference_s / ours_s:.1f} x (target 3)"),
    ]


def main() -> None:
    peak = peak_flops(torch.device("cpu"))
    assert peak is not None
    rows = [("machine's GEMM peak, fp32 1024^3", f"{peak / 1e9:.0f} GFLOP/s, {THREADS} threads")]
    rows += smoke_rows(ARGUMENTS.rounds, peak)
    rows += peer_rows(ARGUMENTS.rounds, peak)
    rows += scan_rows(ARGUMENTS.rounds)
    sys.stdout.write("| what | figure |\n|---|---|\n" + "".join(f"| {name} | {figure} |\n" for name, figure in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds of each pair (default 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    ARGUMENTS = parser.parse_args()
    THREADS = ARGUMENTS.threads
    torch.set_num_threads(THREADS)
    main()
