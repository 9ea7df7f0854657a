"""Every group of every shipped recipe can be swapped: it plans, or an error names one key and a value that repairs it."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_composed import composed

from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan, world_of
from recipes.schema.command import RECIPES
from recipes.schema.errors import StratumError
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import shape_problems
from recipes.schema.schedule import schedule_problems
from recipes.schema.typed import defaults_of

GROUPS = ("schedule", "precision", "optim", "data", "model", "parallel", "objective", "launch")
OPTIONS = [
    (g, p.stem)
    for g in GROUPS
    for p in sorted((RECIPES / g).glob("*.yaml"))
    if g != "data" or re.search("^sources:$|^defaults:", p.read_text(), re.MULTILINE)
]
"""Data without sources is left out: it is for recipes that name their own, or that learn from prompts."""
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        inner = isinstance(value, dict) and isinstance(below.get(key), dict)
        both[key] = merged(below[key], value) if inner else value
    return both


@functools.cache
def file(group: str, option: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    plain = yaml.safe_load((RECIPES / group / f"{option}.yaml").read_text()) or {}
    for beneath in plain.pop("defaults", []):
        found = merged(found, file(group, beneath))
    return merged(found, plain)


def swapped(name: str, **choices: str) -> dict[str, Any]:
    """What Hydra composes, merged by hand: a hundred times faster, and a second opinion."""
    body = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    groups = {key: value for one in body.pop("defaults") if isinstance(one, dict) for key, value in one.items()}
    plain = defaults_of(Recipe)
    for group, option in (groups | choices).items():
        if group in GROUPS:
            plain[group] = merged(plain[group], file(group, option))
    return merged(plain, body)


@pytest.mark.parametrize("name", ["smoke", "nemotron_h_8b", "nemotron_nano_12b_v2", "gemma2_2b"])
def test_hydra_composes_what_merging_by_hand_gives(name: str) -> None:
    assert recipe_from_mapping(composed("-cn", name)) == recipe_from_mapping(swapped(name))
    choices = {"data": "nemotron_long", "launch": "slurm_pyxis", "precision": "mxfp8", "schedule": "cosine"}
    words = [f"{group}={option}" for group, option in choices.items()]
    assert recipe_from_mapping(composed("-cn", name, *words)) == recipe_from_mapping(swapped(name, **choices))


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no prepared data of this checkout takes part."""
    monkeypatch.chdir(tmp_path)


def complaints(plain: dict[str, Any]) -> list[str]:
    """All problems of a recipe in a plan on B200s, except its size and checkpoints that are not on this disk."""
    try:
        recipe = recipe_from_mapping(plain)
        recipe = replace(recipe, run=replace(recipe.run, name="not_there"))
        plan = make_plan(recipe, world=world_of(recipe, None), device=device_named("b200"))
    except StratumError as error:
        found = str(error).splitlines()
    else:
        found = list(plan.problems)
    return [one for one in found if not one.startswith("memory: ") and " is neither a checkpoint " not in one]


def repaired(plain: dict[str, Any], complaint: str) -> dict[str, Any]:
    """The recipe after the one change that a complaint names."""
    said = re.search(r"(?:Use|Set|or|use|e\.g\.) ((?:[a-z]\w*\.)*\w+)=([^\s,;]+?)[.,;]?(?:\s|$)", complaint)
    at = re.match(r"([a-z]+\.\w+)=\S+ .*\bUse (?:1, )?(?:1 or )?(\d+)", complaint)
    key, value = said.groups() if said else at.groups() if at else ("", "")
    if "needs objective.teacher" in complaint:
        key, value = "objective.teacher", "runs/some_run"
    if key and "." not in key:
        key = re.search(rf"([a-z]+)\.\w+=.*\b{key}=", complaint)[1] + f".{key}"  # type: ignore[index]
    assert key, f"names no key and value that repair it: {complaint}"
    change: Any = yaml.safe_load(value)
    for name in reversed(key.split(".")):
        change = {name: change}
    return merged(plain, change)


@pytest.mark.parametrize("name", NAMES)
def test_any_group_can_be_swapped_or_the_error_names_one_key(name: str) -> None:
    wrong = {}
    for group, option in OPTIONS:
        plain = swapped(name, **{group: option})
        for _ in range(5):
            if not (found := complaints(plain)):
                break
            plain = repaired(plain, found[0])
        else:
            wrong[f"{group}={option}"] = found
    assert not wrong


@pytest.mark.parametrize("name", ["smoke", "gemma2_130m", "nemotron_h_8b"])
@pytest.mark.parametrize("group", ["schedule", "precision", "optim", "data"])
def test_swapping_what_is_swapped_most_needs_no_other_key(name: str, group: str) -> None:
    """Data of preferences needs an objective that learns from them, so it is left out."""
    options = [
        o for g, o in OPTIONS if g == group and "kind: preference" not in (RECIPES / g / f"{o}.yaml").read_text()
    ]
    assert {o: found for o in options if (found := complaints(swapped(name, **{group: o})))} == {}


def test_run_steps_alone_shortens_the_smoke_recipe() -> None:
    plain = merged(swapped("smoke"), {"run": {"steps": 20}})
    assert complaints(plain) == []


def test_a_gpu_takes_every_linear_of_the_smoke_model_in_every_precision() -> None:
    for group, option in OPTIONS:
        if group == "precision":
            found = recipe_from_mapping(swapped("smoke", precision=option))
            tokens = found.run.microbatch_rows * found.data.row_tokens
            assert not shape_problems(
                found.model, parallel=found.parallel, precision=found.precision, rank_tokens=tokens
            )


@pytest.mark.parametrize("name", [name for name in NAMES if re.search("tiny|smoke|gap", name)])
def test_a_small_recipe_can_be_tried_for_two_steps(name: str) -> None:
    recipe = recipe_from_mapping(composed("-cn", name, "run.steps=2"))
    assert schedule_problems(recipe.schedule, total_steps=2, tokens_per_step=1) == []
