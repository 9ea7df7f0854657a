"""A padded vocabulary: loss, logits, gradients and training of the model without padding, on one rank and split over two."""

import pytest
import torch
from ranks import run_ranks
from tiny import VOCAB, Numbers, engine_of, microbatches, recipe_with, steps_of
from train.inference.decode import Sampling, generate

from recipes.schema.errors import RecipeError
from recipes.schema.recipe import Recipe
from train.build import check

PADDING = 8
PADDED = {"model.vocab": VOCAB + PADDING, "model.vocab_padding": PADDING}
CAPPED = {"model.logit_softcap": 3.0, "model.tie_embeddings": True, "model.init_std": 0.1}


def trained(rank: int, recipe: Recipe, world: int) -> tuple[Numbers, torch.Tensor, dict[str, torch.Tensor]]:
    """(numbers of two steps, logits of the first row of this rank's slice before them, rows of its embedding and head after)."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        chunk = engine.chunks[0].module
        rows = [parameter for name, parameter in chunk.named_parameters() if name.endswith(ROWS)]
        if recipe.model.vocab_padding and rank == world - 1:
            with torch.no_grad():  # large rows: in the softmax they would change everything
                for parameter in rows:
                    parameter[-PADDING:] = 2.0
        # The optimizer has copies of the weights.
        engine.optimizer.reload_model_params()
        batch = microbatches(recipe, engine.mesh, 0)[0]
        with torch.no_grad():
            logits = chunk(batch.tokens, torch.arange(batch.tokens.shape[1])[None], None)[0]
        numbers = steps_of(engine, recipe, range(2))
        return (
            numbers,
            logits,
            {name: p.detach().clone() for name, p in chunk.named_parameters() if name.endswith(ROWS)},
        )


ROWS = ("word_embeddings.weight", "output_layer.weight")


@pytest.mark.parametrize("changes", [{}, CAPPED], ids=["plain", "tied and capped"])
def test_training_and_logits_are_those_without_padding(changes: dict[str, object]) -> None:
    """Nothing but rounding differs, and rows of padding get no gradient: without weight decay they stay as they were."""
    changes = changes | {"optim.weight_decay": 0.0}
    ((numbers, logits, rows),) = run_ranks(1, trained, recipe_with(**changes), 1)
    for world in (1, 2):
        ranks = run_ranks(world, trained, recipe_with(**changes, **PADDED, **{"parallel.tensor": world}), world)
        for mine, _, _ in ranks:
            assert mine.losses == pytest.approx(numbers.losses, rel=2e-6)
            assert mine.grad_norms == pytest.approx(numbers.grad_norms, rel=2e-6)
        whole = torch.cat([rank[1] for rank in ranks], dim=-1)
        torch.testing.assert_close(whole[..., :VOCAB], logits, rtol=1e-5, atol=1e-5)
        assert (whole[..., VOCAB:] == -torch.inf).all()
        for name, expected in rows.items():
            after = torch.cat([rank[2][name] for rank in ranks])
            torch.testing.assert_close(after[:VOCAB], expected, rtol=0, atol=2e-4)  # Adam: lr 1e-3 amplifies rounding
            assert (after[VOCAB:] == 2.0).all()


def generated(rank: int, changes: dict[str, object]) -> list[int]:
    """Ids that a model gives whose padding has the largest logits by far."""
    with engine_of(recipe_with(**changes, **PADDED), rank=rank, world=1) as engine, torch.no_grad():
        model = engine.chunks[0].module
        model.output_layer.weight[-PADDING : -PADDING // 2] = 50.0
        model.output_layer.weight[-PADDING // 2 :] = -50.0
        ways = (
            Sampling(temperature=0.0),
            Sampling(temperature=5.0),
            Sampling(temperature=5.0, top_k=VOCAB + PADDING, top_p=0.999),
        )
        return [token for way in ways for token in generate(model, [1, 2, 3], tokens=12, sampling=way)]


@pytest.mark.parametrize("changes", [{}, {"model.logit_softcap": 3.0}], ids=["plain", "capped"])
def test_padding_is_never_generated(changes: dict[str, object]) -> None:
    (ids,) = run_ranks(1, generated, changes)
    assert len(ids) == 36 and max(ids) < VOCAB


@pytest.mark.parametrize(
    ("tensor", "padding", "fits"), [(1, VOCAB - 1, True), (1, VOCAB, False), (2, 127, True), (2, 128, False)]
)
def test_padding_leaves_every_rank_a_token(tensor: int, padding: int, fits: bool) -> None:
    recipe = recipe_with(**{"parallel.tensor": tensor, "model.vocab_padding": padding})
    if fits:
        check(recipe, world=tensor)
        return
    with pytest.raises(
        RecipeError, match=f"model.vocab_padding={padding} leaves no token .* Use at most {VOCAB // tensor - 1}"
    ):
        check(recipe, world=tensor)
