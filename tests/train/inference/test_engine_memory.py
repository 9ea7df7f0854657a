"""The memory of the inference engine: equal to the plan to the byte, refused when too small, bounded for long texts; prefixes."""

import math
import re
import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import GEMMA, TINY, VOCAB, engine_of, recipe_with
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.plan.cost.inference import cache_bytes, cache_sizes, inference_memory, state_bytes
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import parameters
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.pools import Pools
from train.inference.request import Request, Sampling
from train.model import paged
from train.native import attention

GREEDY = Sampling(temperature=0.0)
GEMMA_MODEL = recipe_with(**GEMMA).model
CPU = torch.device("cpu")


def ids(count: int, *, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("model", [TINY, GEMMA_MODEL, replace(TINY, pattern="M-M-")], ids=["hybrid", "gemma", "mamba"])
@pytest.mark.parametrize(("dtype", "tensor"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_pools_have_the_planned_bytes(model: ModelConfig, dtype: torch.dtype, tensor: int) -> None:
    sizes = cache_sizes(
        model, rows=5, context_tokens=1000, page_tokens=16, step_tokens=64, snapshots=7, number_bytes=dtype.itemsize,
        tensor=tensor,
    )  # fmt: skip
    pools = Pools(model, sizes, dtype=dtype, device=CPU, tensor=tensor)
    assert pools.bytes() == cache_bytes(model, sizes, number_bytes=dtype.itemsize, tensor=tensor)


def weight_bytes_in_memory(rank: int, params: str, model: ModelConfig) -> int:
    recipe = recipe_with(**{"precision.params": params})
    with engine_of(replace(recipe, model=model), rank=rank, world=1) as built:
        return sum(
            tensor.nbytes for tensor in (*built.chunks[0].module.parameters(), *built.chunks[0].module.buffers())
        )


@pytest.mark.parametrize("model", [TINY, GEMMA_MODEL], ids=["hybrid", "gemma"])
@pytest.mark.parametrize(("params", "number_bytes"), [("fp32", 4), ("bf16", 2)])
def test_weights_have_the_planned_bytes(model: ModelConfig, params: str, number_bytes: int) -> None:
    """Of the hybrid's bf16 weights, A_log, D and dt_bias are fp32: 3 x 8 heads x 4 layers x 2 bytes more."""
    (found,) = run_ranks(1, weight_bytes_in_memory, params, model)
    assert found == inference_memory(model, context_tokens=1, weight_bytes=number_bytes).weights
    assert found == number_bytes * parameters(model).total + (
        3 * 8 * 4 * 2 if model is TINY and params == "bf16" else 0
    )


def test_planned_bytes_by_hand() -> None:
    """Gemma in small: 2 + 2 attention layers of 2 heads of 16 in fp32; a text of 40 tokens and a window of 20 tokens."""
    sizes = cache_sizes(GEMMA_MODEL, rows=3, context_tokens=40, page_tokens=4, step_tokens=8, number_bytes=4)
    assert (sizes.pages, sizes.window_pages) == (3 * 10, 3 * 8)  # (19 + 8) tokens are 7 pages, and one for the cut
    found = cache_bytes(GEMMA_MODEL, sizes, number_bytes=4)
    assert found.keys_values == 2 * 2 * 4 * 2 * 16 * 4 * (
        30 + 24
    )  # (keys, values) x layers x page x heads x width x bytes
    assert found.page_tables == 2 * 4 * 3 * 10 and found.mamba_states == 0
    assert state_bytes(TINY) == 4 * (8 * 16 * 16 + (8 * 16 + 2 * 2 * 16) * 3)


@pytest.mark.parametrize("model", [TINY, GEMMA_MODEL], ids=["hybrid", "gemma"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_budget_is_used_and_never_exceeded(model: ModelConfig, share: float) -> None:
    def sizes_of(context: int, budget: int | None) -> Any:
        return cache_sizes(
            model, rows=4, context_tokens=context, page_tokens=8, step_tokens=16, number_bytes=4, budget_bytes=budget
        )

    whole = cache_bytes(model, sizes_of(800, None), number_bytes=4).total
    budget = int(whole * share)
    try:
        assert cache_bytes(model, sizes_of(800, budget), number_bytes=4).total <= budget
    except RecipeError as error:
        longest = int(str(error).split("longest that fits has ")[1].split(" tokens")[0].replace(",", ""))
        assert cache_bytes(model, sizes_of(longest, budget), number_bytes=4).total <= budget
        with pytest.raises(RecipeError, match=f"has {longest} tokens"):
            sizes_of(longest + 1, budget)


def limits(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with engine_of(recipe_with(), rank=rank, world=1) as built, torch.no_grad():
        model, shape = built.chunks[0].module, built.chunks[0].module.config
        try:
            InferenceEngine(model, TINY, EngineConfig(rows=2, context_tokens=10**15))
        except RecipeError as error:
            found["beyond memory"] = str(error)
        engine = InferenceEngine(model, TINY, EngineConfig(rows=2, context_tokens=64))
        for name, request in {
            "long": Request(ids(60), 8), "empty": Request([], 8), "foreign": Request([3, VOCAB], 8),
            "score": Request([3, 4], 0, score_from=0),
        }.items():  # fmt: skip
            try:
                engine.add(request)
            except RecipeError as error:
                found[name] = str(error)
        assert engine.is_idle and shape is not None

        # One text's states become NaN: only that request fails, and the engine continues.
        first, second = (
            engine.add(Request(ids(9), 6, sampling=GREEDY)),
            engine.add(Request(ids(9, seed=1), 6, sampling=GREEDY)),
        )
        events = engine.step()
        row = next(text.row for text in engine._running if text.id == first)
        for pool in engine.pools.states.values():
            pool.scan[row] = torch.nan
        while not engine.is_idle:
            events += engine.step()
        found["finish"] = {event.request - first: (event.finish, event.message) for event in events if event.finish}
        again = InferenceEngine(model, TINY).run([Request(ids(9, seed=1), 6, sampling=GREEDY)])[0]
        pairs = zip(again, [event for event in events if event.request == second], strict=True)
        found["other"] = all(a.token == b.token for a, b in pairs)
        after = engine.run([Request(ids(9), 6, sampling=GREEDY)])[0]
        fresh = InferenceEngine(model, TINY).run([Request(ids(9), 6, sampling=GREEDY)])[0]
        found["after"] = [event.token for event in after] == [event.token for event in fresh]
    return found


def test_invalid_requests_are_refused_and_nan_ends_one_request_only() -> None:
    found = run_ranks(1, limits)[0]
    assert "at most 64" in found["long"] and "at most 4 new tokens" in found["long"]
    assert "no tokens" in found["empty"] and str(VOCAB) in found["foreign"] and "score_from=0" in found["score"]
    assert "a text of 1,000,000,000,000,000 tokens needs" in found["beyond memory"]
    assert re.search(r"available\. The longest that fits has [\d,]+ tokens\.", found["beyond memory"])
    assert found["finish"][0][0] == "error" and "not finite" in found["finish"][0][1]
    assert found["finish"][1][0] == "length" and found["other"] and found["after"]


SMALL = {"model.pattern": "M*-M", "model.init_std": 0.1}


def shared_prefix(rank: int, tokens: int, texts: int) -> tuple[float, int, float]:
    """-> (hit rate, texts whose tokens differ from those without a cache, largest difference of a log-probability)"""
    recipe = recipe_with(**SMALL)
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, prefix = built.chunks[0].module, ids(tokens)
        requests = [Request(prefix + ids(20, seed=seed), 4, sampling=GREEDY) for seed in range(1, texts + 1)]
        config = EngineConfig(
            rows=4, context_tokens=tokens + 32, step_tokens=1024, block_tokens=256, prefix_blocks=tokens // 256
        )
        cached = InferenceEngine(model, recipe.model, config)
        found = [cached.run([request])[0] for request in requests[:1]] + cached.run(requests[1:])
        different, worst = 0, 0.0
        for request, events in list(zip(requests, found, strict=True))[-2:]:
            plain = InferenceEngine(model, recipe.model, replace(config, prefix_blocks=0)).run([request])[0]
            pairs = [(a.token, b.token) for a, b in zip(events, plain, strict=True)]
            different += [a.id for a, _ in pairs if a] != [b.id for _, b in pairs if b]
            worst = max([worst, *(abs(a.logprob - b.logprob) for a, b in pairs if a and b)])
        assert cached.pools.bytes() == cache_bytes(recipe.model, cached.sizes, number_bytes=4)
        return cached.stats().hit_rate, different, worst


def test_a_shared_prefix_of_4096_tokens_is_read_once() -> None:
    """A public engine reports 0 hits of 6,211 requests on a hybrid."""
    hit_rate, different, worst = run_ranks(1, shared_prefix, 4096, 24)[0]
    assert hit_rate > 0.9 and different == 0 and worst < 1e-5


def together(rank: int) -> dict[str, Any]:
    """Texts that arrive in one step: the same prompt, the same beginning, and another one."""
    recipe = recipe_with(**SMALL)
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, prefix = built.chunks[0].module, ids(64)
        prompts = [prefix, prefix, prefix + ids(9), prefix[:32] + ids(20, seed=3), ids(40, seed=4)]
        requests = [Request(prompt, 5, sampling=GREEDY) for prompt in prompts]
        config = EngineConfig(
            rows=5, context_tokens=96, step_tokens=48, block_tokens=16, page_tokens=8, prefix_blocks=20
        )
        engine = InferenceEngine(model, recipe.model, config)
        found = engine.run(requests)
        alone = InferenceEngine(model, recipe.model, replace(config, prefix_blocks=0))
        plain = [alone.run([request])[0] for request in requests]
        tokens = [[[event.token.id for event in events if event.token] for events in texts] for texts in (found, plain)]
        tight = InferenceEngine(model, recipe.model, replace(config, prefix_blocks=1, rows=2))
        tokens.append([[event.token.id for event in events if event.token] for events in tight.run(requests)])
        return {"equal": tokens[0] == tokens[1] == tokens[2], "cached": engine.stats().cached_tokens}


def test_prompts_that_arrive_together_share_what_they_begin_with() -> None:
    # All 64 tokens of the second, which has the prompt of the first, all 64 of the third's, 32 of the fourth's.
    assert run_ranks(1, together)[0] == {"equal": True, "cached": 64 + 64 + 32}


def padding(rank: int) -> list[Any]:
    recipe = recipe_with(**{"model.vocab": 256, "model.vocab_padding": 6})
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        engine = InferenceEngine(built.chunks[0].module, recipe.model)
        request = Request([3, 4], 2, top_logprobs=1000, score_from=1)
        return [token.top for event in engine.run([request])[0] for token in (*event.scores, event.token) if token]


def test_the_padding_of_the_vocabulary_is_never_listed() -> None:
    for top in run_ranks(1, padding)[0]:
        assert sorted(id for id, _ in top) == list(range(250)) and all(math.isfinite(value) for _, value in top)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def long_text(rank: int, tokens: int) -> tuple[float, int, int]:
    """-> (largest difference of the last log-probabilities from the whole forward pass's, growth of memory in bytes, bytes of the
    keys and values of its one attention layer)"""
    recipe = recipe_with(**SMALL)
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, text = built.chunks[0].module.eval(), ids(tokens)
        config = EngineConfig(rows=1, context_tokens=tokens + 1, step_tokens=512, page_tokens=64)
        engine = InferenceEngine(model, recipe.model, config)
        engine.add(Request(text, 1, sampling=GREEDY, top_logprobs=VOCAB))
        pools, before = engine.pools.bytes(), peak_bytes()
        events = []
        while not engine.is_idle:
            events += engine.step()
        growth = peak_bytes() - before
        assert engine.pools.bytes() == pools
        assert events[-1].token is not None
        last = torch.tensor([[logprob for _, logprob in sorted(events[-1].token.top)]])
        tokens_BS = torch.tensor([text])
        hidden = model.decoder(
            hidden_states=model.embedding(tokens_BS, torch.arange(tokens)[None]), attention_mask=None, inference_context=None,
        )  # fmt: skip
        whole = torch.log_softmax(model.output_layer(hidden[-1:])[0][0], -1)
        return float((last - whole).abs().max()), growth, pools.keys_values


PART = 32 << 20
"""Limit of the memory that a part of 512 tokens needs by itself, of a model of hidden size 64."""


def test_a_long_text_is_read_in_parts_of_bounded_memory() -> None:
    error, growth, keys_values = run_ranks(1, long_text, 4096)[0]
    assert error < 1e-5 and growth < keys_values + PART  # pages are touched for the first time


@pytest.mark.slow
def test_131072_tokens_are_read_in_parts_of_bounded_memory() -> None:
    error, growth, keys_values = run_ranks(1, long_text, 131_072, timeout_s=900)[0]
    assert error < 1e-5 and growth < keys_values + PART


class NewTensors(TorchDispatchMode):
    """Bytes of the largest tensor that an operation of torch has made, other than views."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, x.nbytes)
        return out


def largest_tensors(rank: int, changes: dict[str, Any]) -> list[int]:
    """The largest tensor of a part of 96 tokens after 96 and after 1,920 others, next to a text that generates."""
    recipe, found = recipe_with(**changes), []
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        for tokens in (192, 2016):
            config = EngineConfig(rows=2, context_tokens=2100, step_tokens=97, page_tokens=8)
            engine = InferenceEngine(built.chunks[0].module, recipe.model, config)
            engine.add(Request(ids(tokens), 80, sampling=GREEDY))
            while not engine.stats().generated_tokens:
                engine.step()
            engine.add(Request(ids(tokens), 1, sampling=GREEDY))
            for _ in range(tokens // 96 - 1):
                engine.step()
            with NewTensors() as seen:
                engine.step()
            assert seen.largest > 0
            found.append(seen.largest)
    return found


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("changes", [{}, GEMMA], ids=["hybrid", "gemma"])
def test_a_part_of_a_long_text_copies_no_more_than_one_of_a_short_text(
    changes: dict[str, Any], is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "BLOCK_TOKENS", 128)
    if not is_compiled:
        monkeypatch.setattr(attention, "attention_usable", lambda *_: False)
    short, long = run_ranks(1, largest_tensors, changes)[0]
    assert short == long


def test_a_model_of_mamba_layers_alone_needs_the_same_memory_at_any_length() -> None:
    model = replace(TINY, pattern="M-M-")
    short, long = (
        cache_bytes(
            model,
            cache_sizes(model, rows=2, context_tokens=n, page_tokens=16, step_tokens=64, number_bytes=4),
            number_bytes=4,
        )
        for n in (1024, 131_072)
    )
    assert short == long and short.keys_values == 0
