"""Adapters (`model.lora`) as a directory that `peft` loads on top of the exported model they adapt.

    adapter_config.json            rank, alpha, names of the linears
    adapter_model.safetensors      lora_A = down, lora_B = up, for each matrix of transformers' model

Projections that we fuse and transformers does not (queries, keys and values; the branches of a gated MLP) become one adapter each
with the same `down`: the rows of `up` are divided as those of the weight, so the products are the same.
"""

import json
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import RecipeError
from recipes.schema.lora import SUFFIX, adapted_linears
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds
from train.checkpoint.tensors import StoredTensors
from train.hf.config import family_of
from train.hf.files import Entry, WeightWriter
from train.hf.mapping import to_theirs
from train.quantize.parts import Linear, linears

_BYPASSED = "mixer.out_proj"


def write_adapter(stored: StoredTensors, folder: Path, *, model: ModelConfig, base: str) -> int:
    """Write both files into an empty folder. -> parameters. base: what the adapters are loaded on. CheckpointError for weights
    that are not what was saved, RecipeError for a model that transformers does not have or adapters that peft refuses."""
    chosen = adapted_linears(model.lora, layer_kinds(model.pattern))
    if any(_BYPASSED in names for names in chosen.values()):
        raise RecipeError(
            f"{stored.folder} has adapters of {_BYPASSED}, which peft refuses in Mamba layers: transformers' kernels read that "
            f"weight past its module. Add the adapters to the weights and export the result (stratum merge RUN --adapters --out "
            f'NEW), or train with model.lora.targets that leave it out, such as ["*.in_proj","*.self_attention.*","*.mlp.*"].'
        )
    tensors: dict[str, torch.Tensor] = {}
    targets = []
    for linear in linears(model, family_of(model)):
        if linear.name not in chosen.get(linear.layer, ()):
            continue
        down, ups = _stored(stored, linear)
        for name, up in zip(linear.parts, to_theirs(linear.pair, ups), strict=True):
            module = name.replace(
                "backbone.", "model.", 1
            )  # Nemotron-H's name in memory (`train.hf.convert.their_names`)
            targets.append(module)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
    plan = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with WeightWriter(folder, plan, file_bytes=sum(entry.nbytes for entry in plan)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    (written,) = folder.glob("*.safetensors")
    written.rename(folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(tensor.numel() for tensor in tensors.values())


def _stored(stored: StoredTensors, linear: Linear) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`down`, and `up` in the components of the linear's weight."""
    weight = f"decoder.layers.{linear.layer}.{linear.name}.weight"
    adapter = weight.removesuffix(".weight") + SUFFIX
    names = [adapter + ".down", *(adapter + ".up" + name.removeprefix(weight) for name in linear.pair.ours)]
    for name in names:
        stored.verify(name)
    down, *ups = (stored.read(name) for name in names)
    return down, ups
