"""`make bench-fp8`: what emulating each low-precision recipe costs. Prints a Markdown table; nothing is written.

Forward and backward of one linear layer, against the same layer in plain fp32 (the reference backend's), in turn in one
process; and torch's own CPU float8 product, where it exists, as a forward pass. Best of all rounds: the machine is noisy.

    python -m tests.bench.precision [--rounds 20] [--threads 2]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from recipes.schema.precision import PrecisionConfig
from recipes.schema.scaling import scaling_of
from train.model.linear import fast_linear
from train.native import quantize as native
from train.precision.emulated import LowPrecisionLinear, _Product

SHAPES = ((1024, 1024, 1024), (256, 512, 512))
"""(tokens, in, out)"""
SLOWEST_S = 0.002
"""A product of 64 x 64 matrices by torch._scaled_mm that takes longer is oneDNN's reference code: minutes for the shapes here."""
TARGETS = {
    "delayed": (1.2, 1.8),
    "current": (1.2, 1.8),
    "blockwise": (1.7, 2.5),
    "mxfp8": (1.8, 2.7),
    "nvfp4": (4.0, 8.0),
}


def both_passes(name: str, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a linear layer under a recipe ("fp32" is the reference backend's, "torch" torch's own)."""
    linear = LowPrecisionLinear(layer=0, name="", module=torch.nn.Module(), scales=(100.0, 100.0, 1000.0))

    def run() -> None:
        x.grad = weight.grad = None
        if name == "fp32":
            y = fast_linear(x, weight, None, False, False, False)
        elif name == "torch":
            y = torch.nn.functional.linear(x, weight)
        else:
            linear.scaling, linear.weight_cache = scaling_of(PrecisionConfig(), name), None
            y = _Product.apply(x, weight, linear, True)
        y.backward(grad)

    return run


def scaled_mm(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    """torch._scaled_mm with one scale a tensor: quantise both operands and multiply, forward only."""
    one = torch.tensor(1.0)

    def run() -> None:
        a, b = x.detach().to(torch.float8_e4m3fn), weight.detach().to(torch.float8_e4m3fn)
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)

    return run


def best(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Shortest seconds of each, run in turn."""
    seconds = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    form = "compiled kernels" if native.library() is not None else "plain torch (no compiler)"
    print(f"{options.threads} threads, {form}, best of {options.rounds} rounds; x = times the fp32 layer\n")
    print("| recipe | " + " | ".join(f"{t} x {i} x {o} | target" for t, i, o in SHAPES) + " |")
    print("|---|" + "---|---|" * len(SHAPES))
    columns = []
    small = torch.ones(64, 64)
    is_scaled_mm_fast = best({"": scaled_mm(small, small)}, 3)[""] < SLOWEST_S
    for tokens, into, out in SHAPES:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, into, generator=g).requires_grad_()
        weight = (torch.randn(out, into, generator=g) / into**0.5).requires_grad_()
        grad = torch.randn(tokens, out, generator=g)
        works = {name: both_passes(name, x, weight, grad) for name in ("fp32", "torch", *TARGETS)}
        seconds = best(works, options.rounds)
        products = {"fp32 forward": forward_only(x, weight)}
        if is_scaled_mm_fast:
            products["_scaled_mm"] = scaled_mm(x, weight)
        columns.append((seconds, best(products, options.rounds)))
    print("| fp32 | " + " | ".join(f"{1e3 * seconds['fp32']:.2f} ms | " for seconds, _ in columns) + " |")
    print("| torch's linear | " + " | ".join(f"x{s['torch'] / s['fp32']:.2f} | " for s, _ in columns) + " |")
    for name, targets in TARGETS.items():
        cells = [f"x{s[name] / s['fp32']:.2f} | {target}" for (s, _), target in zip(columns, targets, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if not is_scaled_mm_fast:
        print("\ntorch._scaled_mm is not compared: on this CPU torch has no fast product of float8 numbers")
        return
    cells = [f"x{p['_scaled_mm'] / p['fp32 forward']:.2f} | " for _, p in columns]
    print("| torch._scaled_mm, forward only | " + " | ".join(cells) + " |")


def forward_only(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    """The fp32 layer without its backward pass."""

    def run() -> None:
        torch.nn.functional.linear(x.detach(), weight.detach())

    return run


if __name__ == "__main__":
    main()
