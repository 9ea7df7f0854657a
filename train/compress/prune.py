"""Pruning: from scores and target sizes, choose the parts to keep and cut the parent's weights to them.

    Scores + target sizes --choose--> KeptParts (indices) --cut each tensor--> checkpoint of a smaller recipe, with its lineage

Tensors of the checkpoint are read, cut along their axes and written one at a time; no model is built. The table `_AXES`
says what each axis of a tensor counts.

An RMSNorm divides by the root of the mean square over its channels, and that mean changes when channels are removed. The
weights of each norm are multiplied by sqrt(mean square of the kept channels / mean square of all channels), measured on
the calibration rows. This is exact if the removed channels are zero.

Query heads may be merged (`merge_heads`). In each group, rank the heads 1 to L and keep K; then kept head i becomes

    head_i + (head_i - head_j),  j = 2K - i + 1        for i from max(1, 2K - L + 1) to K

as in Minitron (arXiv 2407.14679, section 2.3; the paper starts at i = 2K - L, whose partner L + 1 does not exist). With
grouped keys the paper merges only query heads. We read this as their projections: keys, values and the columns of the
output projection stay those of the kept heads. Merging two heads with equal queries changes nothing.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds
from train.checkpoint.manifest import Manifest
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights
from train.compress.importance import ATTENTION, attention_quota
from train.compress.scores import Scores, best, best_in_groups, best_mamba, model_of
from train.model.activation import activation_function

BLOCK_INFLUENCE = "block_influence"


@dataclass(frozen=True)
class Target:
    """Sizes to prune to; 0 keeps the parent's."""

    layers: int = 0
    hidden: int = 0
    ffn: int = 0
    heads: int = 0
    mamba_heads: int = 0
    mamba_head_dim: int = 0


@dataclass(frozen=True)
class Depth:
    """How the kept layers are chosen."""

    metric: str = ""
    """`compress.depth_metric`; empty: removal trials if the scores have any, else block influence."""
    attention_layers: int | None = None
    """How many attention layers are kept; None leaves it to the scores."""


AS_SCORED = Depth()


@dataclass(frozen=True)
class KeptParts:
    """Indices of the kept parts, ascending. Dictionaries are keyed by layer number in the parent."""

    layers: list[int]
    hidden: np.ndarray
    ffn: dict[int, np.ndarray] = field(default_factory=dict)
    heads: dict[int, np.ndarray] = field(default_factory=dict)
    mamba_heads: dict[int, np.ndarray] = field(default_factory=dict)
    mamba_channels: dict[int, np.ndarray] = field(default_factory=dict)


def pruned_model(model: ModelConfig, target: Target, layers: list[int]) -> ModelConfig:
    """The smaller shape. RecipeError lists sizes that do not fit."""
    problems = []
    sizes: dict[str, Any] = {}
    for name in ("hidden", "ffn", "heads", "mamba_heads", "mamba_head_dim"):
        wanted, have = getattr(target, name), getattr(model, name)
        if wanted > have:
            problems.append(f"compress.{name}={wanted} is more than the parent's {have}.")
        sizes[name] = wanted or have
    for name, groups in (("heads", model.kv_heads), ("mamba_heads", model.mamba_groups)):
        if sizes[name] % groups:
            group = "key/value heads" if name == "heads" else "Mamba groups"
            near = [sizes[name] // groups * groups, -(-sizes[name] // groups) * groups]
            near = [n for n in near if 0 < n <= getattr(model, name)] or [getattr(model, name)]
            problems.append(
                f"compress.{name}={sizes[name]} is not an equal number for each of the {groups} {group}. Use "
                f"{' or '.join(str(n) for n in dict.fromkeys(near))}."
            )
    kinds = layer_kinds(model.pattern)
    pattern = "".join(kinds[n] for n in layers)
    for name, of, what in (
        ("ffn", "-", "MLP"),
        ("heads", "".join(ATTENTION), "attention"),
        ("mamba_heads", "M", "Mamba"),
        ("mamba_head_dim", "M", "Mamba"),
    ):
        if sizes[name] != getattr(model, name) and not set(of) & set(pattern):
            problems.append(f"compress.{name}={sizes[name]} cuts nothing: {pattern} has no {what} layers. Set it to 0.")
    if problems:
        raise RecipeError("\n".join(problems))
    return replace(model, pattern=pattern, **sizes)


def choose(scores: Scores, target: Target, depth: Depth = AS_SCORED) -> KeptParts:
    """The parts to keep. RecipeError if the scores do not cover the target."""
    model = model_of(scores)
    kinds = layer_kinds(model.pattern)
    layers = _layers(scores, kinds, target.layers, depth)
    small = pruned_model(model, target, layers)
    kept = KeptParts(layers=layers, hidden=best(scores.hidden, small.hidden))
    for number in layers:
        parts = scores.layers[number]
        if kinds[number] == "M":
            heads, channels = best_mamba(
                parts["mamba"], heads=small.mamba_heads, channels=small.mamba_head_dim, groups=model.mamba_groups
            )
            kept.mamba_heads[number], kept.mamba_channels[number] = heads, channels
        elif kinds[number] in ATTENTION:
            kept.heads[number] = best_in_groups(parts["heads"], small.heads, model.kv_heads)
        else:
            kept.ffn[number] = best(parts["ffn"], small.ffn)
    return kept


def _layers(scores: Scores, kinds: list[Any], keep: int, depth: Depth) -> list[int]:
    """Layers to keep: all but the first ones removed in the trials, or those with the largest block influence."""
    have = len(kinds)
    remove = have - keep if keep else 0
    if remove < 0:
        raise RecipeError(f"compress.layers={keep} is more than the parent's {have}.")
    quota = attention_quota(kinds, remove, depth.attention_layers)
    by_influence = depth.metric == BLOCK_INFLUENCE or (not depth.metric and not scores.removals)
    if not remove or by_influence:
        return _by_influence(scores.influence, kinds, remove, quota)
    if len(scores.removals) < remove or depth.metric not in ("", scores.depth_metric):
        tried = f"{len(scores.removals)}{f' by {scores.depth_metric}' * bool(scores.removals)}"
        raise RecipeError(
            f"compress.layers={keep} removes {remove} layers{f' by {depth.metric}' * bool(depth.metric)}, but the scores tried "
            f"{tried}. Score again with this compress.layers, or use compress.depth_metric=block_influence, which `score` "
            f"always measures."
        )
    gone = {removal.layer for removal in scores.removals[:remove]}
    of_attention = sum(kinds[n] in ATTENTION for n in gone)
    if quota is not None and of_attention != quota:
        raise RecipeError(
            f"compress.attention_layers={depth.attention_layers} with compress.layers={keep} removes {quota} attention "
            f"layers, but the first {remove} removals in the scores include {of_attention}. Score again with these two values."
        )
    return [n for n in range(have) if n not in gone]


def _by_influence(influence: np.ndarray, kinds: list[Any], remove: int, quota: int | None) -> list[int]:
    """All layers except the `remove` with the least block influence; `quota` of the removed ones are attention layers."""
    if quota is None:
        return best(influence, len(kinds) - remove).tolist()
    kept: list[int] = []
    for is_attention, leaving in ((True, quota), (False, remove - quota)):
        mine = np.array([n for n, kind in enumerate(kinds) if (kind in ATTENTION) == is_attention], dtype=int)
        kept += mine[best(influence[mine], len(mine) - leaving)].tolist()
    return sorted(kept)


_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding.word_embeddings.weight": (None, "hidden"),
    "output_layer.weight": (None, "hidden"),
    "decoder.final_norm.weight": ("hidden",),
    "norm.weight": ("hidden",),
    "post_norm.weight": ("hidden",),
    "mixer.in_proj.weight.z": ("inner", "hidden"),
    "mixer.in_proj.weight.x": ("inner", "hidden"),
    "mixer.in_proj.weight.B": (None, "hidden"),
    "mixer.in_proj.weight.C": (None, "hidden"),
    "mixer.in_proj.weight.dt": ("mamba_heads", "hidden"),
    "mixer.conv1d.weight.x": ("inner", None, None),
    "mixer.conv1d.weight.B": (None, None, None),
    "mixer.conv1d.weight.C": (None, None, None),
    "mixer.conv1d.bias.x": ("inner",),
    "mixer.conv1d.bias.B": (None,),
    "mixer.conv1d.bias.C": (None,),
    "mixer.dt_bias": ("mamba_heads",),
    "mixer.A_log": ("mamba_heads",),
    "mixer.D": ("mamba_heads",),
    "mixer.norm.weight": ("inner",),
    "mixer.out_proj.weight": ("hidden", "inner"),
    "input_layernorm.weight": ("hidden",),
    "self_attention.linear_qkv.weight": ("query_key_value", "hidden"),
    "self_attention.linear_proj.weight": ("hidden", "query"),
    "pre_mlp_layernorm.weight": ("hidden",),
    "mlp.linear_fc1.weight": ("ffn_branches", "hidden"),
    "mlp.linear_fc2.weight": ("hidden", "ffn"),
}
"""What each axis of a tensor counts; None: never cut. Names of layer tensors follow `decoder.layers.N.`. B and C are shared by
a group of heads: groups and state size are never cut. A checkpoint stores fused tensors as named parts (`.z`, `.x`, ...)."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class _Plan:
    """One tensor of the smaller model."""

    source: str
    shape: tuple[int, ...]
    indices: tuple[np.ndarray | None, ...]
    factor: torch.Tensor | None
    """Multiplied with weight + offset, one factor for each kept channel; None: 1."""
    offset: int
    merges: list[tuple[int, int]]
    """(kept, dropped) query heads to merge (`head_merges`)."""


def cut_weights(
    parent: Path, folder: Path, *, scores: Scores, kept: KeptParts, small: ModelConfig, merge_heads: bool = False
) -> None:
    """Write the weights of the smaller model into an empty `folder`. CheckpointError for a tensor that `_AXES` does not know."""
    model = model_of(scores)
    stored = StoredTensors(parent)
    plans: dict[str, _Plan] = {}
    number_of = {number: index for index, number in enumerate(kept.layers)}
    for name, tensor in stored.weights.items():
        match = _LAYER.fullmatch(name)
        number, suffix = (int(match.group(1)), match.group(2)) if match else (None, name)
        if number is not None and number not in number_of:
            continue
        axes = _AXES.get(suffix)
        if axes is None or len(axes) != len(tensor.shape):
            raise CheckpointError(f"{parent}: no rule to cut {name} {tensor.shape} (_AXES in train/compress/prune.py)")
        target = f"decoder.layers.{number_of[number]}.{suffix}" if number is not None else name
        indices = tuple(
            _indices(axis, number, size, model, kept) for axis, size in zip(axes, tensor.shape, strict=True)
        )
        shape = tuple(size if i is None else len(i) for i, size in zip(indices, tensor.shape, strict=True))
        factor = _factor(name, suffix, number, scores=scores, kept=kept, model=model, small=small)
        offset = model.norm_offset if suffix != "mixer.norm.weight" else 0
        merges = []
        if merge_heads and suffix == "self_attention.linear_qkv.weight":
            assert number is not None
            merges = head_merges(scores.layers[number]["heads"], small.heads, groups=model.kv_heads)
        plans[target] = _Plan(name, shape, indices, factor, offset if suffix.endswith("norm.weight") else 0, merges)

    def read(name: str) -> torch.Tensor:
        plan = plans[name]
        whole = stored.read(plan.source)
        if plan.merges:
            whole = merge_query_heads(whole, plan.merges, model=model)
        part = whole
        for axis, indices in enumerate(plan.indices):
            if indices is not None and len(indices) < whole.shape[axis]:
                part = part.index_select(axis, torch.from_numpy(indices))
        if plan.factor is not None:
            part = ((part.double() + plan.offset) * plan.factor - plan.offset).to(whole.dtype)
        return part.contiguous()

    sizes = {name: StoredTensor(plan.shape, stored.weights[plan.source].dtype) for name, plan in plans.items()}
    write_weights(folder, sizes, read)


def _indices(axis: str | None, number: int | None, size: int, model: ModelConfig, kept: KeptParts) -> np.ndarray | None:
    """Indices to keep along an axis of a tensor; None: all."""
    if axis is None:
        return None
    if axis == "hidden":
        return kept.hidden
    assert number is not None, f"only layers have an axis of {axis}"
    match axis:
        case "ffn":
            return kept.ffn[number]
        case "ffn_branches":  # a gated MLP stacks the rows of both branches
            branches = 2 if activation_function(model.activation)[1] else 1
            return _blocks(kept.ffn[number], count=branches, every=size // branches)
        case "mamba_heads":
            return kept.mamba_heads[number]
        case "inner":
            heads, channels = kept.mamba_heads[number], kept.mamba_channels[number]
            return (heads[:, None] * model.mamba_head_dim + channels[None, :]).reshape(-1)
        case "query":
            return _head_rows(kept.heads[number], model.head_dim)
        case "query_key_value":  # Megatron's order: for each key/value head its query heads, then key, then value
            per_group = model.heads // model.kv_heads
            rows = []
            for group in range(model.kv_heads):
                first = group * (per_group + 2)
                mine = kept.heads[number][kept.heads[number] // per_group == group] - group * per_group
                rows += [*(first + mine), first + per_group, first + per_group + 1]
            return _head_rows(np.asarray(rows), model.head_dim)
    raise AssertionError(f"no axis {axis}")


def head_merges(scores: np.ndarray, keep: int, *, groups: int) -> list[tuple[int, int]]:
    """(kept head, dropped head it is merged with) in each of `groups` groups of query heads; see the module docstring."""
    size, count = len(scores) // groups, keep // groups
    pairs = []
    for group in range(groups):
        ranked = group * size + np.argsort(-scores[group * size : (group + 1) * size], kind="stable")
        pairs += [(int(ranked[i]), int(ranked[2 * count - 1 - i])) for i in range(max(0, 2 * count - size), count)]
    return pairs


def merge_query_heads(qkv: torch.Tensor, merges: list[tuple[int, int]], *, model: ModelConfig) -> torch.Tensor:
    """A query-key-value weight (rows in Megatron's order) with kept query heads replaced by 2 kept - dropped."""
    per_group = model.heads // model.kv_heads
    grouped = qkv.view(model.kv_heads, per_group + 2, model.head_dim, -1)
    merged = grouped.clone()
    for kept, dropped in merges:
        mine, other = (grouped[head // per_group, head % per_group] for head in (kept, dropped))
        merged[kept // per_group, kept % per_group] = (2 * mine.double() - other.double()).to(qkv.dtype)
    return merged.view_as(qkv)


def _head_rows(heads: np.ndarray, width: int) -> np.ndarray:
    """Row indices of whole heads of `width` rows."""
    return (heads[:, None] * width + np.arange(width)).reshape(-1)


def _blocks(indices: np.ndarray, *, count: int, every: int) -> np.ndarray:
    """The same indices in each of `count` blocks of size `every`."""
    return np.concatenate([block * every + indices for block in range(count)])


def _factor(
    name: str,
    suffix: str,
    number: int | None,
    *,
    scores: Scores,
    kept: KeptParts,
    model: ModelConfig,
    small: ModelConfig,
) -> torch.Tensor | None:
    """Factors for the kept channels of a tensor; None: no change."""
    scaled = math.sqrt(model.hidden / small.hidden) if model.scale_embedding else 1.0
    if suffix == "mixer.norm.weight":
        inner = _indices("inner", number, 0, model, kept)
        assert inner is not None
        if len(inner) == model.mamba_heads * model.mamba_head_dim:
            return None
        energy = scores.energy[f"{name.removesuffix('.weight')}"]
        by_group = energy.reshape(model.mamba_groups, -1).mean(1)
        of_kept = energy[inner].reshape(model.mamba_groups, -1).mean(1)
        factors = np.sqrt(_ratio(of_kept, by_group))
        return torch.from_numpy(np.repeat(factors, len(inner) // model.mamba_groups))
    if small.hidden == model.hidden:
        return None
    if name == "embedding.word_embeddings.weight" and scaled != 1.0:
        # The smaller model multiplies embeddings by the root of its own width: keep the product of the parent.
        return torch.full((small.hidden,), scaled, dtype=torch.float64)
    if suffix.endswith("norm.weight"):
        energy = scores.energy[name.removesuffix(".weight")]
        factor = float(np.sqrt(_ratio(energy[kept.hidden].mean(), energy.mean())))
        if name == "decoder.final_norm.weight" and model.tie_embeddings:
            factor /= scaled  # the head is the embedding, which was multiplied by `scaled` above
        return torch.full((small.hidden,), factor, dtype=torch.float64)
    return None


def _ratio(a: Any, b: Any) -> Any:
    """a / b, or 1 where b is 0."""
    return np.where(np.asarray(b) > 0, np.asarray(a) / np.where(np.asarray(b) > 0, b, 1), 1.0)


def lineage(
    scores: Scores, kept: KeptParts, *, parent: Path, manifest: Manifest, merged_heads: bool = False
) -> dict[str, Any]:
    """The lineage in the manifest of a pruned checkpoint."""
    return {
        "made_by": "prune",
        "parent": str(parent),
        "parent_fingerprint": manifest.fingerprint,
        "parent_step": manifest.step,
        "parent_tokens": manifest.tokens,
        "parent_model": scores.model,
        "calibration_rows": scores.rows,
        "kept": {"layers": kept.layers, "hidden": kept.hidden.tolist()},
        "merged_heads": merged_heads,
        "before": manifest.lineage,
    }
