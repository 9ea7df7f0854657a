"""Smaller shapes within a budget, ranked by the importance they keep.

    sizes to try --> every combination --> within parameters, memory and speed? --> ranked by importance kept --> the best few

Minitron (arXiv 2407.14679, section 3.3) enumerates shapes near a target size and retrains each for a short time. Nano 2
(arXiv 2508.14444, section 4) enumerates widths within a memory budget and distils the best three. Importance only selects
the candidates; which one is best is known after their training.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from launch.plan.cost.inference import inference_memory, roofline_tokens_per_s
from recipes.schema.compress import CompressConfig
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds, parameters
from train.compress.prune import AS_SCORED, BLOCK_INFLUENCE, Depth, Target, choose, pruned_model
from train.compress.scores import Scores


@dataclass(frozen=True)
class Shape:
    """A candidate and its costs."""

    target: Target
    model: ModelConfig
    parameters: int
    gib: float
    tokens_per_s: float

    def fits(self, config: CompressConfig) -> bool:
        """Whether it is within all limits of `compress.budget_*`."""
        wanted = config.budget_parameters
        near = not wanted or abs(self.parameters - wanted) <= config.budget_tolerance * wanted
        small = not config.budget_gib or self.gib <= config.budget_gib
        return near and small and self.tokens_per_s >= config.budget_tokens_per_s


def sizes(text: str, otherwise: int) -> list[int]:
    """`52,54,56` or `4480:5120:128` (both ends included) as numbers; empty: [otherwise]. RecipeError for any other text."""
    if not text.strip():
        return [otherwise]
    try:
        if ":" in text:
            first, last, step = (int(part) for part in text.split(":"))
            found = list(range(first, last + 1, step))
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RecipeError(f"compress.search_...={text!r} is neither numbers ([52,54,56]) nor first:last:step.")
    return found


def targets(config: CompressConfig) -> list[Target]:
    """Every combination of the sizes to try."""
    axes = ("layers", "hidden", "ffn", "heads", "mamba_heads")
    tried = [sizes(getattr(config, f"search_{axis}"), getattr(config, axis)) for axis in axes]
    return [
        Target(**dict(zip(axes, chosen, strict=True)), mamba_head_dim=config.mamba_head_dim)
        for chosen in itertools.product(*tried)
    ]


def shape_of(model: ModelConfig, target: Target, layers: list[int], config: CompressConfig) -> Shape:
    """A candidate with its costs for the device and context of `config`. RecipeError if sizes do not fit the parent."""
    small = pruned_model(model, target, layers)
    context, batch = config.budget_context_tokens, config.budget_batch
    speed = roofline_tokens_per_s(
        small, context_tokens=context, batch=batch, gb_per_s=config.device_gb_per_s, tflops=config.device_tflops
    )
    gib = inference_memory(small, context_tokens=context, batch=batch).gib
    return Shape(target, small, parameters=parameters(small).total, gib=gib, tokens_per_s=speed)


def feasible(
    model: ModelConfig, tried: list[Target], config: CompressConfig, *, layers_of: Callable[[Target], list[int]]
) -> list[Shape]:
    """The candidates within the budget, largest memory first. layers_of: gives the layers that a target keeps."""
    shapes = [shape_of(model, target, layers_of(target), config) for target in tried]
    return sorted((shape for shape in shapes if shape.fits(config)), key=lambda shape: (-shape.gib, str(shape.target)))


def damage(scores: Scores, target: Target, depth: Depth = AS_SCORED) -> float:
    """Estimated loss of a candidate, only for ranking: 0 for the parent, no unit.

    It is the share of squared scores removed, summed over the kinds of parts, plus the depth term: the relative error of the
    logits, or, without removal trials, the removed layers' share of the total block influence.
    """
    kept = choose(scores, target, depth)
    lost = [_share(scores.hidden, kept.hidden)]
    for kind, chosen in (("ffn", kept.ffn), ("heads", kept.heads)):
        if chosen:
            lost.append(float(np.mean([_share(scores.layers[n][kind], indices) for n, indices in chosen.items()])))
    if kept.mamba_heads:
        of_layers = []
        for number, heads in kept.mamba_heads.items():
            whole = scores.layers[number]["mamba"]
            part = whole[np.ix_(heads, kept.mamba_channels[number])]
            of_layers.append(1 - float((part**2).sum() / (whole**2).sum()))
        lost.append(float(np.mean(of_layers)))
    removed = len(scores.layers) - len(kept.layers)
    if removed and scores.removals and depth.metric != BLOCK_INFLUENCE:
        last = scores.removals[removed - 1]
        lost.append(next(c.logit_error for c in last.candidates if c.layer == last.layer))
    elif removed:
        lost.append(1 - float(scores.influence[kept.layers].sum() / scores.influence.sum()))
    return sum(lost)


def ranked(scores: Scores, shapes: list[Shape], depth: Depth = AS_SCORED) -> list[tuple[float, Shape]]:
    """(damage, candidate) pairs, smallest damage first."""
    found = [(damage(scores, shape.target, depth), shape) for shape in shapes]
    return sorted(found, key=lambda pair: pair[0])


def describe(shape: Shape) -> dict[str, object]:
    """A candidate as JSON values."""
    layers = len(layer_kinds(shape.model.pattern))
    return {**asdict(shape.target), "layers": layers, "pattern": shape.model.pattern, "parameters": shape.parameters,
            "gib": round(shape.gib, 3), "tokens_per_s": round(shape.tokens_per_s, 2)}  # fmt: skip


def _share(values: np.ndarray, kept: np.ndarray) -> float:
    """Share of squared scores that is removed."""
    total = float((values**2).sum())
    return 1 - float((values[kept] ** 2).sum()) / total if total else 0.0
