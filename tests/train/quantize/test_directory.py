"""Directories of quantised weights written by compressed-tensors give the same numbers; damage is one clear error."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

from recipes.schema.errors import CheckpointError
from recipes.schema.weight_formats import FORMATS
from train.quantize.directory import KEY, QuantizedFiles, from_config, is_quantized, to_config
from train.quantize.rounding import quantize

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 rows, packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 rows, as they are": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4 groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "fp8 rows": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


def written(folder: Path, scheme: str) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """A directory of one layer, compressed by the package. -> folder, the package's decompressed weight, the tensors."""
    container, arguments = SCHEMES[scheme]
    args = QuantizationArgs(**arguments)
    weight = torch.randn(160, 208, generator=torch.Generator().manual_seed(1))
    shapes = {"channel": (160, 1), "group": (160, 13), "block": (2, 2), "tensor": (1,)}
    scale = torch.rand(shapes[arguments["strategy"]], generator=torch.Generator().manual_seed(2)) * 0.02 + 0.01
    compressor: Any = BaseCompressor.get_value_from_registry(container)
    full = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = compressor.compress({"weight": weight, "weight_scale": scale}, full)
    tensors = {f"m.up_proj.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    tensors["m.norm.weight"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    config = QuantizationConfig(config_groups={"group_0": full}, format=container, ignore=["lm_head"])
    (folder / "config.json").write_text(json.dumps({KEY: config.model_dump(mode="json")}))
    local = {name.removeprefix("m.up_proj."): tensor for name, tensor in tensors.items() if "up_proj" in name}
    return folder, compressor.decompress(local, full)["weight"], tensors


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_what_the_package_compressed_is_read_with_its_numbers(scheme: str, tmp_path: Path) -> None:
    folder, dense, tensors = written(tmp_path, scheme)
    files = QuantizedFiles(folder)
    assert is_quantized(folder)
    assert {name: entry.shape for name, entry in files.entries.items()} == {
        "m.up_proj.weight": (160, 208),
        "m.norm.weight": (8,),
    }
    assert torch.equal(files.read("m.up_proj.weight"), dense)
    assert files.nbytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", list(FORMATS))
def test_our_config_is_the_packages_and_comes_back(name: str) -> None:
    config = to_config(FORMATS[name], ignore=["lm_head"])
    theirs = QuantizationConfig(**config)
    assert theirs.format == FORMATS[name].container and theirs.ignore == ["lm_head"]
    back = from_config(config, where="config.json")
    assert replace(back, name=name) == FORMATS[name]


@pytest.mark.parametrize("rest", [0, 4, 40, 3000, 20_000])
def test_file_cut_short_is_one_error(rest: int, tmp_path: Path) -> None:
    folder, _, _ = written(tmp_path, "int4 groups")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:rest])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors.*Copy the file again"):
        QuantizedFiles(folder)


@pytest.mark.parametrize("name", ["m.up_proj.weight_packed", "m.up_proj.weight_scale", "m.up_proj.weight_shape"])
def test_missing_part_of_a_weight_is_one_error(name: str, tmp_path: Path) -> None:
    folder, _, tensors = written(tmp_path, "int4 groups")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.*missing|up_proj.*are missing"):
        QuantizedFiles(folder)


def test_parts_that_do_not_fit_each_other_and_bad_scales_are_one_error(tmp_path: Path) -> None:
    folder, _, tensors = written(tmp_path, "int4 groups")
    save_file(tensors | {"m.up_proj.weight_scale": torch.ones(160, 12)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is \(160, 12\), not \[160, 13\]"):
        QuantizedFiles(folder)
    save_file(tensors | {"m.up_proj.weight_shape": torch.tensor([160, 999])}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_packed is"):
        QuantizedFiles(folder)
    scale = tensors["m.up_proj.weight_scale"].clone()
    scale[3, 3] = torch.nan
    save_file(tensors | {"m.up_proj.weight_scale": scale}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale has NaN or infinite"):
        QuantizedFiles(folder).read("m.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, "num_bits=3"),
        ({"symmetric": False}, "zero points are not supported"),
        ({"strategy": "token"}, "strategy='token'"),
        ({"type": "float"}, "type='float' with num_bits=4"),
        ({"actorder": "group"}, "actorder='group'"),
    ],
)
def test_schemes_that_are_not_read_are_named(change: dict[str, Any], message: str) -> None:
    config = to_config(FORMATS["int4-g32"], ignore=[])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(CheckpointError, match=message):
        from_config(config, where="config.json")


@pytest.mark.parametrize("change", [{"dynamic": False}, {"strategy": "tensor"}, {"num_bits": 4}, {"symmetric": False}])
def test_inputs_that_are_rounded_another_way_are_named(change: dict[str, Any]) -> None:
    config = to_config(FORMATS["int8-w8a8"], ignore=[])
    config["config_groups"]["group_0"]["input_activations"] |= change
    with pytest.raises(CheckpointError, match=r"input_activations=.*supported are none, or symmetric ones"):
        from_config(config, where="config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        ({"format": "marlin-24"}, "format='marlin-24'"),
        ({"config_groups": {}}, "0 config_groups"),
        ({"config_groups": {"a": {}, "b": {}}}, "2 config_groups"),
        ({"config_groups": ["a"]}, "config_groups"),
        ({"config_groups": {"a": {"weights": "int4"}}}, "weights"),
    ],
)
def test_other_methods_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_config(to_config(FORMATS["int4-g32"], ignore=[]) | change, where="config.json")


def test_header_of_a_file_that_lies_about_its_tensors_is_one_error(tmp_path: Path) -> None:
    folder, _, _ = written(tmp_path, "int4 groups")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + size].replace(b'"I32"', b'"I8" ')
    path.write_bytes(raw[:8] + header + raw[8 + size :])
    with pytest.raises(CheckpointError):
        QuantizedFiles(folder)


def test_weights_of_a_directory_are_read_as_they_were_quantised(tmp_path: Path) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    matrix = quantize(weight, FORMATS["int4-g32"], name="w", scale_dtype=torch.bfloat16)
    save_file({f"a.o_proj.{name}": tensor for name, tensor in matrix.stored().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({KEY: to_config(FORMATS["int4-g32"], ignore=[])}))
    found = QuantizedFiles(tmp_path).read_quantized("a.o_proj.weight")
    assert torch.equal(found.codes, matrix.codes) and torch.equal(found.scale, matrix.scale)
    assert load_file(tmp_path / "model.safetensors")["a.o_proj.weight_scale"].dtype == torch.bfloat16
