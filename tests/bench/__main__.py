"""`make bench`: how fast the smoke recipe trains, and against what. Prints a Markdown table; nothing is written.

Everything is measured in one process, in turn (ours, theirs, ours, theirs, ...), because the machine's speed drifts:
compare figures of one table only. Medians. Needs `make smoke`'s data only by shape: tokens are random.

    python -m tests.bench [--part smoke|peers|scan] [--rounds 8] [--threads 2]
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / ".oracle")]

import torch
from shards import random_documents, write_folder
from tiny import RECIPE, engine_of, one_document_rows

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from data.batch import Batch
from data.dataset import open_dataset
from data.stream import Stream
from recipes.schema.data import SourceConfig
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import flops_per_token, parameters
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.engine import Engine
from train.loop import train_loop
from train.model import ssd
from train.native.scan import ScanSizes, ScanWeights
from train.record.machine import peak_flops
from train.record.profile import Profiler
from train.record.stopwatch import Stopwatch
from train.record.telemetry import Telemetry
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
    return one_document_rows(both[:, :-1].contiguous(), both[:, 1:].contiguous())


def in_turn(
    rounds: int, *works: Callable[[], object], warmup: int = 2, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of each of `works`, run one after the other `rounds` times."""
    seconds: list[list[float]] = [[] for _ in works]
    for index in range(rounds + warmup):
        for work, spent in zip(works, seconds, strict=True):
            start = clock()
            work()
            if index >= warmup:
                spent.append(clock() - start)
    return [statistics.median(spent) for spent in seconds]


def bare_step(engine: Engine, batch: Batch) -> None:
    """Forward, backward and update, and nothing else."""
    train_step(engine, [batch], step=0, learning_rate=1e-3, watch=Stopwatch())


@contextmanager
def loop_of(engine: Engine, recipe: Recipe, folder: Path, peak: float) -> Iterator[tuple[Callable[[], None], Batch]]:
    """A function that trains `recipe.run.stop_after_steps` steps with the real loop: rows read ahead from disk, metrics.jsonl,
    the terminal's lines; no saves, no evaluations. And a batch of such rows."""
    run = recipe.run
    assert run.stop_after_steps is not None
    names = ("one", "two")
    write_folder(folder / "data", {name: [random_documents(4000, seed=index)] for index, name in enumerate(names)})
    data = replace(
        recipe.data, folder=str(folder / "data"), sources=dict.fromkeys(names, SourceConfig(path="made by hand"))
    )
    checkpoints = CheckpointFolder(folder / "checkpoints", recipe.checkpoint)
    telemetry = Telemetry(
        folder,
        recipe.telemetry,
        is_writer=True,
        reduce=engine.mesh.sum_over_world,
        device=engine.mesh.device,
        total_steps=run.steps,
        first_step=0,
        tokens_per_step=TOKENS,
        flops_per_token=flops_per_token(recipe.model, ROW_TOKENS).total,
        peak_flops=peak,
        recipe_dict={},
    )
    step = 0
    with Stream(
        open_dataset(data), position=0, global_rows=run.global_rows, microbatch_rows=run.microbatch_rows, rank=0, ranks=1,
        prefetch_steps=data.prefetch_steps, threads=data.read_threads,
    ) as stream:  # fmt: skip

        def train() -> None:
            nonlocal step
            with redirect_stderr(StringIO()):
                end = train_loop(
                    recipe, engine=engine, stream=stream, telemetry=telemetry, first_step=step,
                    evaluate=lambda _step: None, checkpoints=checkpoints, save=lambda *_at, **_how: None,
                    report=lambda _spike: None,
                    profiler=Profiler(run, folder=folder, chunks=(), rank=0, device=engine.mesh.device),
                )  # fmt: skip
            step = end.step

        yield train, stream.step_at(0)[0]
        telemetry.close()


def clocks() -> tuple[float, float]:
    """Wall time, and CPU time of all threads."""
    return time.perf_counter(), time.process_time()


def blocks_in_turn(
    rounds: int, first: Callable[[], object], second: Callable[[], object]
) -> list[list[tuple[float, float]]]:
    """Wall and CPU seconds of each block of both, after one block of each that does not count. They take turns, and take turns
    to be first."""
    seconds: list[list[tuple[float, float]]] = [[], []]
    for number in range(rounds + 1):
        for index, work in sorted(enumerate((first, second)), reverse=bool(number % 2)):
            started = clocks()
            work()
            if number:
                wall, cpu = (end - start for start, end in zip(started, clocks(), strict=True))
                seconds[index].append((wall, cpu))
    return seconds


def smoke_rows(rounds: int, peak: float, *, block: int) -> list[tuple[str, str]]:
    """Speed of the smoke recipe, and what the loop adds to a bare step: blocks of steps in turn, medians of each pair's ratio."""
    recipe = recipe_of(SMOKE)
    recipe = replace(
        recipe,
        run=replace(recipe.run, steps=1 << 30, stop_after_steps=block),
        checkpoint=replace(recipe.checkpoint, every_steps=0),
        evaluate=replace(recipe.evaluate, every_steps=0),
        telemetry=replace(recipe.telemetry, progress=False, tensorboard=False),
    )
    with engine_of(recipe, rank=0, world=1) as engine, TemporaryDirectory() as folder:
        torch.set_num_threads(THREADS)
        with loop_of(engine, recipe, Path(folder), peak) as (loop, batch):

            def bare() -> None:
                for _ in range(block):
                    bare_step(engine, batch)

            pairs = list(zip(*blocks_in_turn(rounds, bare, loop), strict=True))
    tokens_per_s = TOKENS * block / statistics.median(looped for _, (looped, _) in pairs)
    ratios = [[with_loop[clock] / without[clock] for without, with_loop in pairs] for clock in range(2)]
    flops = flops_per_token(SMOKE, ROW_TOKENS).total
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        ("smoke recipe", f"{tokens_per_s:,.0f} tokens/s ({parameters(SMOKE).total:,} parameters)"),
        ("share of the GEMM peak", f"{tokens_per_s * flops / peak:.2f} (target 0.6)"),
        ("whole loop over the bare step, wall time", f"{spread(ratios[0])} (target at most 3 %)"),
        ("whole loop over the bare step, CPU time", spread(ratios[1])),
        ("peak memory so far", f"{memory:.2f} GiB"),
    ]


def spread(ratios: list[float]) -> str:
    """Median of ratios as a change in percent, their quartiles and how many there are."""
    low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4, method="inclusive"))
    return f"{middle:+.1f} % (middle half of {len(ratios)} pairs: {low:+.1f} to {high:+.1f} %)"


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
    if ARGUMENTS.part in ("smoke", "all"):
        rows += smoke_rows(ARGUMENTS.rounds, peak, block=ARGUMENTS.block)
    if ARGUMENTS.part in ("peers", "all"):
        rows += peer_rows(ARGUMENTS.rounds, peak)
    if ARGUMENTS.part in ("scan", "all"):
        rows += scan_rows(ARGUMENTS.rounds)
    sys.stdout.write("| what | figure |\n|---|---|\n" + "".join(f"| {name} | {figure} |\n" for name, figure in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--part", choices=["all", "smoke", "peers", "scan"], default="all", help="what to measure")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds of each pair, 2 or more (default 8)")
    parser.add_argument("--block", type=int, default=10, help="steps in a block of bare or looped steps (default 10)")
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"rows of {ROW_TOKENS} tokens in a step (default {ROWS})"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    ARGUMENTS = parser.parse_args()
    THREADS = ARGUMENTS.threads
    ROWS, TOKENS = ARGUMENTS.rows, ARGUMENTS.rows * ROW_TOKENS
    torch.set_num_threads(THREADS)
    main()
