"""Reward models in Hugging Face's format: transformers gives the same rewards, and what comes back has the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import GEMMA, HYBRID, TOKENS, exported, ids_of, recipe_of
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import engine_of
from transformers import AutoConfig, AutoModelForSequenceClassification

from recipes.schema.errors import RecipeError
from train.align.score_answers import RewardScorer
from train.checkpoint.manifest import RunState
from train.checkpoint.storage import publish, read_weights
from train.checkpoint.tensors import StoredTensors
from train.hf.check import compare, load_theirs
from train.hf.config import family_of, from_config, read_config, to_config
from train.hf.convert import import_weights
from train.hf.files import WeightFiles

SCORED = replace(GEMMA, head="scalar")
EOD = 0


def theirs_at(folder: Path) -> Path:
    """A reward model as transformers saves it, with weights far from their initial values."""
    folder.mkdir()
    config = to_config(SCORED, tokens=TOKENS, max_positions=64, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "saved")
    return folder / "saved"


def rewards_and_drift(rank: int, checkpoint: Path, texts: list[list[int]], folders: list[Path]) -> tuple[object, ...]:
    """(our rewards of texts, problems of a comparison with each directory)."""
    recipe = recipe_of(SCORED)
    recipe = replace(
        recipe,
        objective=replace(recipe.objective, kind="reward"),
        data=replace(recipe.data, reset_at_documents=True),
    )
    with engine_of(recipe, rank=rank, world=1) as engine:
        ours = engine.chunks[0].module.eval()
        read_weights(checkpoint, [ours], groups=engine.mesh.groups)
        rewards = RewardScorer(ours, eod=EOD, row_tokens=64).scores(texts)
        ids, problems = ids_of(2, 51, SCORED.vocab), []
        for folder in folders:
            theirs = load_theirs(folder, dtype=torch.float32, device=torch.device("cpu"))
            agreement = compare(ours, theirs, ids, model=SCORED)
            problems.append((agreement.problems, agreement.summary()))
        return rewards, problems


def test_rewards_and_weights_are_those_of_transformers(tmp_path: Path) -> None:
    saved = theirs_at(tmp_path / "theirs")
    model = from_config(read_config(saved), where="config.json")
    assert model == SCORED
    aside = tmp_path / ".ours"
    aside.mkdir()
    import_weights(WeightFiles(saved), aside, model=model)
    publish(aside, tmp_path / "ours", RunState())
    stored = StoredTensors(tmp_path / "ours")
    assert stored.weights["output_layer.weight"].shape == (1, SCORED.hidden)

    again = exported(tmp_path / "ours", tmp_path / "again", model)
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (saved, again)
    )
    assert before.keys() == after.keys() and "score.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text((again / "config.json").read_text())
    save_file(after | {"score.weight": -after["score.weight"]}, wrong / "model.safetensors", {"format": "pt"})
    draw = np.random.default_rng(2)
    texts = [draw.integers(1, SCORED.vocab, size).tolist() for size in (3, 17, 30, 1, 9)]
    ((found, problems),) = run_ranks(1, rewards_and_drift, tmp_path / "ours", texts, [again, wrong])
    theirs = AutoModelForSequenceClassification.from_pretrained(again, dtype=torch.float32)
    with torch.no_grad():
        wanted = [float(theirs(torch.tensor([[EOD, *text]])).logits[0, 0]) for text in texts]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert problems[0][0] == [] and "rewards of every token within" in problems[0][1][0]
    assert problems[1][0] and "logits" in problems[1][0][0]


def test_models_that_are_not_a_reward_model_of_gemma_2_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"NemotronHForCausalLM: model\.head=scalar"):
        family_of(replace(HYBRID, head="scalar"))
    config = to_config(SCORED, tokens=TOKENS, max_positions=64, dtype="float32")
    assert config["architectures"] == ["Gemma2ForSequenceClassification"]
    three = config | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    with pytest.raises(RecipeError, match="Gemma2ForSequenceClassification with 3 labels: only 1 is supported"):
        from_config(three, where="config.json")
    unsaid = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    with pytest.raises(RecipeError, match="with 2 labels"):
        from_config(unsaid, where="config.json")
    assert from_config(unsaid | {"num_labels": 1}, where="config.json").head == "scalar"
    other = to_config(HYBRID, tokens=TOKENS, max_positions=64, dtype="float32")
    with pytest.raises(RecipeError, match="the only classifier that is supported is Gemma2ForSequenceClassification"):
        from_config(other | {"architectures": ["NemotronHForSequenceClassification"]}, where="config.json")
