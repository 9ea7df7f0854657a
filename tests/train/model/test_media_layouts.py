"""A model with encoders trains the same at every layout, and its features arrive where their placeholders stand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from media_rows import AUDIO, VISION, media_recipe, media_rows
from ranks import run_ranks
from tiny import Numbers, engine_of, microbatches, steps_of

from recipes.schema.encoders import encoder_weights
from recipes.schema.parameter_groups import parameter_names
from recipes.schema.pattern import parameters
from recipes.schema.recipe import Recipe
from train.model.initial import global_names
from train.objective.next_token import local_rows

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"parallel.tensor": 2}),
    "DP2": (2, {}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2 CP2, sequence, recompute": (
        4,
        {"parallel.tensor": 2, "parallel.context": 2, "parallel.sequence": True, "parallel.recompute": "full"},
    ),
    "VP2 DP2, overlap": (
        4,
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.overlap_grad_reduce": True},
    ),
}


def train_media(rank: int, recipe: Recipe, world: int) -> Numbers:
    with engine_of(recipe, rank=rank, world=world) as engine:
        return steps_of(engine, recipe, range(3), rows=media_rows)


@pytest.fixture(scope="module")
def alone() -> Numbers:
    (numbers,) = run_ranks(1, train_media, media_recipe(), 1)
    return numbers


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same(name: str, alone: Numbers) -> None:
    world, changes = LAYOUTS[name]
    for numbers in run_ranks(world, train_media, media_recipe(**changes), world):
        assert numbers.losses == pytest.approx(alone.losses, rel=2e-6)
        assert numbers.grad_norms == pytest.approx(alone.grad_norms, rel=2e-6)


def look_inside(_rank: int, recipe: Recipe) -> None:
    """Checks in one process that the splice puts each feature at its place, and that names and sizes are those of the rules."""
    with engine_of(recipe, rank=0, world=1) as engine:
        (chunk,) = engine.chunks
        model = chunk.module
        weights = dict(global_names(model))
        assert sorted(weights) == sorted(parameter_names(recipe.model))
        for name, one in encoder_weights(VISION, AUDIO, recipe.model.hidden).items():
            assert tuple(weights[name].shape) == one.shape, name
            assert getattr(weights[name], "tensor_model_parallel", False) == one.split, name
        assert sum(one.numel() for one in weights.values()) == parameters(recipe.model).total
        batch = microbatches(recipe, engine.mesh, 0, rows=media_rows)[0]
        rows = local_rows(batch, engine.mesh, reset_at_documents=False)
        plain = model.embedding(rows.tokens, rows.positions)
        spliced = model.media.splice(plain, batch.media)
        changed = (spliced != plain).any(-1).t()
        expected = torch.zeros_like(changed)
        media = batch.media
        images = media.patches.split(media.grids.prod(1).tolist())
        for pixels, grid, row, slot in zip(images, media.grids, media.image_rows, media.image_slots, strict=True):
            one = model.media.vision_projector(model.media.vision(pixels, grid[None])[:, None])[:, 0]
            expected[row, slot : slot + len(one)] = True
            assert torch.allclose(spliced[slot : slot + len(one), row], one, rtol=1e-4, atol=1e-6)
        clips = media.mels.split(media.clip_frames.tolist())
        for mels, row, slot in zip(clips, media.clip_rows, media.clip_slots, strict=True):
            one = model.media.audio_projector(model.media.audio(mels, torch.tensor([len(mels)]))[:, None])[:, 0]
            assert len(one) == -(-len(mels) // AUDIO.stride)
            expected[row, slot : slot + len(one)] = True
            assert torch.allclose(spliced[slot : slot + len(one), row], one, rtol=1e-4, atol=1e-6)
        assert torch.equal(changed, expected) and expected.any()
        # Without media, the embeddings stay, and every weight of the encoders gets a gradient of zero.
        none = media.select([])
        assert torch.equal(model.media.splice(plain, none), plain)
        model.media.splice(plain, none).sum().backward()


def test_features_stand_where_their_placeholders_do() -> None:
    run_ranks(1, look_inside, media_recipe())


def without_vision(_rank: int, recipe: Recipe) -> str:
    with engine_of(recipe, rank=0, world=1) as engine:
        try:
            steps_of(engine, recipe, range(1), rows=media_rows)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_images_without_an_encoder_are_an_error() -> None:
    recipe = media_recipe(**{"model.vision": replace(VISION, layers=0)})
    (message,) = run_ranks(1, without_vision, recipe)
    assert message.startswith("DataError") and "model.vision.layers=0" in message
