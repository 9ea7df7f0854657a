"""The planner, the launchers and the trainer accept the same recipes: drawn at random over all fields, and really built."""

import contextlib
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from recipes_drawn import Place, recipes

from launch.plan.checks import facts_of, recipe_problems
from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan
from recipes.schema.errors import RecipeError, StratumError
from recipes.schema.facts import read_disk
from recipes.schema.recipe import Recipe
from train.build import build_engine, check, check_start, mesh_of, open_data
from train.model.backend import this_machine


def test_plan_and_trainer_accept_the_same_recipes(place: Place) -> None:
    agree(place, examples=100, builds=8)


@pytest.mark.slow
def test_plan_and_trainer_accept_the_same_of_many_recipes(place: Place) -> None:
    agree(place, examples=3000, builds=300)


def agree(place: Place, *, examples: int, builds: int) -> None:
    """Draw recipes and worlds; accepted ones of a single process are opened and built as training would."""
    accepted: dict[str, Recipe] = {}
    refused = 0

    @settings(max_examples=examples, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipe=recipes(place), world=st.sampled_from([1, 1, 2, 3, 4, 6, 8]))
    def one(recipe: Recipe, world: int) -> None:
        nonlocal refused
        planned, trained = planned_problems(recipe, world), trainer_problems(recipe, world)
        if not Path(recipe.data.folder).exists():  # then the plan warns that it could not look, and training refuses
            assert trained
            return
        assert planned == trained
        refused += bool(trained)
        if world == 1 and not trained:
            accepted.setdefault(repr(recipe), recipe)
        with contextlib.suppress(StratumError):
            make_plan(recipe, world=world, device=device_named("h100"))

    one()
    assert len(accepted) > examples / 20 and refused > examples / 20, "draws are of one kind only"
    wrong = run_ranks(1, build_all, list(accepted.values())[:builds], timeout_s=1800)[0]
    assert not wrong, f"{len(wrong)} recipes were accepted and cannot be built; the first:\n{wrong[0]}"


def planned_problems(recipe: Recipe, world: int) -> list[str]:
    """What the planner says of a recipe on this machine."""
    facts = replace(facts_of(recipe, device_named("h100")), machine=this_machine())
    return [str(problem) for problem in recipe_problems(recipe, facts, world=world)]


def trainer_problems(recipe: Recipe, world: int) -> list[str]:
    """The trainer's complaints before it opens or builds anything."""
    try:
        check_start(recipe, world=world)
    except RecipeError as error:
        return unfolded(recipe, world, str(error))
    return []


def unfolded(recipe: Recipe, world: int, message: str) -> list[str]:
    """The problems that make up a message; they may have several lines each."""
    found = [problem for problem in planned_problems(recipe, world)]
    return found if "\n".join(found) == message else [message]


def build_all(rank: int, drawn: list[Recipe]) -> list[str]:
    """For `run_ranks`: open the data of each recipe and build its engine. -> what went wrong."""
    wrong = []
    torch.set_num_threads(1)
    one = replace(drawn[0], objective=replace(drawn[0].objective, kind="distill", teacher_cache=None, teacher_tensor=0))
    with mesh_of(one, check(one, world=1), device=torch.device("cpu"), rank=rank) as mesh:
        for recipe in drawn:
            try:
                dataset = open_data(recipe)
                start = read_disk(recipe).start
                weights = start.path if start is not None else None
                build_engine(recipe, mesh, weights=weights, tokenizer=dataset.tokenizer.fingerprint)
            except Exception:
                wrong.append(f"{recipe}\n{traceback.format_exc()}")
    return wrong


def test_the_largest_seeds_are_really_taken(place: Place) -> None:
    largest = 2**63 - 1
    recipe = replace(place.base, run=replace(place.base.run, seed=largest), data=replace(place.base.data, seed=largest))
    assert run_ranks(1, build_all, [recipe]) == [[]]
