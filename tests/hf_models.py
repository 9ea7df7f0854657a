"""Small models of both families, and checkpoints of them with weights far from their initial values."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from ranks import run_ranks
from tiny import RECIPE, TINY, engine_of, steps_of

from recipes.schema.manifest import read_manifest
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from train.checkpoint import storage
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.checkpoint.tensors import StoredTensors, write_weights
from train.hf.config import SpecialTokens, to_config
from train.hf.convert import Format, export_weights
from train.hf.quantize_export import Quantizer

HYBRID = replace(TINY, pattern="M-M*-M*-", heads=6, kv_heads=3)
GEMMA = ModelConfig(
    pattern="w-*-w-",
    hidden=48,
    vocab=256,
    ffn=96,
    activation="geglu",
    heads=6,
    kv_heads=3,
    head_dim=16,
    query_scale=8.0,
    window_tokens=20,
    attention_softcap=5.0,
    position="rope",
    norm_eps=1e-6,
    norm_offset=1,
    post_norms=True,
    scale_embedding=True,
    tie_embeddings=True,
    logit_softcap=3.0,
)
FAMILIES = {"nemotron_h": HYBRID, "gemma2": GEMMA}
FOUR = {"tensor": 2, "pipeline": 2, "sequence": True}
TOKENS = SpecialTokens(bos=0, eos=0, pad=None)


def recipe_of(model: ModelConfig, *, params: str = "fp32", **parallel: object) -> Recipe:
    """A recipe of a model on a layout. Grouped heads in threes do not divide by two ranks: key/value heads become two."""
    if parallel and model.kv_heads % 2:
        model = replace(model, heads=4, kv_heads=2)
    return replace(
        RECIPE,
        model=model,
        precision=replace(RECIPE.precision, params=params),
        parallel=replace(RECIPE.parallel, **parallel),
    )


def save(rank: int, recipe: Recipe, world: int, folder: Path) -> Path:
    """For `run_ranks`: train a step and save."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(1))
        mapping = json.loads(json.dumps(asdict(recipe)))
        return CheckpointFolder(folder, recipe.checkpoint).save(
            engine, RunState(step=1, position=4, recipe=mapping, data_hash="d" * 64)
        )


def trained(folder: Path, recipe: Recipe, *, world: int) -> Path:
    """A checkpoint of one step at the recipe's layout."""
    return run_ranks(world, save, recipe, world, folder)[0]


def scrambled(path: Path, folder: Path, *, step: int = 1) -> Path:
    """A checkpoint whose every weight has moved by a fifth of its size, and one: nothing is alike by chance."""
    stored = StoredTensors(path)
    final = folder / f"step_{step:08d}"
    aside = folder / ".writing"
    aside.mkdir(parents=True)

    def moved(name: str) -> torch.Tensor:
        tensor = stored.read(name)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        spread = 0.2 if tensor.dim() == 1 else float(tensor.float().std()) + 0.05
        return (tensor.float() + spread * noise).to(tensor.dtype)

    write_weights(aside, stored.weights, moved)
    bare = {"tensors": {}, "files": {}, "updates": None, "index_sha256": ""}
    storage.publish(aside, final, replace(read_manifest(path), **bare))
    return final


def exported(
    path: Path,
    folder: Path,
    model: ModelConfig,
    *,
    format: Format = "keep",
    vocab: int | None = None,
    max_positions: int = 128,
    quantizer: Quantizer | None = None,
) -> Path:
    """A directory in Hugging Face's format, without a tokenizer, in several files."""
    folder.mkdir(parents=True)
    export_weights(
        StoredTensors(path), folder, model=model, format=format, vocab=vocab, file_bytes=200_000, quantizer=quantizer
    )
    dtype = "bfloat16" if format == "bf16" else "float32"
    config = to_config(model, tokens=TOKENS, max_positions=max_positions, dtype=dtype, vocab=vocab)
    config |= quantizer.config if quantizer is not None else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ids_of(rows: int, length: int, vocab: int) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(7))
