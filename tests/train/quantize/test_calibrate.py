"""A calibrated model, a model that trains with rounded weights, and one that runs from a directory's codes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import GEMMA, HYBRID, TOKENS, recipe_of, scrambled, trained
from ranks import run_ranks
from tiny import rows_of

from launch.plan.cost.inference import inference_memory
from recipes.schema.errors import DataError, NumericsError
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.weight_formats import FORMATS
from train.build import check, mesh_of, model_on_one_rank
from train.checkpoint.tensors import StoredTensors
from train.hf.config import family_of, to_config
from train.hf.convert import Format, export_weights
from train.hf.quantize_export import Quantizer
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling
from train.model.backend import choose_backend
from train.model.build import build_model
from train.quantize.calibrate import calibrated, calibration_rows
from train.quantize.directory import QuantizedFiles
from train.quantize.parts import linears

FAMILIES = {"nemotron_h": HYBRID, "gemma2": replace(GEMMA, hidden=64, heads=4, kv_heads=2)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and a checkpoint of large, different weights."""
    root = tmp_path_factory.mktemp(request.param)
    recipe = recipe_of(FAMILIES[request.param])
    return recipe, scrambled(trained(root / "drawn", recipe, world=1), root)


def quantizer_of(model: ModelConfig, name: str, *, scale: torch.dtype = torch.float32, **changes: Any) -> Quantizer:
    chosen = linears(model, family_of(model))
    by_name = {part: linear for linear in chosen for part in linear.pair.theirs}
    return Quantizer(FORMATS[name], scale, by_name, **({"matrices": {}, "unquantized": ()} | changes))


def write(
    folder: Path,
    path: Path,
    model: ModelConfig,
    quantizer: Quantizer,
    *,
    vocab: int | None = None,
    format: Format = "keep",
) -> Path:
    """A quantised directory, as `stratum hf export --quantize` writes it."""
    folder.mkdir()
    export_weights(
        StoredTensors(path), folder, model=model, quantizer=quantizer, vocab=vocab, file_bytes=60_000, format=format
    )
    config = to_config(model, tokens=TOKENS, max_positions=128, dtype="float32", vocab=vocab) | quantizer.config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(chunk: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    with torch.no_grad():
        return chunk(tokens_BS, positions, None)


def divergence(rank: int, recipe: Recipe, path: Path) -> dict[str, float]:
    """KL(model || quantised model) on fresh rows: how much the loss of text that the model itself writes grows."""
    tokens, rows = rows_of(9, torch.arange(4).numpy()).tokens, rows_of(0, torch.arange(12).numpy())
    batches = [rows.part(at, at + 1) for at in range(12)]
    form, chosen, found = FORMATS["int4-g32"], linears(recipe.model, family_of(recipe.model)), {}
    with model_on_one_rank(recipe, path, device=CPU) as chunk:
        plain = logits(chunk, tokens).log_softmax(-1)
        start = {name: tensor.clone() for name, tensor in chunk.state_dict().items() if tensor is not None}
        for way in ("nearest", "calibrated"):
            chunk.load_state_dict(start)
            if way == "nearest":
                quantizer_of(recipe.model, "int4-g32").apply(chunk)
            else:
                calibrated(chunk, batches, form, chosen=chosen)
            rounded = logits(chunk, tokens).log_softmax(-1)
            found[way] = float((plain.exp() * (plain - rounded)).sum(-1).mean())
        chunk.embedding.word_embeddings.weight.data[0] = math.nan
        bad = rows_of(0, torch.arange(1).numpy())
        bad.tokens[:] = 0
        with pytest.raises(NumericsError, match=r"layer 0 .*NaN or infinite"):
            calibrated(chunk, [bad], form, chosen=chosen)
    return found


def test_calibrated_int4_loses_less_than_rounding_to_nearest(made: tuple[Recipe, Path]) -> None:
    found = run_ranks(1, divergence, *made)[0]
    assert found["calibrated"] < 0.85 * found["nearest"], found


def from_codes(rank: int, recipe: Recipe, path: Path, root: Path, name: str) -> dict[str, Any]:
    model, tokens = recipe.model, rows_of(3, torch.arange(2).numpy()).tokens
    quantizer = quantizer_of(model, name)
    folder = write(root / name, path, model, quantizer)
    with model_on_one_rank(recipe, path, device=CPU) as chunk:
        quantizer.apply(chunk, with_inputs=True)
        dense = logits(chunk, tokens)
    with model_on_one_rank(recipe, folder, device=CPU) as chunk:
        stored = logits(chunk, tokens)
        engine = InferenceEngine(chunk, model, EngineConfig(rows=1, context_tokens=7))
        events = engine.run([Request([1, 2, 3], 4, sampling=Sampling(temperature=0))])[0]
        text = [event.token.id for event in events if event.token is not None]
        greedy = logits(chunk, torch.tensor([[1, 2, 3, *text]]))[0, 2:-1].argmax(-1).tolist()
        memory = sum(t.nbytes for t in [*chunk.parameters(), *chunk.buffers()])
    half = replace(recipe, precision=replace(recipe.precision, params="bf16"))
    rounded = quantizer_of(model, name, scale=torch.bfloat16)
    folder_of_half = write(root / f"{name}-bf16", path, model, rounded, format="bf16")
    with model_on_one_rank(half, folder_of_half, device=CPU) as chunk:
        memory_of_half = sum(t.nbytes for t in [*chunk.parameters(), *chunk.buffers()])
    return {
        "equal": torch.equal(dense, stored),
        "half": memory_of_half - inference_memory(model, context_tokens=1, weight_bytes=2, quantized=name).weights,
        "written": len(text),
        "greedy": text == greedy,
        "memory": memory,
        "files": QuantizedFiles(folder).nbytes,
        "planned": inference_memory(model, context_tokens=1, weight_bytes=4, quantized=name).weights,
    }


@pytest.mark.parametrize("name", ["int8", "int4-g32", "fp8-block", "fp8-w8a8"])
def test_codes_compute_what_rounded_weights_do_in_the_planned_bytes(
    made: tuple[Recipe, Path], tmp_path: Path, name: str
) -> None:
    found = run_ranks(1, from_codes, *made, tmp_path, name)[0]
    assert found["equal"] and found["written"] == 4 and found["greedy"]
    assert found["memory"] == found["files"] == found["planned"] and found["half"] == 0


def straight(rank: int, recipe: Recipe, name: str) -> list[bool]:
    """One microbatch with rounding in the forward pass, and with weights that are rounded already."""
    rows = rows_of(0, torch.arange(2).numpy())
    positions = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
    results = []
    with mesh_of(recipe, check(recipe, world=1), device=CPU, rank=0) as mesh:
        for format in (name, "none"):
            precision = replace(recipe.precision, quantize_weights=format)
            (chunk,) = build_model(
                recipe.model, parallel=recipe.parallel, precision=precision, run=recipe.run, row_tokens=64, mesh=mesh,
                backend=choose_backend(precision, CPU),
            )  # fmt: skip
            if format == "none":
                quantizer_of(recipe.model, name).apply(chunk)
            loss = chunk(rows.tokens, positions, None, labels=rows.labels).mean()
            names, parameters = zip(*chunk.named_parameters(), strict=True)
            results.append((loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))))
    (loss, grads), (same, before) = results
    return [torch.equal(loss, same), *(torch.equal(grads[key], before[key]) for key in grads)]


@pytest.mark.parametrize("name", ["int8", "int4-g32", "fp8-block"])
def test_training_with_rounded_weights_has_their_loss_and_their_gradients(name: str) -> None:
    for model in FAMILIES.values():
        assert all(run_ranks(1, straight, recipe_of(model), name)[0])


def test_no_prepared_data_and_too_few_rows_are_one_clear_error(tmp_path: Path) -> None:
    recipe = recipe_of(HYBRID)
    with pytest.raises(DataError, match=r"--calibrate 33: the run has 32 training rows"):
        calibration_rows(recipe, 33)
    recipe = replace(recipe, data=replace(recipe.data, folder=str(tmp_path)))
    with pytest.raises(DataError, match=r"--calibrate reads training rows .* rounded to the nearest code"):
        calibration_rows(recipe, 8)
