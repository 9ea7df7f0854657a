"""Accepted guesses of further depths on held-out rows: those of float64 equations, of generation, and of every layout."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from depth_equations import logits_of_depths
from ranks import run_ranks
from tiny import engine_of, masked_rows, one_document_rows, recipe_with, rows_of

from data.batch import Batch
from recipes.schema.recipe import Recipe
from train.evaluate.depth_acceptance import depth_acceptance, metrics_of
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.depth_drafter import DepthDrafter
from train.inference.request import Request, Sampling
from train.model.initial import global_names
from train.record.stopwatch import Stopwatch
from train.step import train_step

SMALL: dict[str, Any] = {
    "model.vocab": 8, "model.init_std": 0.2, "model.mtp.depths": 2, "model.mtp.pattern": "*-", "data.reset_at_documents": True,
}  # fmt: skip
"""Of 8 tokens, so that untrained depths often guess as the model does."""
ROWS = 5
LAYOUTS = {
    "TP2 SP PP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
    "VPP2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "DP3": (3, {"run.global_rows": 3}),
}


class Rows:
    """Two sources, in the second of which some labels are not learned, and one without a position that counts."""

    source_names = ("text", "chat", "silent")
    manifest_hash = "hash"

    def heldout_count(self, name: str) -> int:
        return 1 if name == "silent" else ROWS

    def heldout_rows(self, name: str, first: int, count: int) -> Batch:
        assert name != "silent" or count == 1
        rows = (rows_of if name == "text" else masked_rows)(7, np.arange(first, first + count))
        return replace(rows, tokens=rows.tokens % 8, labels=rows.labels % 8)


Found = dict[str, tuple[int, dict[str, float]]]


def scored(rank: int, recipe: Recipe, world: int) -> Found:
    with engine_of(recipe, rank=rank, world=world) as engine:
        results = depth_acceptance(engine, Rows(), depths=recipe.model.mtp.depths, rows_per_source=9)
        assert all(chunk.training for chunk in engine.chunks)
        return {one.name: (one.items, {name: found.value for name, found in one.metrics.items()}) for one in results}


def expected(rank: int, recipe: Recipe) -> Found:
    """For `run_ranks`: the same from the paper's equations in float64, position by position."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        w = {name: p.detach().double() for name, p in global_names(engine.chunks[0].module)}
    found = {}
    for source in ("text", "chat"):
        batch = Rows().heldout_rows(source, 0, ROWS)
        assert batch.document_index is not None
        positions, accepted = 0, [0, 0]
        for row, (tokens, documents) in enumerate(zip(batch.tokens, batch.document_index, strict=True)):
            next_ids, *further = (
                logits.argmax(-1) for logits in logits_of_depths(w, recipe.model.mtp, tokens, documents)
            )
            for t in range(len(tokens) - 2):
                counts = [
                    documents[t + k] == documents[t] and (batch.learned is None or bool(batch.learned[row, t + k]))
                    for k in (1, 2)
                ]
                if all(counts):
                    agree = [bool(further[k - 1][t] == next_ids[t + k]) for k in (1, 2)]
                    positions += 1
                    accepted[0] += agree[0]
                    accepted[1] += all(agree)
        shares = {f"accepted_{k}": accepted[k - 1] / positions for k in (1, 2)}
        found[f"speculation/{source}"] = (positions, {**shares, "tokens_per_pass": 1 + sum(accepted) / positions})
    return found


def test_counts_are_those_of_the_equations_in_float64() -> None:
    recipe = recipe_with(**SMALL, **{"model.pattern": "*-"})
    ((found,), (reference,)) = run_ranks(1, scored, recipe, 1), run_ranks(1, expected, recipe)
    assert found.keys() == reference.keys(), "a source without a position that counts is left out"
    for source, (positions, metrics) in reference.items():
        assert found[source][0] == positions > 30
        assert found[source][1] == pytest.approx(metrics, rel=1e-12)
        assert 0 < metrics["accepted_2"] < metrics["accepted_1"] < 1


def test_a_layout_counts_as_one_process() -> None:
    hybrid = {**SMALL, "model.pattern": "M-*-", "model.mtp.pattern": "M*-"}
    (single,) = run_ranks(1, scored, recipe_with(**hybrid), 1)
    assert single["speculation/text"][1]["accepted_2"] > 0
    for name, (world, changes) in LAYOUTS.items():
        own = {"data.reset_at_documents": True, **changes}
        for found in run_ranks(world, scored, recipe_with(**{**hybrid, **own}), world):
            assert found == single, name


class Own:
    """A row that the model wrote; positions at which generation has no guesses of all depths do not count."""

    source_names = ("own",)
    manifest_hash = "hash"

    def __init__(self, ids: list[int], *, depths: int) -> None:
        batch = one_document_rows(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
        self._batch = replace(batch, learned=torch.arange(len(ids) - 1)[None] >= depths)

    def heldout_count(self, name: str) -> int:
        return 1

    def heldout_rows(self, name: str, first: int, count: int) -> Batch:
        return self._batch


def generated(rank: int, recipe: Recipe) -> tuple[list[list[int]], dict[str, float]]:
    """For `run_ranks`: on a text that the model wrote, from each position on, which guesses of the depths generation accepts at
    once (a list of 0 and 1 by depth); and the metrics of the text as held-out row."""
    depths = recipe.model.mtp.depths
    with engine_of(recipe, rank=rank, world=1) as built:
        rows = torch.arange(65).remainder(29)[None]
        for step in range(3):  # some of the guesses are then right
            batch = one_document_rows(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            train_step(built, [batch, batch], step=step, learning_rate=3e-3, watch=Stopwatch())
        model = built.chunks[0].module.eval()
        greedy = Sampling(0.0)
        # One text at a time, in whole passes: otherwise prompts of other texts take the place of guesses.
        config = EngineConfig(rows=1, context_tokens=80, step_tokens=80, page_tokens=4)
        with torch.no_grad():
            (events,) = InferenceEngine(model, recipe.model, config).run([Request([5], 64, sampling=greedy)])
            ids = [5, *(event.token.id for event in events if event.token is not None)]
            drafter = DepthDrafter(model, recipe.model)
            engine = InferenceEngine(model, recipe.model, config, drafter=drafter)
            prompts = [ids[: t + 1] for t in range(depths - 1, 64 - depths)]
            written = engine.run([Request(prompt, depths + 2, sampling=greedy) for prompt in prompts])
        accepted = []
        for events in written:
            # The first token comes with the prompt's pass; the guesses begin after it.
            flags = [event.token.is_guessed for event in events if event.token is not None][1 : depths + 1]
            accepted.append([int(all(flags[:k])) for k in range(1, depths + 1)])
        built.chunks[0].train()
        (result,) = depth_acceptance(built, Own(ids, depths=depths), depths=depths, rows_per_source=1)
        assert result.items == len(accepted)
        return accepted, {name: metric.value for name, metric in result.metrics.items()}


def test_generation_accepts_the_same_guesses_of_a_text_that_the_model_wrote() -> None:
    recipe = recipe_with(
        **{
            "model.pattern": "M*-", "model.mtp.depths": 3, "model.mtp.pattern": "M*w-", "model.window_tokens": 6,
            "model.init_std": 0.1, "run.global_rows": 2,
        }
    )  # fmt: skip
    ((accepted, metrics),) = run_ranks(1, generated, recipe)
    shares = np.mean(accepted, axis=0)
    assert 0 < shares[2] < shares[0] < 1, shares
    assert [metrics[f"accepted_{k}"] for k in (1, 2, 3)] == pytest.approx(shares.tolist(), rel=1e-12)
    assert metrics["tokens_per_pass"] == pytest.approx(1 + shares.sum(), rel=1e-12)


def test_metrics_by_hand() -> None:
    found = metrics_of(np.array([[10.0, 5.0, 1.0], [30.0, 15.0, 3.0]]))
    assert found["accepted_1"].value == 0.5 and found["accepted_2"].value == pytest.approx(0.1)
    assert found["tokens_per_pass"].value == pytest.approx(1.6)
    assert found["accepted_1"].low == pytest.approx(0.5), "rows with equal shares have no spread"
