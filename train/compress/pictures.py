"""Pictures of scores: the distribution of importance over widths, and the effect of removing layers."""

from pathlib import Path
from typing import Any

import numpy as np

from data.system.figure import INK, MARK, MUTED, canvas
from recipes.schema.pattern import KINDS, layer_kinds
from train.compress.scores import Scores, model_of

_COLORS = {"M": "#2b6cb0", "*": "#e67700", "w": "#f0b429", "-": "#2f9e44"}
_QUARTERS = ("#1a4f8b", "#4a86c5", "#94bce3", "#dbe8f5")


def draw_widths(scores: Scores, path: Path, *, title: str) -> None:
    """Draw residual channels by importance, and neurons, heads and Mamba heads by layer."""
    kinds = layer_kinds(scores.model["pattern"])
    with canvas(path, size=(11, 6.6)) as figure:
        panels = figure.subplots(2, 2)
        figure.suptitle(f"{title}: importance of widths, {scores.rows:,} calibration rows", x=0.01, ha="left")
        axes = panels[0, 0]
        axes.plot(np.sort(scores.hidden)[::-1], color=_COLORS["M"], linewidth=2)
        axes.set(title="Residual channels, most important first", xlabel="rank", ylabel="score", ylim=(0, None))
        axes.grid(visible=True)
        _quarters(panels[0, 1], scores, [n for n, kind in enumerate(kinds) if kind == "-"])
        _heads(panels[1, 0], scores, "heads", "Query heads (score / layer's mean)")
        _heads(panels[1, 1], scores, "mamba", "Mamba-2 heads (score / layer's mean)")


def draw_layers(scores: Scores, path: Path, *, title: str) -> None:
    """Draw the block influence of each layer and, if removals were tried, the effect of each removal on the logits."""
    kinds = layer_kinds(scores.model["pattern"])
    numbers = np.arange(len(kinds))
    rounds = len(scores.removals)
    with canvas(path, size=(max(7, 0.28 * len(kinds) + 3), 3.2 + 0.42 * rounds + 1.2 * (rounds > 0))) as figure:
        ratios = [2.4, *([0.8 + 0.42 * rounds] if rounds else [])]
        panels = figure.subplots(1 + (rounds > 0), 1, squeeze=False, height_ratios=ratios)
        bars = panels[0, 0]
        bars.bar(numbers, scores.influence, color=[_COLORS[kind] for kind in kinds])
        bars.set(title=f"{title}: block influence, 1 - cos(input, output)", ylabel="influence")
        bars.set_xticks(numbers, [f"{kind}\n{n}" for n, kind in enumerate(kinds)])
        for kind in dict.fromkeys(kinds):
            bars.bar([0], [0], color=_COLORS[kind], label=KINDS[kind])
        bars.legend(loc="upper right", ncols=4)
        if rounds:
            _removals(panels[1, 0], scores, kinds)


def _removals(axes: Any, scores: Scores, kinds: list[Any]) -> None:
    by_loss = scores.depth_metric == "perplexity"
    grid = np.full((len(scores.removals), len(kinds)), np.nan)
    for index, removal in enumerate(scores.removals):
        for candidate in removal.candidates:
            grid[index, candidate.layer] = candidate.loss_increase if by_loss else candidate.logit_error
    shown = axes.imshow(np.log10(np.maximum(grid, 1e-6)), aspect="auto", cmap="Blues")
    what = "increase of the loss, nats" if by_loss else "logit error, relative"
    axes.set(title=f"Removal trials ({what}; outlined: removed)", xlabel="layer", ylabel="round")
    axes.set_xticks(range(len(kinds)), [str(n) for n in range(len(kinds))])
    axes.set_yticks(range(len(grid)), [str(n + 1) for n in range(len(grid))])
    middle = np.nanmean(np.log10(np.maximum(grid, 1e-6)))
    for index, removal in enumerate(scores.removals):
        box = {"fill": False, "edgecolor": MARK, "linewidth": 2}
        axes.bar(removal.layer, 1, width=1, bottom=index - 0.5, **box)
        if len(kinds) <= 24:
            for layer, value in enumerate(grid[index]):
                if np.isfinite(value):
                    color = "white" if np.log10(max(value, 1e-6)) > middle else INK
                    axes.text(layer, index, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)
    axes.figure.colorbar(shown, ax=axes, label="log10", pad=0.01)


def _quarters(axes: Any, scores: Scores, layers: list[int]) -> None:
    """Per MLP layer, the share of squared scores in each quarter of its neurons, best quarter first."""
    axes.set(title="MLP neurons: share of importance by quarter", xlabel="layer", ylabel="share")
    axes.set(ylim=(0, 1.16), yticks=np.linspace(0, 1, 6))  # bars fill 0 to 1; the space above is for the legend
    if not layers:
        return
    bottom = np.zeros(len(layers))
    for quarter in range(4):
        shares = []
        for number in layers:
            values = np.sort(scores.layers[number]["ffn"])[::-1] ** 2
            ends = [round(len(values) * q / 4) for q in (quarter, quarter + 1)]
            shares.append(values[ends[0] : ends[1]].sum() / max(values.sum(), 1e-300))
        label = ("best quarter", "second", "third", "last")[quarter]
        axes.bar(range(len(layers)), shares, bottom=bottom, color=_QUARTERS[quarter], label=label)
        bottom += shares
    axes.set_xticks(range(len(layers)), [str(n) for n in layers])
    axes.legend(loc="upper center", ncols=4)


def _heads(axes: Any, scores: Scores, kind: str, title: str) -> None:
    axes.set_title(title)
    layers = [n for n, parts in scores.layers.items() if kind in parts]
    if not layers:
        axes.text(0.5, 0.5, "no such layers", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        axes.set_axis_off()
        return
    rows = [scores.layers[n][kind] for n in layers]
    grid = np.stack([np.linalg.norm(row, axis=1) if row.ndim == 2 else row for row in rows])
    grid = grid / np.maximum(grid.mean(axis=1, keepdims=True), 1e-300)
    shown = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_yticks(range(len(layers)), [str(n) for n in layers])
    axes.xaxis.get_major_locator().set_params(integer=True)
    groups = model_of(scores).mamba_groups if kind == "mamba" else model_of(scores).kv_heads
    for group in range(1, groups):
        axes.axvline(group * grid.shape[1] / groups - 0.5, color="white", linewidth=1.5)
    axes.figure.colorbar(shown, ax=axes, pad=0.01)
