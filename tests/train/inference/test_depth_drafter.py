"""Speculation by the model's own further depths: guesses are those of a forward pass without caches, texts those without
speculation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, one_document_rows, recipe_with

from recipes.schema.recipe import Recipe
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.depth_drafter import DepthDrafter
from train.inference.drafters import Draft
from train.inference.request import Event, Request, Sampling
from train.model.head import head_logits, hidden_states
from train.record.stopwatch import Stopwatch
from train.step import train_step

THREE: dict[str, Any] = {
    "model.pattern": "M*-", "model.mtp.depths": 3, "model.mtp.pattern": "M*w-", "model.window_tokens": 6, "model.init_std": 0.1,
    "run.global_rows": 2,
}  # fmt: skip


def _guess(model: Any, text: list[int], most: int) -> list[int]:
    """The guesses after a text, without caches: the whole forward pass of each depth."""
    tokens = torch.tensor([text])
    positions = torch.arange(len(text))[None]
    hidden = hidden_states(model, tokens, positions, context=None)[: len(text) - 1]
    text = list(text)
    found: list[int] = []
    for depth in range(most):
        # Position i reads token i + depth + 1; the last ones are guesses.
        later = torch.tensor([[*text, *found][depth + 1 :]])
        hidden = model.depth(depth).further(hidden, model.embedding(later, positions[:, :-1]), context=None)
        found.append(int(head_logits(model, hidden[-1]).argmax(-1)))
    return found


class Checked(DepthDrafter):
    """Compares each draft with the pass without caches."""

    checked = 0

    def propose(self, asks: Any) -> list[Draft]:
        drafts = super().propose(asks)
        for ask, draft in zip(asks, drafts, strict=True):
            if draft.tokens:
                assert list(draft.tokens) == _guess(self._model, list(ask.tokens), len(draft.tokens))
                self.checked += 1
        return drafts


def _written(rank: int, recipe: Recipe) -> tuple[list[list[Event]], list[list[Event]], int, int, int]:
    """For `run_ranks`: texts without and with speculation; drafts compared, guesses, accepted ones."""
    torch.manual_seed(0)
    with engine_of(recipe, rank=rank, world=1) as built:
        rows = torch.arange(65).remainder(7).expand(2, 65) * 3
        batch = one_document_rows(rows[:1, :-1].contiguous(), rows[:1, 1:].contiguous())
        for step in range(5):
            train_step(built, [batch, batch], step=step, learning_rate=1e-2, watch=Stopwatch())
        model = built.chunks[0].module.eval()
        draw = torch.Generator().manual_seed(0)
        prompts = [torch.randint(0, 21, (length,), generator=draw).tolist() for length in (3, 30, 1, 17)]
        prompts[1] = rows[0, :30].tolist()
        samplings = [Sampling(0.0), Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.8, top_p=0.9, seed=5)]
        requests = [Request(p, 14, sampling=s) for p, s in zip(prompts, samplings, strict=True)]
        requests.append(Request(prompts[1], 6, sampling=Sampling(0.0)))  # its prompt is in the prefix cache
        config = EngineConfig(rows=2, context_tokens=48, step_tokens=16, page_tokens=4, prefix_blocks=4, block_tokens=8)
        plain = InferenceEngine(model, recipe.model, config).run(requests)
        drafter = Checked(model, recipe.model)
        with torch.no_grad():
            engine = InferenceEngine(model, recipe.model, replace(config, prefix_blocks=0), drafter=drafter)
            found = engine.run(requests)
            cached = InferenceEngine(model, recipe.model, config, drafter=DepthDrafter(model, recipe.model))
            for request in (requests[1], requests[4]):
                (again,) = cached.run([request])
                assert _ids(again) == _ids(found[1])[: request.max_new_tokens]
        stats = engine.stats()
        return plain, found, drafter.checked, stats.guessed_tokens, stats.accepted_tokens


def _ids(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token is not None]


@pytest.mark.parametrize("repeated", [False, True])
def test_guesses_are_those_without_caches_and_change_no_text(repeated: bool) -> None:
    recipe = recipe_with(**THREE, **{"model.mtp.repeated": repeated})
    ((plain, found, checked, guessed, accepted),) = run_ranks(1, _written, recipe)
    assert [_ids(events) for events in found] == [_ids(events) for events in plain]
    assert checked > 10
    assert guessed > accepted > 0
