"""The teacher: its ranks, the students it refuses, its number formats, and that it has no gradients."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import RankFailed, run_ranks
from teachers import TOKENIZER, distill_tiny, save_teacher, student_of
from tiny import RECIPE, engine_of, recipe_with

from recipes.schema.errors import CheckpointError, RecipeError, refuse
from recipes.schema.facts import named
from recipes.schema.layout import lay_out
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_placement import TeacherPlacement, placement_of
from recipes.schema.teacher_rules import teacher_problems
from train.checkpoint.manager import checkpoint_at


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
    ("tensor", "context", "data", "pipeline"), [(2, 1, 2, 2), (1, 1, 8, 1), (2, 2, 1, 2), (4, 1, 2, 1)]
)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_places_share_rows_out(tensor: int, context: int, data: int, pipeline: int, degree: int) -> None:
    world = tensor * context * data * pipeline
    recipe = recipe_with(**{
        "parallel.tensor": tensor, "parallel.context": context, "parallel.pipeline": pipeline, "run.global_rows": 8,
        "model.kv_heads": 4, "model.mamba_groups": 4, "model.mamba_heads": 8,
    })  # fmt: skip
    layout = lay_out(model=recipe.model, parallel=recipe.parallel, run=recipe.run, row_tokens=64, world=world)
    found = [placement_of(layout, rank, tensor=degree) for rank in range(world)]
    first = world - world // pipeline
    assert all(place is None for place in found[:first])
    places: list[TeacherPlacement] = [place for place in found[first:] if place is not None]
    for place in places:
        assert (
            place.index in place.teacher_group and place.index in place.replicas and place.index in place.exchange_group
        )
        assert len(place.teacher_group) == degree and len(place.exchange_group) == place.teachers
        rows = place.index // place.sharing
        assert {other // place.sharing for other in place.exchange_group} == {rows}
        # Members of the exchange group belong to different teachers, which together read all rows of the set.
        assert len({other // degree for other in place.exchange_group}) == place.teachers
        assert place.row_sets * place.sharing == max(degree, place.sharing)
    for a, b in itertools.combinations(places, 2):
        assert (a.teacher_group == b.teacher_group) == (b.index in a.teacher_group)


def test_degrees_that_do_not_fit_are_named() -> None:
    layout = lay_out(model=RECIPE.model, parallel=RECIPE.parallel, run=replace(RECIPE.run, global_rows=12), row_tokens=64,
                     world=6)  # fmt: skip
    with pytest.raises(RecipeError, match=r"objective.teacher_tensor=4: .* Use 1, 2, 3, 6"):
        placement_of(layout, 0, tensor=4)


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused_with_the_reason(teacher: Path) -> None:
    _path, manifest = checkpoint_at(teacher)
    student = student_of(teacher)

    def ask(tokenizer: str | None = TOKENIZER, student: Recipe = student) -> None:
        refuse(teacher_problems(student, named(str(teacher)), tokenizer=tokenizer))

    ask()
    with pytest.raises(RecipeError, match=r"vocabulary of 256, the student .model.vocab. one of 512"):
        ask(student=replace(student, model=replace(student.model, vocab=512)))
    with pytest.raises(RecipeError, match=r"trained with another tokenizer .0123456789ab. than that of "):
        ask(tokenizer="fedcba")
    careful = replace(student, objective=replace(student.objective, trust_tokenizer=False))
    ask(student=careful)
    with pytest.raises(RecipeError, match=r"does not say which tokenizer.*objective.trust_tokenizer=true"):
        nameless = replace(named(str(teacher)), manifest=replace(manifest, tokenizer=""))
        refuse(teacher_problems(careful, nameless, tokenizer="fedcba"))
    with pytest.raises(RecipeError, match=r"another tokenizer"):
        ask(tokenizer="fedcba", student=student)  # trusted, but the recorded tokenizer differs
    with pytest.raises(CheckpointError, match=r"is neither a checkpoint"):
        checkpoint_at(teacher / "nothing")
    with pytest.raises(RankFailed, match=r"needs objective.teacher"):
        run_ranks(1, distill_tiny, recipe_with(**{"objective.kind": "distill"}), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.teacher_tensor": 3}, "objective.teacher_tensor=3"),
        ({"objective.hidden_match": "mse", "model.hidden": 32}, "hidden states of width 32"),
        ({"objective.hidden_match": "mse", "objective.hidden_layers": "3:99"}, "3:99 does not exist"),
        ({"objective.hidden_match": "mse", "objective.hidden_layers": "x"}, "neither `final` nor pairs"),
        (
            {"objective.hidden_match": "mse", "objective.hidden_layers": "3:5", "parallel.recompute": "full"},
            "discards",
        ),
        ({"objective.top_k": 257}, "objective.top_k=257 is more than the vocabulary, model.vocab=256"),
        ({"objective.distill_weight": 0.0}, "leaves nothing to learn from the teacher"),
        (
            {"objective.hidden_layers": "3:5"},
            "objective.hidden_layers=3:5 does nothing while objective.hidden_match=none",
        ),
        ({"objective.hidden_weight": 0.5}, "set hidden_weight to null"),
    ],
)
def test_unsupported_settings_are_refused_with_the_reason(changes: dict[str, Any], message: str, teacher: Path) -> None:
    with pytest.raises(RankFailed, match=message):
        run_ranks(1, distill_tiny, student_of(teacher, **changes), 1)


def test_layers_of_earlier_stages_cannot_be_matched(teacher: Path) -> None:
    recipe = student_of(teacher, **{
        "objective.hidden_match": "cosine", "objective.hidden_layers": "1:1", "parallel.pipeline": 2,
        "model.pattern": "M-M*-M|-M*-"})  # fmt: skip
    (problem,) = teacher_problems(recipe, named(str(teacher)), tokenizer=None)
    assert "layer 1 of the student is not on its last pipeline stage (layers 6 to 9)" in str(problem)


def test_the_teacher_computes_in_the_configured_format(teacher: Path) -> None:
    """bf16 has 8 bits, E4M3 4: the loss moves by less than a per cent, but it moves."""
    exact, bf16, fp8 = (
        run_ranks(1, distill_tiny, student_of(teacher, **changes), 1, 1)[0].losses[0]
        for changes in ({}, {"objective.teacher_params": "bf16"}, {"objective.teacher_scaling": "blockwise"})
    )
    assert 1e-7 < abs(bf16 / exact - 1) < 0.01
    assert abs(bf16 / exact - 1) < abs(fp8 / exact - 1) < 0.03


def test_the_teacher_has_no_gradients_and_does_not_move(teacher: Path) -> None:
    plain, with_teacher = (run_ranks(1, gradient_numbers, recipe)[0] for recipe in (RECIPE, student_of(teacher)))
    assert plain == with_teacher


def gradient_numbers(rank: int, recipe: Recipe) -> tuple[int, int]:
    """(numbers in gradient buffers, numbers in the optimizer) of a built engine."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        buffers = sum(buffer.grad_data.numel() for chunk in engine.chunks for buffer in chunk.buffers)
        groups = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
        return buffers, groups


def test_overlapped_gathers_and_a_tied_head_train_the_same(teacher: Path) -> None:
    """With overlap the head's weight may not be gathered yet when the loss reads it."""
    changes = {"model.tie_embeddings": True, "objective.hidden_match": "cosine", "objective.hidden_layers": "3:1,7:4"}
    overlap = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
    for tied in (False, True):
        recipe = student_of(teacher, **{**changes, "model.tie_embeddings": tied})
        (alone,) = run_ranks(1, distill_tiny, recipe, 1, 3)
        both = run_ranks(
            2, distill_tiny, student_of(teacher, **{**changes, "model.tie_embeddings": tied, **overlap}), 2, 3
        )
        for numbers in both:
            np.testing.assert_allclose(numbers.losses, alone.losses, rtol=2e-6)
            np.testing.assert_allclose(numbers.grad_norms, alone.grad_norms, rtol=2e-5)
