"""A model without adapters that computes the same: each adapter's product is added to the weight of its linear.

    W + (alpha / rank) up down        fp32, some rows at a time, then rounded to the format of W

Needs no model and no process group; the checkpoint may be of any layout.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from recipes.schema.errors import RecipeError
from recipes.schema.lora import SUFFIX, LoraConfig
from recipes.schema.manifest import Manifest, RunState
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from train.checkpoint.tensors import StoredTensors, write_weights_in_blocks
from train.merge.weighted_sum import Advance, Source, blocks_of, write_folder


def fold_adapters(out: Path, source: Source, *, averaged: bool, advance: Advance) -> Manifest:
    """Write the run `out`, which trains all weights from step 0. -> its manifest. averaged: use the moving averages of the
    adapters. RecipeError for a model without adapters, CheckpointError for a source that is not what was saved."""
    recipe = recipe_from_mapping(source.manifest.recipe)
    lora = recipe.model.lora
    if not lora.rank:
        raise RecipeError(f"{source.path} has no adapters (model.lora.rank=0): there is nothing to add to its weights.")
    plain = replace(
        recipe,
        model=replace(recipe.model, lora=LoraConfig()),
        run=replace(recipe.run, folder=str(out.parent), name=out.name, start_from=None),
    )
    state = RunState(
        recipe=recipe_mapping(plain),
        tokenizer=source.manifest.tokenizer,
        lineage={
            "made_by": "merge",
            "parent": str(source.path),
            "parent_fingerprint": source.manifest.fingerprint,
            "rule": {"adapters": {"rank": lora.rank, "alpha": lora.alpha, "averaged": averaged}},
            "before": source.manifest.lineage,
        },
    )
    stored = StoredTensors(source.path, averaged=averaged)
    formats = {name: tensor for name, tensor in stored.weights.items() if not is_of_adapter(name)}

    def blocks(name: str) -> Iterator[torch.Tensor]:
        stored.verify(name)
        down = None
        if (places := adapter_of(name, stored)) is not None:
            down, up = (_whole(stored, place) for place in places)
        for first, shape in blocks_of(formats[name]):
            weight = torch.empty(shape)
            stored.read_rows(name, first, weight)
            if down is not None:
                weight.addmm_(up[first : first + shape[0]], down, alpha=lora.alpha / lora.rank)
            advance(weight.numel() * formats[name].dtype.itemsize)
            yield weight.to(formats[name].dtype)

    def fill(writing: Path) -> None:
        write_weights_in_blocks(writing, formats, blocks)

    return write_folder(out, state, fill, needed=sum(tensor.nbytes for tensor in formats.values()))


def is_of_adapter(name: str) -> bool:
    """Whether a tensor of a checkpoint is a weight of an adapter."""
    return f"{SUFFIX}." in name


def adapter_of(name: str, stored: StoredTensors) -> tuple[str, str] | None:
    """(`down`, `up`) of the adapter of a linear's weight, or of a component of it; None if it has none."""
    linear, _, component = name.partition(".weight")
    down, up = f"{linear}{SUFFIX}.down", f"{linear}{SUFFIX}.up{component}"
    return (down, up) if up in stored.weights else None


def _whole(stored: StoredTensors, name: str) -> torch.Tensor:
    """A weight in fp32, from its master if there is one."""
    stored.verify(name)
    found = torch.empty(stored.weights[name].shape)
    stored.read_rows(name, 0, found)
    return found
