"""Merging: the weighted sum of the weights of several checkpoints of one model, as a new run.

    checkpoints + weights --check_sources--> merge_weights: fp32, some rows at a time --> run folder

Checkpoints may be of any layout. Where a checkpoint has fp32 masters they are read instead of the rounded weights. Memory does
not depend on the size of the model: two blocks of `BLOCK_ELEMENTS`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.system import disk
from data.system.new_folder import new_folder
from recipes.schema.changes import function_changes
from recipes.schema.checkpoint_steps import checkpoint_at, name_of
from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.manifest import Manifest, RunState, describe_not_finite, read_manifest
from recipes.schema.read import recipe_from_mapping, recipe_mapping, recipe_yaml
from recipes.schema.run_folder import CHECKPOINTS, RECIPE
from train.checkpoint import publishing, storage
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights_in_blocks
from train.hf.config import CONFIG
from train.quantize.directory import is_quantized

BLOCK_ELEMENTS = 1 << 22
"""Elements of a block: 16 MiB in fp32."""
_SUM_TOLERANCE = 1e-6

Advance = Callable[[int], None]
"""Progress callback: called with the bytes of each finished block."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that is merged."""

    path: Path
    manifest: Manifest


def source_at(place: Path) -> Source:
    """The checkpoint of a run, of an import, or the folder itself. CheckpointError if there is none that can be merged."""
    if is_quantized(place):
        raise CheckpointError(f"{place} has quantised weights. Merge the models first, then quantise the result.")
    if (place / CONFIG).is_file():
        raise CheckpointError(
            f"{place} is a Hugging Face directory. Import it first: stratum hf import {place} --out NEW."
        )
    return Source(*checkpoint_at(place / "checkpoint" if (place / "checkpoint").is_dir() else place))


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse checkpoints whose weights must not be added: another model, another tokenizer, other pruned parts, NaN.

    Raises RecipeError or CheckpointError with the first reason.
    """
    first = sources[0]
    stored = StoredTensors(first.path)
    for source in sources:
        path, manifest = source.path, source.manifest
        if not manifest.recipe:
            raise CheckpointError(f"{path} has no recipe, so its model is not known.")
        if manifest.not_finite:
            raise CheckpointError(f"{path} cannot be merged: {describe_not_finite(manifest.not_finite)}.")
        tensors = StoredTensors(path)
        _refuse_formats(path, tensors)
        changes = [c for c in function_changes(first.manifest.recipe, manifest.recipe) if c.kind != "safe"]
        if changes:
            lines = "".join(f"\n  {c.key}: {c.old} and {c.new}" for c in changes)
            raise RecipeError(f"{first.path} and {path} are different models:{lines}\nMerge checkpoints of one model.")
        shapes = {name: tensor.shape for name, tensor in stored.weights.items()}
        others = {name: tensor.shape for name, tensor in tensors.weights.items()}
        if differing := sorted(name for name in shapes | others if shapes.get(name) != others.get(name)):
            name = differing[0]
            raise RecipeError(
                f"{first.path} and {path} have different weights, e.g. {name}: {shapes.get(name, 'missing')} and "
                f"{others.get(name, 'missing')}. Merge checkpoints of one model."
            )
        if first.manifest.tokenizer and manifest.tokenizer and first.manifest.tokenizer != manifest.tokenizer:
            raise RecipeError(
                f"{first.path} and {path} were trained with different tokenizers ({first.manifest.tokenizer[:12]} and "
                f"{manifest.tokenizer[:12]}): the same ids stand for other text. Merge checkpoints of one tokenizer."
            )
        if _pruned(first.manifest.lineage) != _pruned(manifest.lineage):
            raise RecipeError(
                f"{first.path} and {path} were pruned to the same shape, but to other channels or layers. Merge checkpoints "
                f"that come from one pruned model."
            )


def _refuse_formats(path: Path, tensors: StoredTensors) -> None:
    for name, tensor in tensors.weights.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{path}: {name} is stored as {tensor.dtype}. Quantised weights cannot be merged.")


def _pruned(lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """What each pruning in a lineage kept, newest first."""
    found = []
    inner: Any = lineage
    while isinstance(inner, dict):
        if inner.get("kept"):
            found.append(inner["kept"])
        inner = inner.get("before")
    return found


def merge_weights(
    sources: Sequence[StoredTensors],
    weights: Sequence[float],
    folder: Path,
    *,
    formats: dict[str, StoredTensor],
    advance: Advance,
) -> None:
    """Write sum_i weights[i] * sources[i] into an empty folder.

    The sum is fp32, in the order of the sources, then rounded to `formats`; a source with weight 0 is not read. Raises
    CheckpointError, also for a source that is not what was saved.
    """
    assert abs(sum(weights) - 1) < _SUM_TOLERANCE, weights
    used = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]

    longest = max(torch.Size(part).numel() for tensor in formats.values() for _, part in blocks_of(tensor))
    buffers = torch.empty(min(2, len(used)), longest)  # allocated once: the sum, and what is added to it

    def blocks(name: str) -> Iterator[torch.Tensor]:
        for source, _ in used:
            source.verify(name)
        for first, part in blocks_of(formats[name]):
            total, *others = (buffer[: torch.Size(part).numel()].view(part) for buffer in buffers)
            for number, (source, weight) in enumerate(used):
                target = others[0] if number else total
                source.read_rows(name, first, target)
                if number:
                    total.add_(target, alpha=weight)
                elif weight != 1:
                    total.mul_(weight)
            advance(total.numel() * formats[name].dtype.itemsize)
            yield total.to(formats[name].dtype)

    write_weights_in_blocks(folder, formats, blocks)


def blocks_of(tensor: StoredTensor) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(first row, shape) of the blocks of a tensor; a row longer than a block stays whole."""
    if not tensor.shape:
        yield 0, ()
        return
    inner = torch.Size(tensor.shape[1:]).numel()
    rows = max(1, BLOCK_ELEMENTS // max(1, inner))
    for first in range(0, tensor.shape[0], rows):
        yield first, (min(rows, tensor.shape[0] - first), *tensor.shape[1:])


def write_run(
    out: Path, sources: Sequence[Source], weights: Sequence[float], *, rule: dict[str, Any], keep_step: bool,
    advance: Advance, files: dict[str, str] | None = None, averaged: bool = False,
) -> Manifest:  # fmt: skip
    """Merge checkpoints into a new run folder `out`, complete or not at all. -> its manifest.

    rule: how the weights were chosen, for the lineage. keep_step: continue the data and the schedule of the last source;
    otherwise training starts at step 0. averaged: read the sources' moving averages of weights. files: texts to
    write next to it, by name. Raises RecipeError, CheckpointError, NumericsError.
    """
    last = sources[-1]
    base = last if keep_step else sources[0]
    recipe = recipe_from_mapping(base.manifest.recipe)
    # A model with adapters must name what it adapts (recipes.schema.lora_rules); the weights here are whole, so nothing reads it.
    begins = recipe.run.start_from if recipe.model.lora.rank else None
    run = replace(recipe.run, folder=str(out.parent), name=out.name, start_from=begins)
    mapping = recipe_mapping(replace(recipe, run=run))
    state = RunState(
        recipe=mapping,
        tokenizer=next((s.manifest.tokenizer for s in sources if s.manifest.tokenizer), ""),
        lineage=_lineage(base, sources, weights, rule),
    )
    if keep_step:
        state = replace(
            state, step=last.manifest.step, position=last.manifest.position, tokens=last.manifest.tokens,
            data_hash=last.manifest.data_hash,
        )  # fmt: skip
    formats = StoredTensors(base.path).weights

    def fill(writing: Path) -> None:
        merge_weights(
            [StoredTensors(source.path, averaged=averaged) for source in sources],
            weights,
            writing,
            formats=formats,
            advance=advance,
        )

    return write_folder(out, state, fill, needed=sum(tensor.nbytes for tensor in formats.values()), files=files)


def write_folder(
    out: Path, state: RunState, fill: Callable[[Path], None], *, needed: int, files: dict[str, str] | None = None
) -> Manifest:
    """A run folder with one checkpoint of weights, complete or not at all. -> its manifest.

    fill: writes the weights into an empty folder. needed: bytes of disk. files: as in `write_run`.
    """
    with new_folder(out, needed=needed) as (folder, publish):
        checkpoints = folder / CHECKPOINTS
        writing = checkpoints / ".writing"
        writing.mkdir(parents=True)
        fill(writing)
        final = checkpoints / name_of(state.step)
        storage.publish(writing, final, state)
        publishing.point_at(checkpoints, final.name)
        disk.write_text(folder / RECIPE, recipe_yaml(state.recipe))
        for name, text in (files or {}).items():
            disk.write_text(folder / name, text)
        publish()
    return read_manifest(out / CHECKPOINTS / final.name)


def _lineage(base: Source, sources: Sequence[Source], weights: Sequence[float], rule: dict[str, Any]) -> dict[str, Any]:
    """The lineage of a merged checkpoint. `parent` and `before` are those of the source whose recipe it has."""
    return {
        "made_by": "merge",
        "parent": str(base.path),
        "parent_fingerprint": base.manifest.fingerprint,
        "rule": rule,
        "sources": [
            {
                "checkpoint": str(source.path),
                "fingerprint": source.manifest.fingerprint,
                "step": source.manifest.step,
                "tokens": source.manifest.tokens,
                "weight": weight,
            }
            for source, weight in zip(sources, weights, strict=True)
        ],
        "before": base.manifest.lineage,
    }
