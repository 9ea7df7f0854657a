"""Rewards of answers: the same numbers as in the forward pass of training, however the texts are packed and split over ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_rows import EOD, drawn_rows
from ranks import run_ranks
from tiny import ROW_TOKENS, engine_of, recipe_with

from recipes.schema.errors import DataError, RecipeError
from recipes.schema.read import recipe_mapping
from train.align.reward import answer_places
from train.align.score_answers import RewardScorer, open_reward_model
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.evaluate.deal import evaluating
from train.model.context import RowContext

REWARD: dict[str, Any] = {"model.head": "scalar", "objective.kind": "reward", "data.reset_at_documents": True}


def texts_and_rewards(rank: int, tensor: int) -> tuple[list[float], list[float], list[str]]:
    """(rewards by the scorer, rewards in the rows of training, refusals) of the answers of three rows."""
    changes = {"parallel.tensor": tensor} if tensor > 1 else {}
    with engine_of(recipe_with(**REWARD, **changes), rank=rank, world=tensor) as engine:
        model = engine.chunks[0].module
        batch = drawn_rows(0, np.arange(3))
        assert batch.document_index is not None
        places = answer_places(batch)
        with evaluating([model]):
            context = RowContext(documents=batch.document_index)
            positions = torch.arange(ROW_TOKENS).expand(3, -1)
            wanted = model(batch.tokens, positions, None, packed_seq_params=context)[places.row, places.token]
        texts = []
        for row, token in zip(places.row.tolist(), places.token.tolist(), strict=True):
            document = batch.document_index[row]
            start = int((document == document[token]).nonzero()[0])
            texts.append(batch.tokens[row, start + 1 : token + 1].tolist())
        scorer = RewardScorer(model, eod=EOD, row_tokens=24, batch_rows=2)
        refusals = []
        for wrong in ([], [1] * 24):
            with pytest.raises(DataError) as error:
                scorer.scores([[1, 2], wrong])
            refusals.append(str(error.value))
        return scorer.scores(texts), wanted.tolist(), refusals


def test_rewards_are_those_of_the_training_forward_and_of_one_rank() -> None:
    ((found, wanted, refusals),) = run_ranks(1, texts_and_rewards, 1)
    assert len(found) > 10 and len(set(found)) > 10
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    split = run_ranks(2, texts_and_rewards, 2)
    assert split[0] == split[1]
    np.testing.assert_allclose(split[0][0], wanted, rtol=0, atol=2e-6)
    assert refusals[0] == "an empty text has no reward. Leave it out."
    assert refusals[1].startswith("a text of 24 tokens is longer than a row of 24 tokens")


def refusals_of(rank: int, folder: Path) -> list[str]:
    """What opening a reward model says of texts with another tokenizer, and of a language model."""
    found = []
    for name, changes in (("reward", REWARD), ("language", {})):
        recipe = recipe_with(**changes)
        with engine_of(recipe, rank=rank, world=1) as engine:
            state = RunState(recipe=recipe_mapping(recipe), tokenizer="a" * 64)
            CheckpointFolder(folder / name / "checkpoints", recipe.checkpoint).save(engine, state)
            with pytest.raises(RecipeError) as error:
                open_reward_model(str(folder / name), mesh=engine.mesh, tokenizer="b" * 64, eod=EOD)
            found.append(str(error.value))
    return found


def test_a_reward_model_of_another_tokenizer_and_a_language_model_are_refused(tmp_path: Path) -> None:
    other, language = run_ranks(1, refusals_of, tmp_path)[0]
    assert "a" * 12 in other and "b" * 12 in other and "name another reward model" in other
    assert "is a language model (model.head=vocabulary), which gives no rewards" in language
