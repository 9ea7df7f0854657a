"""`make bench-moe`: an expert layer, forward and backward, against a dense MLP of the same active width, and against
transformers' Nemotron-H experts. Prints a Markdown table.

All layers run in this process and take turns, because the machine's speed drifts. Medians; compare figures of one table only.
fp32, squared ReLU, no shared expert: top-k experts of width f against an MLP of width k f.

    python -m tests.bench.moe [--hidden 512] [--ffn 1024] [--experts 16] [--top-k 2] [--tokens 2048] [--rounds 9] [--threads 1]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from tiny import RECIPE, engine_of

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from recipes.schema.experts import ExpertsConfig
from recipes.schema.model import ModelConfig


def seconds_of(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Wall seconds of one forward and backward pass."""
    x = x.detach().requires_grad_()
    started = time.perf_counter()
    y = layer(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - started


def theirs(parsed: argparse.Namespace) -> torch.nn.Module:
    """transformers' layer of the same shape, as installed: its own choice of an implementation."""
    from transformers import NemotronHConfig  # optional: slow to import
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE  # likewise

    config = NemotronHConfig(
        hybrid_override_pattern="E", num_hidden_layers=1, hidden_size=parsed.hidden, n_routed_experts=parsed.experts,
        num_experts_per_tok=parsed.top_k, moe_intermediate_size=parsed.ffn, moe_shared_expert_intermediate_size=1,
    )  # fmt: skip
    layer = NemotronHMoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def parser() -> argparse.ArgumentParser:
    """Sizes of the layers and how they are timed."""
    made = argparse.ArgumentParser()
    for name, default in (
        ("hidden", 512), ("ffn", 1024), ("experts", 16), ("top-k", 2), ("tokens", 2048), ("rounds", 9), ("threads", 1),
    ):  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default)
    return made


def measured(parsed: argparse.Namespace) -> tuple[dict[str, list[float]], torch.Tensor]:
    """-> (seconds of each round by layer, tokens that each expert got in the last)."""
    experts = ExpertsConfig(count=parsed.experts, top_k=parsed.top_k, ffn=parsed.ffn)
    model = ModelConfig(pattern="E-", hidden=parsed.hidden, vocab=256, ffn=parsed.top_k * parsed.ffn, experts=experts)
    recipe = replace(RECIPE, model=model)
    with engine_of(recipe, rank=0, world=1) as engine:
        torch.set_num_threads(parsed.threads)
        mixture, dense = (layer.mlp for layer in engine.chunks[0].module.decoder.layers)
        peer = theirs(parsed)
        x = torch.randn(parsed.tokens, 1, parsed.hidden)
        layers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "dense MLP": lambda x: dense(x)[0],
            "expert layer": lambda x: mixture(x)[0],
            "transformers' experts": lambda x: peer(x.transpose(0, 1)).transpose(0, 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for round_ in range(parsed.rounds + 1):
            for name, layer in layers.items():
                spent = seconds_of(layer, x)
                if round_:  # the first warms up
                    seconds[name].append(spent)
        return seconds, mixture.take_load()[0].per_expert


def main() -> None:
    parsed = parser().parse_args()
    seconds, rows = measured(parsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    busiest = float(rows.max()) / float(rows.double().mean())
    print(
        f"{parsed.experts} experts, top-{parsed.top_k}, hidden {parsed.hidden}, expert width {parsed.ffn}, "
        f"{parsed.tokens} tokens, {parsed.threads} threads, fp32; the busiest expert has {busiest:.2f} times the mean\n"
    )
    print("| layer | ms forward and backward | of the dense MLP |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1e3 * median:.1f} | {median / medians['dense MLP']:.2f} |")


if __name__ == "__main__":
    main()
