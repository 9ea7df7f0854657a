"""Whole runs at every kind of layout and objective: train, evaluate, save, resume, to the end; nothing hangs, nothing fails."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from killed_runs import Run, recipe_in
from ranks import run_ranks

from recipes.schema.objective import ObjectiveConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.tools import TeacherCacheConfig
from train.teacher_cache.write_cache import write_cache

LAYOUTS = {
    "PP2": (2, ParallelConfig(pipeline=2)),
    "VPP2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "CP2": (2, ParallelConfig(context=2)),
    "TP2xPP2": (4, ParallelConfig(tensor=2, pipeline=2)),
}
DEFAULT = {("distill", "PP2")}
"""Run by default: the ones that fail first; the rest of the matrix is slow."""


def _write_cache(rank: int, recipe: Recipe) -> None:
    write_cache(recipe, TeacherCacheConfig(block_rows=2))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of two steps, whose recipe and data the others share."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = recipe_in(folder, steps_=8)
    recipe = replace(
        recipe,
        run=replace(recipe.run, name="teacher", steps=2),
        model=replace(recipe.model, pattern="M*-M"),
        schedule=replace(recipe.schedule, warmup=0, decay=1),
        launch=replace(recipe.launch, timeout_s=60.0),
    )
    assert not Run(recipe, 1, folder=folder / "said").attempt(None)
    return recipe


@pytest.fixture(scope="module")
def answers(teacher: Recipe) -> ObjectiveConfig:
    """The teacher's cached logits for the rows of the runs below."""
    folder = Path(teacher.run.folder)
    objective = ObjectiveConfig(
        teacher=str(folder / "teacher"), teacher_cache=str(folder / "answers"), top_k=8, trust_tokenizer=True
    )
    recipe = replace(teacher, objective=objective, run=replace(teacher.run, steps=4, global_rows=2, microbatch_rows=1))
    run_ranks(1, _write_cache, recipe)
    return replace(objective, kind="distill")


@pytest.mark.parametrize(
    ("objective", "layout"),
    [
        pytest.param(kind, layout, marks=[] if (kind, layout) in DEFAULT else [pytest.mark.slow])
        for kind in ("next_token", "distill", "cached")
        for layout in LAYOUTS
    ],
)
def test_a_whole_run_at_every_layout(
    teacher: Recipe, objective: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Distillation at PP2 hung when its groups were created on the last stage only; evaluation at VPP2 failed where it had
    fewer microbatches than stages (one row a source here)."""
    world, parallel = LAYOUTS[layout]
    kinds = {
        "next_token": lambda: ObjectiveConfig(),
        "distill": lambda: ObjectiveConfig(kind="distill", teacher=f"{teacher.run.folder}/teacher"),
        "cached": lambda: request.getfixturevalue("answers"),
    }
    recipe = replace(
        teacher,
        run=replace(teacher.run, name=f"{objective}-{layout}", folder=str(tmp_path), steps=4, stop_after_steps=2),
        parallel=parallel,
        objective=kinds[objective](),
        evaluate=replace(teacher.evaluate, every_steps=1),
    )
    run = Run(recipe, world, folder=tmp_path / "said")
    run.attempt(None)
    assert [path.name for path in sorted(run.checkpoints.glob("step_*"))] == ["step_00000001", "step_00000002"]
    run.recipe = replace(recipe, run=replace(recipe.run, stop_after_steps=None))
    run.attempt(None)
    steps = [line["step"] for line in run.metrics if line["kind"] == "step"]
    assert steps == [1, 2, 3, 4]
    scores = [line for line in run.metrics if line["kind"] == "evaluation"]
    assert [line["step"] for line in scores] == [0, 1, 2, 3, 4]
    assert all(math.isfinite(value) for line in scores for value in line["bits_per_byte"].values())
