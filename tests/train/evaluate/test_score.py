"""Scores of continuations: equal to transformers' on the exported model, for any batch size, packing and layout."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, exported, recipe_of, scrambled, trained
from ranks import run_ranks

from recipes.schema.errors import DataError
from recipes.schema.layout import Layout
from recipes.schema.recipe import Recipe
from train.build import build_engine, check, mesh_of, model_on_ranks
from train.evaluate.deal import deal
from train.evaluate.decoder import BatchedDecoder
from train.evaluate.score import (
    Request,
    Score,
    fitted,
    forward_of_engine,
    forward_of_model,
    pack,
    rolling_requests,
    scores,
)
from train.hf.check import load_theirs

CPU = torch.device("cpu")


def random_requests(count: int = 24, *, vocab: int = 256, seed: int = 0, longest: int = 40) -> list[Request]:
    """Contexts and targets of all lengths, those of one token among them."""
    rng = np.random.default_rng(seed)
    lengths = [(1, 1), (1, 5), (9, 1), *((int(a), int(b)) for a, b in rng.integers(1, longest // 2, (count - 3, 2)))]
    return [
        Request(tuple(map(int, rng.integers(0, vocab, a))), tuple(map(int, rng.integers(0, vocab, b))))
        for a, b in lengths
    ]


def by_definition(log_p_SV: torch.Tensor, request: Request) -> Score:
    """log p(target | context) from the log-probabilities after each token of context + target: the first token of the
    target is predicted by the last of the context, the last one by the last but one of the sequence."""
    total, greedy = 0.0, True
    for offset, token in enumerate(request.target):
        after = log_p_SV[len(request.context) - 1 + offset]
        total += float(after[token])
        greedy &= int(after.argmax()) == token
    return Score(total, greedy)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scored")
    return {
        name: scrambled(trained(folder / name, recipe_of(model), world=1), folder / f"{name}_scrambled")
        for name, model in FAMILIES.items()
    }


def on_one_rank(
    rank: int, recipe: Recipe, path: Path, requests: list[Request], row_tokens: int, batch_rows: list[int]
) -> list[list[Score]]:
    torch.set_num_threads(1)
    with model_on_ranks(recipe, path, device=CPU, rank=0, world=1) as (model, mesh):
        return [
            scores(forward_of_model(model, row_tokens=row_tokens, microbatch_rows=size, mesh=mesh), requests)
            for size in batch_rows
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_on_the_export(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Also the last token: of a target that is greedy to the end, one that differs in the last token only is not."""
    model = FAMILIES[family]
    theirs = load_theirs(exported(checkpoints[family], tmp_path / "hf", model), dtype=torch.float32, device=CPU)

    def log_p(tokens: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return theirs(torch.tensor([tokens])).logits[0].double().log_softmax(-1)

    requests = random_requests()
    context = requests[5].context
    greedy: tuple[int, ...] = ()
    for _ in range(4):
        greedy += (int(log_p(context + greedy)[-1].argmax()),)
    other = (greedy[-1] + 1) % model.vocab
    for target in (greedy, (*greedy[:-1], other), ((greedy[0] + 1) % model.vocab, *greedy[1:])):
        requests.append(Request(context, target))
    wanted = [by_definition(log_p(r.context + r.target), r) for r in requests]
    assert [score.is_greedy for score in wanted[-3:]] == [True, False, False]

    ((found,),) = run_ranks(1, on_one_rank, recipe_of(model), checkpoints[family], requests, 64, [4])
    assert [score.is_greedy for score in found] == [score.is_greedy for score in wanted]
    for ours, right, request in zip(found, wanted, requests, strict=True):
        assert abs(ours.log_probability - right.log_probability) < 1e-5 * len(request.target)


def by_decoder(rank: int, recipe: Recipe, path: Path, requests: list[Request]) -> list[Score]:
    torch.set_num_threads(1)
    with model_on_ranks(recipe, path, device=CPU, rank=0, world=1) as (model, mesh):
        return BatchedDecoder(model, recipe.model, tokenizer=None, mesh=mesh).scores(requests)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_long_contexts_are_scored_in_parts_with_the_same_result(family: str, checkpoints: dict[str, Path]) -> None:
    """The decoder's scores from caches against one forward pass; one context has several parts and pages."""
    recipe = recipe_of(FAMILIES[family])
    requests = [*random_requests(12), *random_requests(4, seed=5, longest=1500)]
    (found,) = run_ranks(1, by_decoder, recipe, checkpoints[family], requests)
    ((wanted,),) = run_ranks(1, on_one_rank, recipe, checkpoints[family], requests, 1500, [2])
    for one, right, request in zip(found, wanted, requests, strict=True):
        assert abs(one.log_probability - right.log_probability) < 1e-5 * len(request.target)
        assert one.is_greedy == right.is_greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_size_and_any_order_give_the_same_score(family: str, checkpoints: dict[str, Path]) -> None:
    requests, recipe = random_requests(), recipe_of(FAMILIES[family])
    sizes = [1, 2, 3, 8, 64]
    (together,) = run_ranks(1, on_one_rank, recipe, checkpoints[family], requests, 96, sizes)
    (reversed_,) = run_ranks(1, on_one_rank, recipe, checkpoints[family], requests[::-1], 80, [5])
    alone = run_ranks(1, on_one_rank, recipe, checkpoints[family], requests, 40, [1])[0][0]
    for found in (*together, reversed_[0][::-1], alone):
        for one, other, request in zip(found, together[0], requests, strict=True):
            assert abs(one.log_probability - other.log_probability) <= 1e-6 * len(request.target)
            assert one.is_greedy == other.is_greedy


def at_layout(rank: int, recipe: Recipe, world: int, path: Path, requests: list[Request]) -> list[Score]:
    torch.set_num_threads(1)
    with mesh_of(recipe, check(recipe, world=world), device=CPU, rank=rank) as mesh:
        return scores(forward_of_engine(build_engine(recipe, mesh, weights=path)), requests)


@pytest.mark.parametrize(
    ("layout", "microbatch_rows", "apart"),
    [
        ({"tensor": 2, "pipeline": 2, "sequence": True}, 2, True),
        ({"context": 2}, 1, False),
        ({"pipeline": 2, "virtual_pipeline": 2}, 2, True),
    ],
    ids=["tensor_pipeline", "context_data", "virtual_data"],
)
def test_every_layout_gives_the_scores_of_one_process(
    layout: dict[str, object], microbatch_rows: int, apart: bool, tmp_path: Path
) -> None:
    """Also if documents are not separated, so that each request has a separate row, and with more rows than requests."""
    recipe = recipe_of(replace(FAMILIES["nemotron_h"], heads=4, kv_heads=2), **layout)
    recipe = replace(
        recipe,
        data=replace(recipe.data, reset_at_documents=apart),
        run=replace(recipe.run, microbatch_rows=microbatch_rows, global_rows=8),
    )
    alone = replace(recipe, parallel=recipe_of(recipe.model).parallel)
    path = scrambled(trained(tmp_path / "run", alone, world=1), tmp_path / "moved")
    requests = random_requests(7, longest=30)
    ((wanted,),) = run_ranks(1, on_one_rank, alone, path, requests, 64, [3])
    for found in run_ranks(4, at_layout, recipe, 4, path, requests):
        for one, right, request in zip(found, wanted, requests, strict=True):
            assert abs(one.log_probability - right.log_probability) < 1e-5 * len(request.target)
            assert one.is_greedy == right.is_greedy


def test_rolling_windows_are_those_of_the_harness() -> None:
    """The example in lm-evaluation-harness's documentation of `loglikelihood_rolling`: 10 tokens, rows of 4."""
    windows = list(rolling_requests(range(10), prefix=99, row_tokens=4))
    assert [(w.context, w.target) for w in windows] == [
        ((99,), (0, 1, 2, 3)),
        ((3,), (4, 5, 6, 7)),
        ((5, 6, 7), (8, 9)),
    ]
    for count in range(12):
        parts = [token for w in rolling_requests(range(count), prefix=99, row_tokens=4) for token in w.target]
        assert parts == list(range(count))
        assert all(len(w.context + w.target) - 1 <= 4 for w in rolling_requests(range(count), prefix=99, row_tokens=4))


def test_long_contexts_lose_their_beginning_and_long_targets_are_refused() -> None:
    assert fitted(Request((1, 2, 3, 4), (5, 6)), 4) == Request((2, 3, 4), (5, 6))
    assert fitted(Request((1, 2), (5, 6)), 4) == Request((1, 2), (5, 6))
    with pytest.raises(DataError, match=r"a text of 1 \+ 5 tokens does not fit into a row of 4\. Shorten it"):
        pack([fitted(Request((1, 2), (1, 2, 3, 4, 5)), 4)], row_tokens=4, is_shared=True)


def test_packing_places_every_request_once_and_no_row_overflows() -> None:
    requests = random_requests(200, seed=3)
    rows = pack(requests, row_tokens=64, is_shared=True)
    sizes = [len(r.context) + len(r.target) - 1 for r in requests]
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(sizes[i] for i in row) <= 64 for row in rows) and len(rows) <= -(-sum(sizes) // 64) * 1.1
    assert all(len(row) == 1 for row in pack(requests, row_tokens=64, is_shared=False))


def test_every_row_is_dealt_once_and_all_ranks_have_equally_many() -> None:
    layout = Layout(world=6, tensor=1, pipeline=2, virtual=2, context=1, data=3, microbatches_per_step=1)
    for count in range(1, 20):
        meshes: list[Any] = [SimpleNamespace(layout=layout, data_rank=rank) for rank in range(3)]
        dealt = [deal(count, mesh, microbatch_rows=2) for mesh in meshes]
        assert len({len(parts) for parts in dealt}) == 1 and len(dealt[0]) % 2 == 0
        rows = [row for parts in dealt for part in parts for row, counts in part if counts]
        assert sorted(rows) == list(range(count))
