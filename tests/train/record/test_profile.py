"""Profiled steps: a trace with layers and phases, and the same numbers as without. When garbage is collected."""

import gc
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import Numbers, engine_of, recipe_with, steps_of

from recipes.schema.profile import profile_problems, profiled_steps
from recipes.schema.recipe import Recipe
from train.record.profile import GarbageControl, Profiler, phase


def steps_with_profile(rank: int, recipe: Recipe, folder: Path) -> tuple[Numbers, list[Path | None]]:
    """For `run_ranks`: four steps at two tensor ranks. -> their numbers, and what each step returned."""
    with engine_of(recipe, rank=rank, world=2) as engine:
        profiler = Profiler(recipe.run, folder=folder, chunks=engine.chunks, rank=rank, device=torch.device("cpu"))
        losses, norms, traces = [], [], []
        for step in range(4):
            profiler.before_step(step + 1)
            with phase("data"):
                pass
            numbers = steps_of(engine, recipe, range(step, step + 1))
            traces.append(profiler.after_step(step + 1))
            losses += numbers.losses
            norms += numbers.grad_norms
        hooks = [
            m for chunk in engine.chunks for m in chunk.modules() if m._forward_pre_hooks and hasattr(m, "layer_number")
        ]
        assert not hooks
        return Numbers(losses, norms), traces


def test_a_profile_of_two_steps_on_one_of_two_ranks(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"parallel.tensor": 2, "parallel.sequence": True}
    plain = recipe_with(**changes)
    profiled = recipe_with(**changes, **{"run.profile": "2-3", "run.profile_ranks": (1,), "run.profile_memory": True})
    before, after = (run_ranks(2, steps_with_profile, recipe, tmp_path) for recipe in (plain, profiled))
    assert [numbers for numbers, _ in before] == [numbers for numbers, _ in after]
    assert [traces for _, traces in before] == [[None] * 4] * 2 and after[0][1] == [None] * 4
    trace = tmp_path / "profile" / "steps_2-3" / "rank-00001.json.gz"
    assert after[1][1] == [None, None, trace, None]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    counts: dict[str, int] = {}
    for event in events:
        counts[str(event.get("name"))] = counts.get(str(event.get("name")), 0) + 1
    for name in ("data", "forward and backward", "optimizer"):
        assert counts[name] == 2, "once in each of two steps"
    microbatches = profiled.run.global_rows // profiled.run.microbatch_rows
    for layer, letter in enumerate(profiled.model.pattern):
        kind = "MambaLayer" if letter == "M" else "TransformerLayer" if letter in "*w" else "MLPLayer"
        assert counts[f"layer {layer} ({kind})"] == 2 * microbatches
    assert counts["[memory]"] > 100
    table = json.loads(trace.with_name("rank-00001.table.json").read_text())
    assert len(table) == 10 and table == sorted(table, key=lambda row: -row["seconds"])
    assert all("layer" not in row["name"] and 0 < row["share"] < 1 for row in table)


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file where the folder belongs")
    run = recipe_with(**{"run.profile": "2"}).run
    profiler = Profiler(run, folder=tmp_path, chunks=[], rank=0, device=torch.device("cpu"))
    profiler.before_step(2)
    assert profiler.after_step(2) is None and profiler.close() is None
    assert "rank-00000.json.gz cannot be written" in caplog.text and "The run continues" in caplog.text


@pytest.mark.parametrize(
    ("text", "steps"),
    [(None, range(0)), ("3", range(3, 4)), ("3-5", range(3, 6)), ("8", range(8, 9)), ("0001", range(1, 2))],
)
def test_steps_to_profile(text: str | None, steps: range) -> None:
    run = recipe_with(**{"run.profile": text}).run
    assert profiled_steps(run) == steps and not profile_problems(run)


@pytest.mark.parametrize(
    "text", ["", "0", "0-3", "5-3", "9", "7-9", "x", "1-", "-1", "1-2-3", "1 - 2", "1e3", "٣", "9" * 40]
)
def test_wrong_steps_to_profile_are_refused_with_a_remedy(text: str) -> None:
    (problem,) = profile_problems(recipe_with(**{"run.profile": text}).run)  # of 8 steps
    assert problem.key == "run.profile" and problem.remedy


def test_too_many_steps_to_profile_are_refused() -> None:
    (problem,) = profile_problems(recipe_with(**{"run.profile": "1-21", "run.steps": 100}).run)
    assert "at most 20" in problem.text


def test_garbage_is_collected_between_steps_only() -> None:
    """A circle of objects is freed at the interval, not before; afterwards Python collects by itself again."""

    class Circle:
        freed = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Circle.freed += 1

    with GarbageControl(3) as garbage:
        assert not gc.isenabled()
        found = []
        for step in range(1, 7):
            Circle()
            garbage.after_step(step)
            found.append(Circle.freed)
    assert found == [0, 0, 3, 3, 3, 6] and gc.isenabled()
    with GarbageControl(0):
        assert gc.isenabled()
