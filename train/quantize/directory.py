"""Directories of quantised weights in compressed-tensors' format: reads and writes their config, reads their tensors.

    config.json: quantization_config    <--to_config--  WeightFormat  --from_config-->

Reads what `stratum hf export --quantize` writes, and symmetric int4, int8 and FP8 weights that compressed-tensors or LLM
Compressor wrote for the same models, with or without packing; inputs of the layers may be rounded token by token (W8A8).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import CheckpointError
from recipes.schema.weight_formats import Codes, Shape, WeightFormat
from train.hf.config import CONFIG, read_config
from train.hf.files import Entry, WeightFiles
from train.quantize.rounding import CODES, QuantizedMatrix

KEY = "quantization_config"
METHOD = "compressed-tensors"
_CONTAINERS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def is_quantized(folder: Path) -> bool:
    """Whether a folder is a directory for transformers with quantised weights."""
    return (folder / CONFIG).is_file() and KEY in read_config(folder)


def to_config(form: WeightFormat, *, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. ignore: names of linear modules that keep their format."""
    rows, columns = form.block
    weights: dict[str, Any] = {
        "num_bits": form.bits,
        "type": "int" if form.codes == "int" else "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "block" if rows != 1 else "channel" if columns is None else "group",
        "group_size": columns if rows == 1 else None,
    }
    if rows != 1:
        weights["block_structure"] = [rows, columns]
    inputs = {"num_bits": form.bits, "type": weights["type"], "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if form.rounds_inputs else None,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": form.container,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def from_config(config: dict[str, Any], *, where: str) -> WeightFormat:
    """The format that a `quantization_config` describes. CheckpointError names what is not supported."""
    problems = []
    if config.get("quant_method") != METHOD:
        problems.append(f"quant_method={config.get('quant_method')!r}, supported is {METHOD!r}")
    if config.get("format") not in _CONTAINERS:
        problems.append(f"format={config.get('format')!r}, supported are {', '.join(_CONTAINERS)}")
    groups = config.get("config_groups") or {}
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        problems.append(f"{len(groups)} config_groups, supported is one with `weights`")
        weights = {}
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    blocks: dict[Any, Any] = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or (None, None)),
    }
    if weights and (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        problems.append(f"weights of type={kind!r} with num_bits={bits!r}, supported are int 4, int 8 and float 8")
    if weights and strategy not in blocks:
        problems.append(f"strategy={strategy!r}, supported are {', '.join(blocks)}")
    if not weights.get("symmetric", True):
        problems.append("symmetric=false: zero points are not supported")
    if weights.get("actorder") not in (None, "weight", "static"):
        problems.append(f"actorder={weights['actorder']!r} is not supported")
    inputs = group.get("input_activations") if isinstance(group, dict) else None
    if inputs is not None and not _rounds_tokens(inputs, weights):
        problems.append(
            f"input_activations={inputs}, supported are none, or symmetric ones of the weights' type and bits with "
            f"dynamic=true and strategy='token'"
        )
    if problems:
        raise CheckpointError(f"{where}: {KEY} has {'; '.join(problems)}.")
    codes: Codes = "int" if kind == "int" else "e4m3"
    form = WeightFormat(f"{codes}-{bits} {strategy}", 4 if bits == 4 else 8, codes, blocks[strategy], config["format"])
    return replace(form, rounds_inputs=inputs is not None)


def _rounds_tokens(inputs: Any, weights: dict[str, Any]) -> bool:
    """Whether inputs are rounded as `WeightFormat.rounds_inputs` says."""
    wanted = {"num_bits": weights.get("num_bits"), "type": weights.get("type"), "dynamic": True, "strategy": "token"}
    is_symmetric = isinstance(inputs, dict) and inputs.get("symmetric", True)
    return is_symmetric and all(inputs.get(key) == value for key, value in wanted.items())


class QuantizedFiles(WeightFiles):
    """The weights of a directory, some of them quantised. `entries` and `read` give every weight as a dense one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, quantized=True)
        self.form = from_config(read_config(folder)[KEY], where=str(folder / CONFIG))
        self.stored = dict(self.entries)
        self.quantized: dict[str, Shape] = {}
        """[outputs, inputs] of each quantised weight, by name."""
        self.entries = {}
        codes = "weight_packed" if self.form.container == "pack-quantized" else "weight"
        for name, entry in self.stored.items():
            module, _, last = name.rpartition(".")
            if f"{module}.weight_scale" not in self.stored:
                self.entries[name] = entry
            elif last == codes:
                scale = self.stored[f"{module}.weight_scale"]
                shape = self._shape(module, entry)
                self._check(module, shape)
                self.quantized[f"{module}.weight"] = shape
                self.entries[f"{module}.weight"] = Entry(f"{module}.weight", shape, scale.dtype)
        orphans = [
            name
            for name in self.stored
            if name.endswith((".weight_scale", ".weight_packed"))
            and f"{name.rpartition('.')[0]}.weight" not in self.quantized
        ]
        if orphans:
            raise CheckpointError(
                f"{folder}: tensors of the quantised weight that {orphans[0]} belongs to are missing. Copy the "
                f"directory again."
            )

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(entry.nbytes for entry in self.stored.values())

    def read(self, name: str) -> torch.Tensor:
        """One weight, dense, in the format of its scales."""
        return self.read_quantized(name).dense() if name in self.quantized else super().read(name)

    def read_quantized(self, name: str) -> QuantizedMatrix:
        """One quantised weight."""
        module = name.removesuffix(".weight")
        tensors = {last: super(QuantizedFiles, self).read(f"{module}.{last}") for last in self._stored_names(name)}
        if not bool(tensors["weight_scale"].isfinite().all()):
            raise CheckpointError(
                f"{self.folder}: {module}.weight_scale has NaN or infinite values. Copy the files again."
            )
        tensors["weight_scale"] = tensors["weight_scale"].reshape(self.form.scale_shape(self.quantized[name]))
        return QuantizedMatrix.from_stored(self.form, tensors)

    def _stored_names(self, name: str) -> list[str]:
        return list(self.form.stored_shapes(self.quantized[name]))

    def _shape(self, module: str, codes: Entry) -> Shape:
        """[outputs, inputs] of a quantised weight."""
        if self.form.container != "pack-quantized":
            rows, columns = codes.shape
            return rows, columns
        if f"{module}.weight_shape" not in self.stored:
            raise CheckpointError(f"{self.folder}: {module}.weight_shape is missing. Copy the directory again.")
        rows, columns = super().read(f"{module}.weight_shape").tolist()
        return rows, columns

    def _check(self, module: str, shape: Shape) -> None:
        """CheckpointError if a stored tensor does not have the shape and type required by the format and the weight's shape."""
        is_packed = self.form.container == "pack-quantized"
        for last, (expected, _) in self.form.stored_shapes(shape).items():
            entry = self.stored.get(f"{module}.{last}")
            found = None if entry is None else entry.shape
            if last == "weight_scale" and found is not None and len(found) == 1:
                found = (found[0], 1)  # scales of whole tensors and of rows may be stored without the second dim
            if found != expected:
                raise CheckpointError(
                    f"{self.folder}: {module}.{last} is {found}, not {list(expected)}, which {self.form.name} weights of "
                    f"{list(shape)} have. Copy the directory again."
                )
            if last == "weight" and not is_packed and entry is not None and entry.dtype != CODES[self.form.codes]:
                raise CheckpointError(
                    f"{self.folder}: {module}.weight is stored as {entry.dtype}, not {CODES[self.form.codes]}."
                )
