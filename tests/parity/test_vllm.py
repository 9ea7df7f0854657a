"""vLLM on the CPU, which shares no code with us, continues texts with our exports: same tokens, same log-probabilities.

Run by `make test-oracle` in its own environment (tests/parity/install_vllm.sh). Skips where that could not be installed.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf_models import exported, ids_of, recipe_of, scrambled, trained
from ranks import run_ranks

from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.typed import build
from recipes.schema.weight_formats import FORMATS
from train.build import model_on_one_rank
from train.hf.config import family_of
from train.hf.quantize_export import Quantizer
from train.model.context import RowContext
from train.quantize.parts import linears

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".oracle" / "vllm" / "bin" / "python"
NEW = 24
LENGTHS = (5, 40, 300)
"""Of the prompts. The last is longer than a chunk of the scan (256 tokens) and than the window of Gemma 2's local layers."""

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not (ROOT / ".oracle/vllm/.installed").exists(), reason="vLLM's CPU build could not be installed"
    ),
]


QUANTISED = {
    ("nemotron_h_tiny", "fp8-w8a8"): ("float32", 0.06),
    ("gemma2_tiny", "fp8-w8a8"): ("float32", 0.06),
    ("nemotron_h_tiny", "int8-w8a8"): ("bfloat16", 0.12),
    ("gemma2_tiny", "int8-w8a8"): ("bfloat16", 0.12),
    ("nemotron_h_tiny", "int4-g32"): ("bfloat16", 0.25),
    ("gemma2_tiny", "int4-g32"): ("bfloat16", 0.25),
}
"""Format -> what vLLM computes in, and the largest mean difference of log-probabilities, in nats.

vLLM's int8 and int4 products take bf16 only, and weights as large as these make its rounding visible. Where inputs are rounded,
one that rounds the other way changes all that follow; and vLLM divides int8 inputs by amax / 127, not by amax / 127.5."""
_TYPES = {"float32": ("fp32", torch.float32), "bfloat16": ("bf16", torch.bfloat16)}


def predictions(
    rank: int, recipe: Recipe, checkpoint: Path, texts: list[list[int]], quantizer: Quantizer | None = None
) -> list[tuple[list[float], list[int], list[float]]]:
    """For `run_ranks`: of each text, the log-probability of every token but the first; and the most likely token there, with its
    log-probability. quantizer: rounds weights, and the inputs of layers if the format does that."""
    found = []
    with model_on_one_rank(recipe, checkpoint, device=torch.device("cpu")) as model, torch.no_grad():
        if quantizer is not None:
            quantizer.apply(model, with_inputs=True)
        for text in texts:
            row = torch.tensor([text])
            positions = torch.arange(len(text) - 1)[None]
            losses = model(row[:, :-1], positions, None, labels=row[:, 1:], packed_seq_params=RowContext())
            logits = model(row[:, :-1], positions, None, packed_seq_params=RowContext()).float()
            best = logits.reshape(len(text) - 1, -1).log_softmax(-1).max(-1)
            found.append(((-losses[0]).tolist(), best.indices.tolist(), best.values.tolist()))
    return found


def made(name: str, folder: Path) -> tuple[Recipe, Path]:
    """A small model's recipe, and a checkpoint of large, different weights."""
    recipe = recipe_of(build(ModelConfig, yaml.safe_load((ROOT / f"recipes/model/{name}.yaml").read_text()), "model"))
    recipe = replace(recipe, data=replace(recipe.data, row_tokens=512))
    return recipe, scrambled(trained(folder / "trained", recipe, world=1), folder / "scrambled")


def by_vllm(
    folder: Path, prompts: list[list[int]], answers: Path, *, dtype: str = "float32"
) -> list[dict[str, list[Any]]]:
    """Greedy continuations of token ids, with log-probabilities."""
    done = subprocess.run(
        [PYTHON, ROOT / "tests/parity/vllm_generate.py", folder, str(NEW), answers, dtype],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(answers.read_text())


def prompts_of(recipe: Recipe) -> list[list[int]]:
    return [ids_of(1, length, recipe.model.vocab)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", ["nemotron_h_tiny", "gemma2_tiny"])
def test_vllm_gives_our_tokens_and_log_probabilities(name: str, tmp_path: Path) -> None:
    recipe, checkpoint = made(name, tmp_path)
    folder = exported(checkpoint, tmp_path / "exported", recipe.model, max_positions=512)
    prompts = prompts_of(recipe)
    answers = by_vllm(folder, prompts, tmp_path / "answers.json")
    texts = [prompt + answer["ids"] for prompt, answer in zip(prompts, answers, strict=True)]
    ours = run_ranks(1, predictions, recipe, checkpoint, texts)[0]
    for answer, (logprobs, likeliest, _) in zip(answers, ours, strict=True):
        assert answer["ids"] == likeliest[-NEW:]
        differences = [abs(a - b) for a, b in zip(answer["logprobs"], logprobs[-NEW:], strict=True)]
        assert max(differences) <= 1e-5, (name, differences)


@pytest.mark.parametrize(("name", "form"), list(QUANTISED))
def test_vllm_runs_quantised_exports_as_our_rounded_forward_does(name: str, form: str, tmp_path: Path) -> None:
    """Its greedy tokens are ours, or as likely within the tolerance; and it is nearer to the rounded model than to the plain one
    wherever rounding the weights changes more than bf16 does."""
    dtype, tolerance = QUANTISED[name, form]
    params, kind = _TYPES[dtype]
    recipe, checkpoint = made(name, tmp_path)
    # vLLM's int4 kernel for CPUs takes output sizes in multiples of 32 only, which in_proj of this model has not.
    kept = ("in_proj",) if (name, form) == ("nemotron_h_tiny", "int4-g32") else ()
    every = linears(recipe.model, family_of(recipe.model))
    chosen = [linear for linear in every if not any(part.rpartition(".")[2] in kept for part in linear.parts)]
    by_name = {part: linear for linear in chosen for part in linear.pair.theirs}
    quantizer = Quantizer(FORMATS[form], kind, by_name, {}, kept)
    folder = exported(
        checkpoint, tmp_path / "exported", recipe.model, max_positions=512, format=params, quantizer=quantizer
    )
    prompts = prompts_of(recipe)
    answers = by_vllm(folder, prompts, tmp_path / "answers.json", dtype=dtype)
    texts = [prompt + answer["ids"] for prompt, answer in zip(prompts, answers, strict=True)]
    recipe = replace(recipe, precision=replace(recipe.precision, params=params))
    rounded = run_ranks(1, predictions, recipe, checkpoint, texts, quantizer)[0]
    plain = run_ranks(1, predictions, recipe, checkpoint, texts)[0]

    def distance(ours: list[tuple[list[float], list[int], list[float]]]) -> float:
        pairs = [
            p
            for answer, (logs, *_) in zip(answers, ours, strict=True)
            for p in zip(answer["logprobs"], logs[-NEW:], strict=True)
        ]
        return sum(abs(a - b) for a, b in pairs) / len(pairs)

    gaps = [best - own for logs, _, bests in rounded for own, best in zip(logs[-NEW:], bests[-NEW:], strict=True)]
    measured = {"mean": distance(rounded), "to the plain model": distance(plain), "gap": max(gaps)}
    assert measured["mean"] <= tolerance and measured["gap"] <= 4 * tolerance, measured
    assert form == "int8-w8a8" or measured["mean"] < 0.75 * measured["to the plain model"], measured
