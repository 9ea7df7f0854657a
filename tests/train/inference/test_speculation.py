"""Speculation changes no text: greedy and looked-up tokens are those without it, for right, wrong and mixed guesses, in random
batches; with a draft model, sampled tokens do not depend on how many are guessed, or on the batch. States are rolled back.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from chi_square import surprise
from ranks import run_ranks
from test_batch_engine import drive
from tiny import GEMMA, VOCAB, engine_of, recipe_with

from launch.plan.cost.inference import cache_bytes, cache_sizes, draft_sizes
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from train.inference import batch_engine
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.draft_model import DraftModel
from train.inference.drafters import Ask, Draft, Drafter, PromptLookup
from train.inference.request import Event, Request, Sampling, Thinking, Token
from train.inference.sampling import Draw, distribution
from train.model.backend import ReferenceBackend
from train.model.build import build_model

GREEDY = Sampling(temperature=0.0)
FAMILIES: dict[str, dict[str, Any]] = {"hybrid": {"model.init_std": 0.1}, "gemma": GEMMA}
CONTEXT = 80


def model_of(recipe: Recipe, mesh: Any, *, seed: int, shape: ModelConfig | None = None) -> Any:
    """Another model in the same process groups."""
    one = replace(recipe, run=replace(recipe.run, seed=seed), model=shape or recipe.model)
    torch.manual_seed(seed)
    (chunk,) = build_model(
        one.model, parallel=one.parallel, precision=one.precision, run=one.run, row_tokens=one.data.row_tokens, mesh=mesh,
        backend=ReferenceBackend(),
    )  # fmt: skip
    return chunk.eval()


class Oracle(PromptLookup):
    """Knows every text in advance. `wrong` turns its guesses into others, always or at random."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], wrong: float) -> None:
        super().__init__()
        self.texts, self.wrong, self.draw = texts, wrong, random.Random(1)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [Draft(self.guess(list(ask.tokens), ask.most)) for ask in asks]

    def guess(self, tokens: list[int], most: int) -> tuple[int, ...]:
        text = next((text for text in self.texts.values() if text[: len(tokens)] == tokens), tokens)
        true = text[len(tokens) : len(tokens) + most]
        return tuple((id + 1) % VOCAB if self.draw.random() < self.wrong else id for id in true)


class Threes(PromptLookup):
    """Always guesses that token 3 comes next."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [Draft((3,) * ask.most) for ask in asks]


def tokens_of(events: list[Event]) -> list[Token]:
    return [event.token for event in events if event.token is not None]


def requests_of(draw: random.Random, count: int, *, greedy: bool) -> list[Request]:
    """Prompts with repeats, shared beginnings, scores, thinking budgets and stop tokens."""
    shared = [draw.randrange(VOCAB) for _ in range(24)]
    found = []
    for _ in range(count):
        own = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))] * draw.randint(1, 3)
        prompt = shared[: draw.choice([0, 8, 16, 24])] + own
        warm = [Sampling(0.9, seed=draw.randrange(99)), Sampling(0.5, top_k=20, top_p=0.9, seed=draw.randrange(99))]
        thinking = Thinking(5, (prompt[-1],), (7, 8), frozenset(range(0, VOCAB, 9)), grace=4)
        found.append(
            Request(
                prompt, draw.randint(0, 25), sampling=draw.choice([GREEDY] if greedy else [GREEDY, *warm]),
                priority=draw.choice([0, 0, 1]), score_from=draw.choice([None, None, 1]), top_logprobs=draw.choice([0, 2]),
                stop=frozenset(draw.sample(range(VOCAB), 3)), thinking=draw.choice([None, None, thinking]),
            )
        )  # fmt: skip
    return found


def difference(found: list[Event], expected: list[Event]) -> float:
    """The largest difference of a reported log-probability; inf if tokens, marks or ends differ."""
    ours, theirs = tokens_of(found), tokens_of(expected)
    if [t.id for t in ours] != [t.id for t in theirs] or found[-1].finish != expected[-1].finish:
        return float("inf")
    if [t.is_forced for t in ours] != [t.is_forced for t in theirs]:
        return float("inf")
    ours += [token for event in found for token in event.scores]
    theirs += [token for event in expected for token in event.scores]
    pairs = [
        (a, b) for x, y in zip(ours, theirs, strict=True)
        for a, b in [(x.logprob, y.logprob), *zip([v for _, v in x.top], [v for _, v in y.top], strict=True)]
    ]  # fmt: skip
    return max((abs(a - b) for a, b in pairs), default=0.0)


def config_of(draw: random.Random) -> EngineConfig:
    return EngineConfig(
        rows=draw.randint(1, 5), context_tokens=CONTEXT, page_tokens=draw.choice([1, 2, 4, 8]),
        step_tokens=draw.choice([12, 20, 64]), prefix_blocks=draw.choice([0, 3, 8]), block_tokens=8,
        draft_tokens=draw.choice([1, 2, 5, 9]),
    )  # fmt: skip


def short_of_memory(make: Any, config: EngineConfig, draw: random.Random) -> InferenceEngine:
    """An engine, in most cases with too little memory for all rows."""
    engine: InferenceEngine = make(config)
    pools = engine.pools.bytes()
    if draw.random() < 0.7 and pools.keys_values:
        total = pools.total + (engine.drafter.bytes() if engine.drafter else 0)
        try:
            return make(replace(config, memory_bytes=int(total - 0.6 * pools.keys_values)))  # type: ignore[no-any-return]
        except RecipeError:
            pass
    return engine


def random_batches(rank: int, changes: dict[str, Any], seeds: range) -> dict[str, float]:
    seen = {
        "worst": 0.0,
        "preemptions": 0.0,
        "cached": 0.0,
        "accepted": 0.0,
        "rejected": 0.0,
        "leaked": 0.0,
        "forced": 0.0,
    }
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, shape = built.chunks[0].module.eval(), recipe.model
        noisy = model_of(recipe, built.mesh, seed=1)
        for ours, theirs in zip(noisy.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + 0.03 * theirs.std() * torch.randn_like(theirs))
        for seed in seeds:
            draw = random.Random(seed)
            for kind in ("right", "wrong", "mixed", "look-up", "itself", "noisy"):
                greedy = kind in ("itself", "noisy")
                requests = requests_of(draw, 6, greedy=greedy)
                alone = InferenceEngine(model, shape, EngineConfig(rows=1, context_tokens=CONTEXT))
                plain = [alone.run([request])[0] for request in requests]
                texts = {
                    (index,): [*request.prompt, *(t.id for t in tokens_of(events))]
                    for index, (request, events) in enumerate(zip(requests, plain, strict=True))
                }

                def drafter(kind: str = kind, texts: Any = texts) -> Drafter:
                    if kind in ("itself", "noisy"):
                        return DraftModel(model if kind == "itself" else noisy, shape)
                    wrong = {"right": 0.0, "wrong": 1.0, "mixed": 0.3}
                    return Oracle(texts, wrong[kind]) if kind in wrong else PromptLookup(shortest=1)

                engine = short_of_memory(
                    lambda config, drafter=drafter: InferenceEngine(model, shape, config, drafter=drafter()),
                    config_of(draw),
                    draw,
                )
                for index, events in drive(engine, requests, draw, cancelled=0.02).items():
                    if events[-1].finish == "cancelled":
                        continue
                    seen["worst"] = max(seen["worst"], difference(events, plain[index]))
                    seen["forced"] += sum(token.is_forced for token in tokens_of(events))
                stats = engine.stats()
                seen["preemptions"] += stats.preemptions
                seen["cached"] += stats.cached_tokens
                seen["accepted"] += stats.accepted_tokens
                seen["rejected"] += stats.guessed_tokens - stats.accepted_tokens
                if kind == "wrong":
                    assert stats.accepted_tokens == 0 and stats.tokens_per_step <= 1
                engine.prefixes.clear()
                seen["leaked"] += sum(group.pages.count - group.pages.free for group in engine.pools.groups.values())
                if isinstance(engine.drafter, DraftModel):
                    groups = engine.drafter.pools.groups.values()
                    seen["leaked"] += sum(group.pages.count - group.pages.free for group in groups)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_with_any_guesses_equal_texts_without(family: str) -> None:
    found = run_ranks(1, random_batches, FAMILIES[family], range(4, 5))[0]
    assert found["worst"] < 1e-5 and found["leaked"] == 0
    seen = ("preemptions", "cached", "accepted", "rejected", "forced")
    assert all(found[name] for name in seen), f"the case is to contain all of these: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_many_random_batches_with_any_guesses_equal_texts_without(family: str) -> None:
    found = run_ranks(1, random_batches, FAMILIES[family], range(10, 25), timeout_s=600)[0]
    assert found["worst"] < 1e-5 and found["leaked"] == 0


def without_rollback(rank: int) -> float:
    batch_engine.settle = lambda *_: None
    draw = random.Random(0)
    recipe = recipe_with(**FAMILIES["hybrid"])
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model = built.chunks[0].module.eval()
        (request,) = requests_of(draw, 1, greedy=True)
        request = replace(request, max_new_tokens=25, stop=frozenset(), thinking=None)
        plain = InferenceEngine(model, recipe.model).run([request])[0]
        text = [*request.prompt, *(token.id for token in tokens_of(plain))]
        engine = InferenceEngine(model, recipe.model, drafter=Oracle({(0,): text}, 0.3))
        return difference(engine.run([request])[0], plain)


def test_an_engine_without_rollback_is_noticed() -> None:
    assert run_ranks(1, without_rollback)[0] > 1e-3


def sampled(rank: int) -> dict[str, Any]:
    """Texts sampled with a draft model of another shape."""
    recipe = recipe_with(**FAMILIES["hybrid"])
    small = replace(recipe.model, pattern="M*w-", hidden=32, ffn=48, window_tokens=12)
    draw = random.Random(3)
    found: dict[str, Any] = {"unlike": 0, "texts": 0, "accepted": 0, "preemptions": 0}
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, shape = built.chunks[0].module.eval(), recipe.model
        draft = model_of(recipe, built.mesh, seed=2, shape=small)

        def make(config: EngineConfig) -> InferenceEngine:
            return InferenceEngine(model, shape, config, drafter=DraftModel(draft, small))

        for _ in range(2):
            requests = [
                replace(request, sampling=Sampling(0.9, top_k=draw.choice([0, 5]), seed=draw.randrange(99)))
                for request in requests_of(draw, 6, greedy=True)
            ]
            alone = [
                make(EngineConfig(rows=1, context_tokens=CONTEXT, draft_tokens=1)).run([one])[0] for one in requests
            ]
            engine = short_of_memory(make, config_of(draw), draw)
            for index, events in drive(engine, requests, draw, cancelled=0.02).items():
                if events[-1].finish != "cancelled":
                    found["texts"] += 1
                    found["unlike"] += difference(events, alone[index]) > 1e-5
            found["accepted"] += engine.stats().accepted_tokens
            found["preemptions"] += engine.stats().preemptions

        # A prefix that the prefix cache has and the draft model has not: it reads ahead, with little memory.
        shared = [draw.randrange(VOCAB) for _ in range(48)]
        requests = [
            Request([*shared, seed], 9, sampling=Sampling(0.9, seed=seed), priority=seed % 2) for seed in range(6)
        ]
        alone = [make(EngineConfig(rows=1, context_tokens=CONTEXT)).run([one])[0] for one in requests]
        config = EngineConfig(
            rows=4, context_tokens=CONTEXT, step_tokens=12, prefix_blocks=8, block_tokens=8, page_tokens=4
        )
        whole = make(config)
        enough = whole.pools.bytes().total + whole.drafter.bytes() - whole.pools.bytes().keys_values // 2  # type: ignore[union-attr]
        engine = make(replace(config, memory_bytes=enough))
        for index, events in drive(engine, requests, random.Random(3)).items():
            found["unlike"] += events[-1].finish != "cancelled" and difference(events, alone[index]) > 1e-5
        found["ahead"] = engine.stats().cached_tokens

        # Two tokens after one prompt, against the exact probabilities of the model itself.
        sampling = Sampling(0.7, top_k=3)
        config = EngineConfig(rows=64, context_tokens=16, draft_tokens=2)
        requests = [Request([5, 9, 11], 2, sampling=replace(sampling, seed=seed)) for seed in range(600)]
        pairs = [tuple(t.id for t in tokens_of(events)) for events in make(config).run(requests)]
        exact: dict[tuple[int, ...], float] = {}

        def after(text: list[int]) -> torch.Tensor:
            logits = model(torch.tensor([text]), torch.arange(len(text))[None], None)[0, -1:]
            return distribution(logits, [Draw(sampling, 0)])[0]

        for first, p in enumerate(after([5, 9, 11]).tolist()):
            if p:
                for second, p2 in enumerate(after([5, 9, 11, first]).tolist()):
                    if p2:
                        exact[first, second] = p * p2
        counts = torch.tensor([pairs.count(pair) for pair in exact], dtype=torch.float64)
        assert int(counts.sum()) == len(pairs), "a token that the model cannot give"
        found["surprise"] = surprise(counts, torch.tensor(list(exact.values()), dtype=torch.float64) * len(pairs))
    return found


def test_sampled_texts_depend_on_their_request_only_and_follow_the_model() -> None:
    found = run_ranks(1, sampled)[0]
    assert found["unlike"] == 0 and found["texts"] and found["accepted"] and found["preemptions"] and found["ahead"]
    assert found["surprise"] > 1e-3


def ledger(rank: int) -> dict[str, Any]:
    recipe = recipe_with(**FAMILIES["hybrid"])
    small = replace(recipe.model, pattern="M*w-", hidden=32, ffn=48, window_tokens=12)
    foreign = replace(small, vocab=128)
    config = EngineConfig(rows=3, context_tokens=64, draft_tokens=4, step_tokens=32)
    found: dict[str, Any] = {}
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, shape = built.chunks[0].module.eval(), recipe.model
        draft = model_of(recipe, built.mesh, seed=2, shape=small)
        for budget in (None, 420_000):
            engine = InferenceEngine(
                model, shape, replace(config, memory_bytes=budget), drafter=DraftModel(draft, small)
            )
            sizes = cache_sizes(
                shape, rows=3, context_tokens=64, page_tokens=16, step_tokens=32, number_bytes=4, budget_bytes=budget,
                trial_tokens=3 * 5, draft=small,
            )  # fmt: skip
            planned = cache_bytes(shape, sizes, number_bytes=4)
            planned_draft = cache_bytes(small, draft_sizes(small, sizes, step_tokens=32), number_bytes=4)
            assert engine.pools.bytes() == planned and planned.trial_inputs > 0
            assert engine.drafter is not None and engine.drafter.bytes() == planned_draft.total
            found["short" if budget else "whole"] = planned.total + planned_draft.total
        for name, drafter, changed in (
            ("foreign", DraftModel(draft, foreign), config), ("many", PromptLookup(), replace(config, draft_tokens=32))
        ):  # fmt: skip
            try:
                InferenceEngine(model, shape, changed, drafter=drafter)
            except RecipeError as error:
                found[name] = str(error)
        requests = [Request([1, 2, 1, 2, 1], 6, draft_tokens=n, sampling=GREEDY) for n in (None, 0)]
        engine = InferenceEngine(model, shape, config, drafter=Threes())
        found["guesses"] = [sum(event.guesses or 0 for event in engine.run([one])[0]) for one in requests]
    return found


def test_memory_equals_the_plan_and_requests_choose_their_guesses() -> None:
    found = run_ranks(1, ledger)[0]
    assert found["short"] <= 420_000 < found["whole"]
    assert "128 token ids" in found["foreign"] and "256" in found["foreign"] and "at most 31 guesses" in found["many"]
    assert found["guesses"][0] > 0 and found["guesses"][1] == 0


def test_look_up_finds_the_latest_longest_match() -> None:
    def guess(tokens: list[int], most: int = 4) -> tuple[int, ...]:
        return PromptLookup().propose([Ask(0, tokens, most, Draw(GREEDY, 0))])[0].tokens

    assert guess([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]) == (4, 9, 2, 3), "three tokens match at the start, two later"
    assert guess([2, 3, 4, 2, 3, 5, 8, 2, 3]) == (5, 8, 2, 3), "the latest of equals"
    assert guess([1, 2, 3]) == () and guess([7]) == () and guess([7, 7]) == ()
    assert guess([4, 5, 4, 5, 4, 5], 5) == (4, 5, 4, 5, 4), "a loop goes on"
    assert guess([256, 1, 9, 1, 256, 9, 256, 1], 2) == (9, 1), "numbers, not bytes"
    assert guess([0, 0, 5, 1 << 24, 0, 0], 1) == (5,)
