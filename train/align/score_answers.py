"""Rewards of answers by a trained reward model, with the forward pass that trained it.

texts --first fit--> rows, one document a text --model, scalar head--> a number for each token --last of a text--> rewards
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipes.schema.errors import DataError, RecipeError, refuse
from recipes.schema.facts import named
from recipes.schema.teacher_rules import tokenizer_problems
from train.build import model_in_mesh
from train.evaluate.deal import evaluating
from train.evaluate.score import first_fit
from train.model.context import RowContext
from train.parallel.mesh import Mesh


def open_reward_model(
    place: str, *, mesh: Mesh, tokenizer: str, eod: int, row_tokens: int | None = None, batch_rows: int = 8
) -> "RewardScorer":
    """The reward model of a run (its newest checkpoint) or of a checkpoint, split over the tensor ranks of `mesh`.

    tokenizer, eod: fingerprint and end-of-document token of the texts' tokenizer. row_tokens: of the longest text; None: the
    rows that the model was trained on. Collective over the world. Raises CheckpointError, RecipeError.
    """
    found = named(place)
    if found.path is None or found.manifest is None:
        raise RecipeError(f"{place} is not a reward model: {found.error}")
    if found.recipe is None:
        raise RecipeError(found.recipe_error or f"{found.path} has no recipe, so its model is not known.")
    if found.recipe.model.head != "scalar":
        raise RecipeError(
            f"{found.path} is a language model (model.head={found.recipe.model.head}), which gives no rewards. Name a run of "
            f"objective=reward."
        )
    refuse(
        tokenizer_problems(
            str(found.path),
            found.manifest.tokenizer,
            tokenizer,
            where="the texts",
            otherwise="name another reward model",
        )
    )
    model = model_in_mesh(found.recipe, found.path, mesh=mesh)
    return RewardScorer(model, eod=eod, row_tokens=row_tokens or found.recipe.data.row_tokens, batch_rows=batch_rows)


class RewardScorer:
    """Scores texts with a reward model on one pipeline stage, in this process or split over tensor ranks."""

    def __init__(self, model: Any, *, eod: int, row_tokens: int, batch_rows: int = 8) -> None:
        """model: an unwrapped chunk with a scalar head. eod: the end-of-document token. row_tokens: the longest row, in tokens;
        batch_rows: rows read at once. They change the memory and the rounding, not the rewards."""
        assert model.has_scalar_head and model.pre_process and model.post_process, "needs a whole reward model"
        self._model, self._eod, self._row_tokens, self._batch_rows = model, eod, row_tokens, batch_rows

    def scores(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each text, the same on every tensor rank, which all call with the same texts. Collective over the tensor
        group.

        A text is a document as in prepared data, without the end-of-document tokens before and after it: context and answer, up
        to the end-of-turn that ends the answer, or to its last token if it was cut off. Its reward is the head's output at the
        last token. DataError for a text that is empty or longer than a row.
        """
        sizes = [1 + len(text) for text in token_ids]  # as in training, the end-of-document token comes before
        for size in sizes:
            if size == 1:
                raise DataError("an empty text has no reward. Leave it out.")
            if size > self._row_tokens:
                raise DataError(
                    f"a text of {size - 1:,} tokens is longer than a row of {self._row_tokens:,} tokens, so the reward model "
                    f"cannot read it. Shorten the answers, or allow longer rows."
                )
        rewards = [0.0] * len(sizes)
        rows = first_fit(sizes, row_tokens=self._row_tokens)
        with evaluating([self._model]):
            for start in range(0, len(rows), self._batch_rows):
                part = rows[start : start + self._batch_rows]
                order = [index for row in part for index in row]
                for index, value in zip(order, self._read(part, token_ids), strict=True):
                    rewards[index] = value
        return rewards

    def _read(self, rows: list[list[int]], texts: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of the texts in some rows, row by row."""
        length = max(sum(1 + len(texts[index]) for index in row) for row in rows)
        tokens = np.full((len(rows), length), self._eod, dtype=np.int64)
        documents = np.zeros(tokens.shape, dtype=np.int32)
        ends = []
        for place, row in enumerate(rows):
            slot = 0
            for document, index in enumerate(row):
                stop = slot + 1 + len(texts[index])
                tokens[place, slot + 1 : stop], documents[place, slot:stop] = texts[index], document
                ends.append((place, stop - 1))
                slot = stop
            documents[place, slot:] = len(row)  # the filling of the row is a separate document
        device = next(self._model.parameters()).device
        ids = torch.from_numpy(tokens).to(device)
        positions = torch.arange(length, device=device).expand_as(ids)
        context = RowContext(documents=torch.from_numpy(documents).to(device))
        values = self._model(ids, positions, None, packed_seq_params=context)
        row, token = torch.tensor(ends, device=device).unbind(1)
        found: list[float] = values[row, token].double().tolist()
        return found
