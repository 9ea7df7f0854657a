"""Fields of the `model.lora` group: low-rank adapters (LoRA, arXiv 2106.09685), and the linear layers that get one.

    y = W x + (alpha / rank) up (down x)          W frozen;  down [rank, inputs], up [outputs, rank] are trained

Names in checkpoints: the linear's own with `_adapter`, `decoder.layers.3.mixer.in_proj_adapter.down`.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from recipes.schema.errors import Problem
from recipes.schema.fields import AdapterRank, PositiveFloat

SUFFIX = "_adapter"
_LINEARS = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "w": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "E": (),
}
"""Linears that may have an adapter, by kind of layer. Routed experts share one tensor, so theirs have no adapters yet."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; all other weights are frozen (docs/lora.md)."""

    rank: AdapterRank = 0
    """Rank of each adapter; 0: no adapters, all weights are trained. LoRA's experiments use 1 to 64, often 8."""
    alpha: PositiveFloat = 16.0
    """An adapter's output is multiplied by alpha / rank, so that the learning rate need not change with the rank."""
    targets: tuple[str, ...] = ("*",)
    """Which linear layers have an adapter: patterns of their names in the whole model, such as `*.self_attention.*`,
    `*.mixer.in_proj` or `decoder.layers.3.*`; `*` stands for any characters. A pattern that matches nothing is an error."""


def adapted_linears(lora: LoraConfig, kinds: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """The linears with an adapter, by their names inside the layer, of each layer that has one. kinds: of all layers."""
    found = {}
    for index, kind in enumerate(kinds) if lora.rank else ():
        names = tuple(
            name
            for name in _LINEARS[kind]
            if any(fnmatchcase(f"decoder.layers.{index}.{name}", target) for target in lora.targets)
        )
        if names:
            found[index] = names
    return found


def adapter_prefixes(lora: LoraConfig, kinds: Sequence[str]) -> tuple[str, ...]:
    """The beginnings of the names of all weights of adapters, in the whole model."""
    linears = adapted_linears(lora, kinds)
    return tuple(f"decoder.layers.{index}.{name}{SUFFIX}." for index, names in linears.items() for name in names)


def lora_problems(lora: LoraConfig, kinds: Sequence[str]) -> list[Problem]:
    """Fields that would do nothing. kinds: of all layers."""
    default = LoraConfig()
    if not lora.rank:
        changed = [name for name in ("alpha", "targets") if getattr(lora, name) != getattr(default, name)]
        return [
            Problem(
                f"model.lora.{name}",
                f"model.lora.{name}={getattr(lora, name)} does nothing, because model.lora.rank=0.",
                "Set model.lora.rank, such as 8, or leave it out.",
            )
            for name in changed
        ]
    whole = [f"decoder.layers.{index}.{name}" for index, kind in enumerate(kinds) for name in _LINEARS[kind]]
    idle = [target for target in lora.targets if not any(fnmatchcase(name, target) for name in whole)]
    if not idle and lora.targets:
        return []
    text = f"model.lora.targets={list(lora.targets)}: {', '.join(map(repr, idle)) or 'an empty list'} matches no linear layer"
    text += " that can have an adapter."
    remedy = f"Names look like {whole[0]} and {whole[-1]}." if whole else "Use a pattern with M, *, w or - layers."
    return [Problem("model.lora.targets", text, remedy)]
