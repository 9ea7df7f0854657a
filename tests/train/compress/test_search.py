"""The search under a budget: Nano 2's, on paper, and the ranking of shapes."""

import functools
from dataclasses import asdict, replace

import numpy as np
import pytest
from test_recipe import composed

from launch.plan.cost.inference import inference_memory
from recipes.schema.compress import CompressConfig
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds, parameters
from recipes.schema.read import recipe_from_mapping
from train.compress.prune import Target
from train.compress.scores import Candidate, Removal, Scores
from train.compress.search import Shape, damage, feasible, ranked, shape_of, sizes, targets

CONTEXT = 131_072
NINE_B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
"""The published 9B's pattern (56 layers); checked against the shipped recipe below."""


@functools.cache
def model(name: str) -> ModelConfig:
    return recipe_from_mapping(composed("smoke", f"model={name}", "data.tokenizer.vocab_size=131072")).model


def test_memory_of_the_published_models_is_the_papers() -> None:
    """arXiv 2508.14444, section 4: 22.9 GiB of weights for the 12B; 19.66 GiB hold the 9B and 128k tokens, not the 12B."""
    nine, twelve = (
        inference_memory(model(name), context_tokens=CONTEXT)
        for name in ("nemotron_nano_9b_v2", "nemotron_nano_12b_v2")
    )
    assert round(nine.gib, 2) == 18.62 and round(twelve.gib, 1) == 26.0
    assert nine.gib <= 19.66 < twelve.gib
    assert round(twelve.weights / 2**30, 2) == 22.93
    assert nine.keys_values == 16 * 1024 * CONTEXT and twelve.keys_values == 24 * 1024 * CONTEXT
    assert nine.mamba_states == 27 * (128 * 80 * 128 + 12288 * 3) * 2


def test_a_window_bounds_the_key_value_cache() -> None:
    """Gemma 2 2B at 8,192 tokens: 13 layers see 4,096, 13 all; 2 x 4 heads x 256 x 2 bytes a token."""
    memory = inference_memory(model("gemma2_2b"), context_tokens=8192)
    assert memory.keys_values == (13 * 4096 + 13 * 8192) * 2 * 4 * 256 * 2 and memory.mamba_states == 0


def paper_layers(target: Target) -> list[int]:
    """56 layers: the published choice. Fewer: without the last M and - pairs before its last attention's block; only how
    many of each kind there are matters for the budget."""
    parent = layer_kinds(model("nemotron_nano_12b_v2").pattern)
    wanted = layer_kinds(NINE_B)
    counts = {kind: wanted.count(kind) for kind in ("M", "*", "-")}
    if target.layers == 62:
        return list(range(62))
    for kind in ("M", "-"):
        counts[kind] -= (56 - target.layers) // 2
    chosen = []
    for number, kind in enumerate(parent):
        if counts[kind]:
            counts[kind] -= 1
            chosen.append(number)
    return chosen


def test_the_papers_search_on_paper() -> None:
    """From the 12B with its space and budget: the 9B's shape is feasible and the 12B is not."""
    assert model("nemotron_nano_9b_v2").pattern.replace("|", "") == NINE_B
    twelve = model("nemotron_nano_12b_v2")
    config = CompressConfig(
        search_layers="52,54,56,62",
        search_hidden="4480:5120:128",
        search_ffn="13440:20480:320",
        search_mamba_heads="112:128:8",
        budget_gib=19.66,
        budget_context_tokens=CONTEXT,
    )
    tried = targets(config)
    assert len(tried) == 4 * 6 * 23 * 3
    shapes = feasible(twelve, tried, config, layers_of=paper_layers)
    found = [
        s
        for s in shapes
        if (s.target.layers, s.model.hidden, s.model.ffn, s.model.mamba_heads) == (56, 4480, 15680, 128)
    ]
    assert len(found) == 1 and round(found[0].gib, 2) == 18.62
    assert found[0].parameters == parameters(model("nemotron_nano_9b_v2")).total == 8_888_227_328
    assert not any(shape.model == twelve for shape in shapes)
    assert not shape_of(twelve, Target(), list(range(62)), config).fits(config)
    assert 0 < len(shapes) < len(tried) and all(shape.gib <= 19.66 for shape in shapes)
    assert [s.gib for s in shapes] == sorted((s.gib for s in shapes), reverse=True)


def test_all_three_limits_count() -> None:
    nine = model("nemotron_nano_9b_v2")

    def shape(budget: CompressConfig) -> Shape:
        return shape_of(nine, Target(), list(range(56)), budget)

    assert shape(CompressConfig()).fits(CompressConfig())
    for name, limit in (("parameters", 12_000_000_000), ("gib", 18.0), ("tokens_per_s", 1e6)):
        budget = replace(CompressConfig(), **{f"budget_{name}": limit})
        assert not shape(budget).fits(budget), name
    # An A10G reads the weights but the embedding's, and all caches, at most 600e9 / 19.8e9 = 31 times a second.
    assert 28 < shape(CompressConfig()).tokens_per_s < 34


def test_less_important_parts_are_given_up_first() -> None:
    small = ModelConfig(pattern="-*-M", hidden=4, vocab=8, ffn=4, heads=2, kv_heads=1, mamba_heads=2, mamba_groups=1,
                        mamba_head_dim=2)  # fmt: skip
    rounds = [Removal(2, [Candidate(2, 0.1, 0.0), Candidate(0, 0.5, 0.0)])]
    scores = Scores(
        model=asdict(small),
        parent="p",
        rows=1,
        hidden=np.array([9.0, 9.0, 1e-3, 1e-3]),
        layers={
            0: {"ffn": np.array([1.0, 1.0, 1.0, 1.0])},
            1: {"heads": np.ones(2)},
            2: {"ffn": np.array([1.0, 1.0, 1.0, 1.0])},
            3: {"mamba": np.ones((2, 2))},
        },
        influence=np.zeros(4),
        removals=rounds,
    )
    hidden, ffn, layer = Target(hidden=2), Target(ffn=2), Target(layers=3)
    assert damage(scores, Target()) == 0
    assert damage(scores, layer) == pytest.approx(0.1)
    assert damage(scores, hidden) < damage(scores, layer) < damage(scores, ffn)
    shapes = [
        shape_of(small, t, list(range(4)) if t is not layer else [0, 1, 3], CompressConfig())
        for t in (ffn, layer, hidden)
    ]
    assert [shape.target for _, shape in ranked(scores, shapes)] == [hidden, layer, ffn]


def test_sizes_to_try() -> None:
    assert sizes("", 7) == [7] and sizes("3,5", 7) == [3, 5] and sizes("4:10:3", 0) == [4, 7, 10]
    with pytest.raises(RecipeError, match="neither numbers"):
        sizes("4..8", 0)
