"""Splits the weights of linear layers into the matrices of Hugging Face's files, and joins them again.

The files separate what our layers fuse: queries, keys and values; the two branches of a gated MLP. Each matrix is quantised
separately, so that our model computes with the same numbers as a model that reads the files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from recipes.schema.model import ModelConfig
from recipes.schema.pattern import GATED, layer_kinds
from recipes.schema.scaling import LINEARS
from train.hf.mapping import Family, Pair, pairs, to_ours, to_theirs


@dataclass(frozen=True)
class Linear:
    """One linear layer: its place in our model and its matrices in the files."""

    layer: int
    name: str
    """Module in the layer, e.g. `mixer.in_proj`."""
    pair: Pair

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its matrices in the files, without `.weight`."""
        return tuple(name.removesuffix(".weight") for name in self.pair.theirs)

    def split(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Split our weight [outputs, inputs] into the matrices of the files."""
        return to_theirs(self.pair, [weight])

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Reverse `split`."""
        return torch.cat(to_ours(self.pair, parts))


def linears(model: ModelConfig, family: Family) -> list[Linear]:
    """Every linear layer of a model in order, with its names in the files of its family."""
    prefixes = {
        f"decoder.layers.{layer}.{name}.weight": (layer, name)
        for layer, kind in enumerate(layer_kinds(model.pattern))
        for name in LINEARS[kind]
    }
    found = []
    for pair in pairs(model, family):
        first = next(iter(pair.ours))
        place = next((prefixes[text] for text in (first, first.rpartition(".")[0]) if text in prefixes), None)
        if place is not None:
            found.append(Linear(*place, pair=pair))
    return found


def linears_of_any(model: ModelConfig) -> list[Linear]:
    """The same for a model of no family: each kind of layer is split as in the family that has it."""
    gated = model.activation in GATED
    family_of_kind: dict[str, Family] = {"M": "nemotron_h", "-": "gemma2" if gated else "nemotron_h"}
    of_kind = {
        kind: linears(replace(model, pattern=kind), family_of_kind.get(kind, "gemma2"))
        for kind in set(layer_kinds(model.pattern))
    }
    return [
        replace(linear, layer=layer)
        for layer, kind in enumerate(layer_kinds(model.pattern))
        for linear in of_kind[kind]
    ]
