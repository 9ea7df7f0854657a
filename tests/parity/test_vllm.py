"""vLLM on the CPU, which shares no code with us, continues texts with our exports: same tokens, same log-probabilities.

Run by `make test-oracle` in its own environment (tests/parity/install_vllm.sh). Skips where that could not be installed.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hf_models import exported, ids_of, recipe_of, scrambled, trained
from ranks import run_ranks

from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from train.build import model_on_one_rank
from train.model.context import RowContext

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


def predictions(
    rank: int, recipe: Recipe, checkpoint: Path, texts: list[list[int]]
) -> list[tuple[list[float], list[int]]]:
    """For `run_ranks`: of each text, the log-probability of every token but the first, and the most likely token there."""
    found = []
    with model_on_one_rank(recipe, checkpoint, device=torch.device("cpu")) as model, torch.no_grad():
        for text in texts:
            row = torch.tensor([text])
            positions = torch.arange(len(text) - 1)[None]
            losses = model(row[:, :-1], positions, None, labels=row[:, 1:], packed_seq_params=RowContext())
            logits = model(row[:, :-1], positions, None, packed_seq_params=RowContext())
            found.append(((-losses[0]).tolist(), logits.reshape(len(text) - 1, -1).argmax(-1).tolist()))
    return found


@pytest.mark.parametrize("name", ["nemotron_h_tiny", "gemma2_tiny"])
def test_vllm_gives_our_tokens_and_log_probabilities(name: str, tmp_path: Path) -> None:
    model = ModelConfig(**yaml.safe_load((ROOT / f"recipes/model/{name}.yaml").read_text()))
    recipe = recipe_of(model)
    recipe = replace(recipe, data=replace(recipe.data, row_tokens=512))
    checkpoint = scrambled(trained(tmp_path / "trained", recipe, world=1), tmp_path / "scrambled")
    folder = exported(checkpoint, tmp_path / "exported", model, max_positions=512)
    prompts = [ids_of(1, length, model.vocab)[0].tolist() for length in LENGTHS]

    answers_file = tmp_path / "answers.json"
    done = subprocess.run(
        [PYTHON, ROOT / "tests/parity/vllm_generate.py", folder, str(NEW), answers_file],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(answers_file.read_text())

    texts = [prompt + answer["ids"] for prompt, answer in zip(prompts, answers, strict=True)]
    ours = run_ranks(1, predictions, recipe, checkpoint, texts)[0]
    for answer, (logprobs, likeliest) in zip(answers, ours, strict=True):
        assert answer["ids"] == likeliest[-NEW:]
        differences = [abs(a - b) for a, b in zip(answer["logprobs"], logprobs[-NEW:], strict=True)]
        assert max(differences) <= 1e-5, (name, differences)
