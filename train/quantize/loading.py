"""Loads a directory of quantised weights into a model on one rank. Quantised layers store codes and scales.

The model is built with uninitialised weights. Those of quantised layers are freed before they are written, so they never use
physical memory.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from recipes.schema.errors import CheckpointError
from recipes.schema.model import ModelConfig
from train.checkpoint.pieces import MODEL, local_tensors_of, weight_pieces
from train.hf.config import family_of
from train.hf.mapping import Pair, pairs, to_ours
from train.model.quantized_linear import store_quantized
from train.quantize.directory import QuantizedFiles
from train.quantize.parts import linears

_LISTED = 5


def load_quantized(chunk: Any, files: QuantizedFiles, *, model: ModelConfig, groups: Any) -> None:
    """Fill a whole model with a directory's weights. groups: Megatron's process groups of one rank.

    Raises CheckpointError that names missing weights, extra weights and weights of another shape.
    """
    family = family_of(model)
    found = pairs(model, family, vocab=_vocabulary(files))
    names = {name: _spelled(name, files) for pair in found for name in pair.theirs}
    _check_shapes(found, files, names)
    layers = {next(iter(linear.pair.ours)): linear for linear in linears(model, family)}
    quantized = {
        ours: linear
        for ours, linear in layers.items()
        if all(names[name] in files.quantized for name in linear.pair.theirs)
    }
    places = defaultdict(list)
    for piece in weight_pieces(local_tensors_of([chunk], groups.dp_cp)):
        places[piece.tensor.removeprefix(MODEL)].append(piece)
    for pair in found:
        if next(iter(pair.ours)) in quantized:
            continue
        tensors = to_ours(pair, [files.read(names[name]) for name in pair.theirs])
        for name, tensor in zip(pair.ours, tensors, strict=True):
            for piece in places[name]:
                box = tuple(slice(low, low + size) for low, size in zip(piece.offset, piece.shape, strict=True))
                piece.data.copy_(tensor[box].reshape(-1))
    for linear in quantized.values():
        module = chunk.decoder.layers[linear.layer].get_submodule(linear.name)
        store_quantized(module, linear, [files.read_quantized(names[name]) for name in linear.pair.theirs])


def _vocabulary(files: QuantizedFiles) -> int:
    """Number of rows of the directory's embedding; our model may have more, as padding."""
    for name in ("backbone.embeddings.weight", "model.embeddings.weight", "model.embed_tokens.weight"):
        if name in files.entries:
            return files.entries[name].shape[0]
    raise CheckpointError(f"{files.folder} has no embedding. Copy the directory again.")


def _spelled(name: str, files: QuantizedFiles) -> str:
    """The name in the files for a name of the table: transformers saves Nemotron-H's layers under `model.`."""
    return name if name in files.entries else name.replace("backbone.", "model.", 1)


def _check_shapes(found: Sequence[Pair], files: QuantizedFiles, names: dict[str, str]) -> None:
    expected = {names[name]: shape for pair in found for name, shape in pair.theirs.items()}
    problems = [f"{name} is missing" for name in expected if name not in files.entries]
    problems += [
        f"{name} is {list(files.entries[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in files.entries and files.entries[name].shape != shape
    ]
    problems += [f"{name} is not part of this model" for name in files.entries if name not in expected]
    if problems:
        more = f", and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{files.folder} does not have the weights of this recipe's model: {'; '.join(problems[:_LISTED])}{more}. Name the "
            f"run that the directory was exported from."
        )
