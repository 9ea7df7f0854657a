"""Weights from our checkpoints to Hugging Face's files and back, one pair of tensors at a time.

    export_weights(checkpoint, folder)     StoredTensors --to_theirs--> WeightWriter
    import_weights(folder, checkpoint)     WeightFiles   --to_ours-->   write_weights

Peak memory is that of the largest pair (the embedding, or a fused projection with its parts), whatever the size of the
model. Names and shapes of both sides are compared before anything is written; what is missing, extra or of another shape
is an error that names it. Neither direction does arithmetic, so a round trip gives the same bits.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import printable
from recipes.schema.model import ModelConfig
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights
from train.hf.config import family_of
from train.hf.files import Entry, WeightFiles, WeightWriter
from train.hf.mapping import Family, Pair, Shape, pairs, to_ours, to_theirs
from train.hf.quantize_export import Quantizer

Format = Literal["keep", "fp32", "bf16"]
"""How weights are stored: as they are, or converted. A_log, D and dt_bias stay fp32 in bf16, as a bf16 run has them."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LISTED = 8
_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Converted:
    """What was written."""

    tensors: int
    parameters: int
    nbytes: int


def export_weights(
    stored: StoredTensors,
    folder: Path,
    *,
    model: ModelConfig,
    format: Format = "keep",
    vocab: int | None = None,
    file_bytes: int = 5_000_000_000,
    quantizer: Quantizer | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Converted:
    """Write `*.safetensors` (and their index) into `folder` from a checkpoint of any layout.

    quantizer: quantises the linear layers, from the checkpoint's own numbers whatever the format of the others. vocab: rows of
    the embedding to write, if ours was padded. advance: called with the bytes of each tensor written.
    Raises CheckpointError naming weights that are missing, extra or mis-shaped.
    """
    found = pairs(model, family_of(model), vocab=vocab)
    expected = {name: shape for pair in found for name, shape in pair.ours.items()}
    compare_names(expected, {name: entry.shape for name, entry in stored.weights.items()}, where=str(stored.folder))
    quantized = quantizer.linears if quantizer is not None else {}
    plan: list[Entry] = []
    for pair in found:
        dtype = _stored_as(format, stored.weights[next(iter(pair.ours))].dtype, pair)
        for name, shape in pair.theirs.items():
            plan += quantizer.entries(name, shape) if quantizer and name in quantized else [Entry(name, shape, dtype)]
    with WeightWriter(folder, plan, file_bytes=file_bytes) as writer:
        for pair in found:
            tensors = [_finite(stored.read(name), name, where=stored.folder) for name in pair.ours]
            for name, tensor in zip(pair.theirs, to_theirs(pair, tensors), strict=True):
                for part, values in (
                    quantizer.tensors(name, tensor) if quantizer and name in quantized else [(name, tensor)]
                ):
                    writer.add(part, values)
                advance(tensor.nbytes)
    return replace(_sum(plan), parameters=sum(math.prod(shape) for pair in found for shape in pair.theirs.values()))


def import_weights(
    files: WeightFiles,
    folder: Path,
    *,
    model: ModelConfig,
    format: Format = "keep",
    vocab: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Converted:
    """Write a checkpoint of weights into the empty `folder` from a directory's `*.safetensors`.

    vocab: rows of their embedding, if `model.vocab` is larger. The caller writes the manifest.
    Raises CheckpointError naming weights that are missing, extra or mis-shaped.
    """
    family = family_of(model)
    found = pairs(model, family, vocab=vocab)
    names = their_names(files, family)
    check_theirs(found, files, names)
    _check_tied_head(files, names)
    pair_of = {name: pair for pair in found for name in pair.ours}
    weights = {
        name: StoredTensor(shape, _stored_as(format, _their_dtype(files, names, pair), pair))
        for pair in found
        for name, shape in pair.ours.items()
    }
    pending: dict[str, torch.Tensor] = {}  # tensors of the current pair that are not written yet

    def read(name: str) -> torch.Tensor:
        if name not in pending:
            pair = pair_of[name]
            dtype, where = weights[name].dtype, files.folder
            tensors = [_finite(files.read(names[n]), names[n], where=where).to(dtype) for n in pair.theirs]
            pending.update(zip(pair.ours, to_ours(pair, tensors), strict=True))
        tensor = pending.pop(name)
        advance(tensor.nbytes)
        return tensor

    write_weights(folder, weights, read)
    return _sum([Entry(name, stored.shape, stored.dtype) for name, stored in weights.items()])


def their_names(files: WeightFiles, family: Family) -> dict[str, str]:
    """Names in the table -> names in the files.

    transformers uses `model.` for Nemotron-H's layers in memory and `backbone.` in files; both are accepted. Buffers saved by
    old versions and a copy of a tied head are left out.
    """
    names = {}
    for name in files.entries:
        if name.endswith("rotary_emb.inv_freq") or (family == "gemma2" and name == _TIED_HEAD):
            continue
        spelled = name
        if family == "nemotron_h" and name.startswith("model."):
            spelled = "backbone." + name.removeprefix("model.")
        names[spelled] = name
    return names


def check_theirs(found: Iterable[Pair], files: WeightFiles, names: Mapping[str, str]) -> None:
    """CheckpointError if a directory does not have exactly the tensors of a model."""
    expected = {name: shape for pair in found for name, shape in pair.theirs.items()}
    compare_names(
        expected, {spelled: files.entries[name].shape for spelled, name in names.items()}, where=str(files.folder)
    )


def _check_tied_head(files: WeightFiles, names: Mapping[str, str]) -> None:
    """Files of a tied model may repeat the head. CheckpointError if it differs from the embedding: it would be lost."""
    head, embedding = _TIED_HEAD, names.get("model.embed_tokens.weight")
    if embedding is None or head not in files.entries or torch.equal(files.read(head), files.read(embedding)):
        return
    raise CheckpointError(
        f"{files.folder}: {head} is not {embedding}, but tie_word_embeddings is true: the model would lose its head. Remove "
        f"{head} from the files if the embedding is the head, or untie the model in transformers."
    )


def compare_names(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str) -> None:
    """CheckpointError listing what is missing, what is extra, and what has another shape."""
    problems = []
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        problems.append(f"missing: {_some(missing)}")
    if extra:
        problems.append(f"not part of this model: {_some(extra)}")
    wrong = [name for name in expected if name in found and tuple(found[name]) != expected[name]]
    if wrong:
        shapes = [f"{name} is {list(found[name])}, not {list(expected[name])}" for name in wrong]
        problems.append(f"of another shape: {_some(shapes)}")
    if problems:
        raise CheckpointError(
            f"{where} does not have the weights that its configuration describes:\n  " + "\n  ".join(problems)
        )


def different_weights(stored: StoredTensors, files: WeightFiles, *, model: ModelConfig, vocab: int | None) -> list[str]:
    """Their names of the tensors whose values differ from our checkpoint's. One pair is in memory at a time.

    If the two formats differ, the finer one is rounded to the coarser.
    """
    family = family_of(model)
    found = pairs(model, family, vocab=vocab)
    names = their_names(files, family)
    check_theirs(found, files, names)
    different = []
    for pair in found:
        ours = to_theirs(pair, [stored.read(name) for name in pair.ours])
        for name, tensor in zip(pair.theirs, ours, strict=True):
            theirs = files.read(names[name])
            coarse = min(tensor.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).bits)
            if not torch.equal(tensor.to(coarse), theirs.to(coarse)):
                different.append(name)
    return different


def lossless_format(files: WeightFiles, model: ModelConfig, *, vocab: int) -> Format:
    """The checkpoint format that keeps every bit of a directory: bf16 if no weight that bf16 would round is finer."""
    family = family_of(model)
    found, names = pairs(model, family, vocab=vocab), their_names(files, family)
    check_theirs(found, files, names)
    is_coarse = all(
        files.entries[names[name]].dtype == torch.bfloat16 for p in found if not p.full for name in p.theirs
    )
    return "bf16" if is_coarse else "fp32"


def _finite(tensor: torch.Tensor, name: str, *, where: Path) -> torch.Tensor:
    """The tensor. CheckpointError if it has NaN or infinity: a comparison on text cannot see every row of the embedding."""
    if tensor.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
        bad = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{where}: {name} has {bad:,} of {tensor.numel():,} values that are NaN or infinite. Use an earlier "
            f"checkpoint, or copy the files again."
        )
    return tensor


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(printable(name, most=200) for name in names[:_LISTED]) + more


def _their_dtype(files: WeightFiles, names: Mapping[str, str], pair: Pair) -> torch.dtype:
    dtype = files.entries[names[next(iter(pair.theirs))]].dtype
    return torch.float32 if dtype == torch.float16 or pair.full else dtype


def _stored_as(format: Format, dtype: torch.dtype, pair: Pair) -> torch.dtype:
    if format == "keep":
        return dtype
    return torch.float32 if pair.full else _DTYPES[format]


def _sum(plan: list[Entry]) -> Converted:
    return Converted(
        tensors=len(plan),
        parameters=sum(torch.Size(entry.shape).numel() for entry in plan),
        nbytes=sum(entry.nbytes for entry in plan),
    )
