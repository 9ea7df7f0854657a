"""`stratum replay`: a step of a two-rank run computed again in one process, compared with records and with itself."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from killed_runs import Run, recipe_in

from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.run_folder import METRICS, read_metrics
from recipes.schema.tools import ReplayConfig
from train.replay.show import compare, read_execution, replay

STEPS = 6


def test_a_step_is_computed_again_and_the_first_difference_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(tmp_path, steps_=STEPS)
    Run(recipe, 2, folder=tmp_path / "said").attempt(None)
    run, record = tmp_path / recipe.run.name, tmp_path / "step.json"

    assert replay(recipe, ReplayConfig(step=STEPS, out=str(record))) == 0
    shown = capsys.readouterr().out
    assert "tensors are equal to the bit" in shown and "record" in shown and "gradient " in shown and "layer 2" in shown
    # The run had two ranks and this is one process: loss and norm agree to rounding.
    line = next(line for line in read_metrics(run / METRICS) if line["kind"] == "step" and line["step"] == STEPS)
    mine = read_execution(record)
    assert mine.loss == pytest.approx(line["loss"], rel=1e-5) and mine.grad_norm == pytest.approx(
        line["grad_norm"], rel=1e-4
    )

    assert replay(recipe, ReplayConfig(step=STEPS, against=str(record))) == 0
    capsys.readouterr()
    changed = json.loads(record.read_text())
    at = next(i for i, one in enumerate(changed["statistics"]) if (one["kind"], one["name"]) == ("output", "layer 1"))
    for one in changed["statistics"][at:]:
        one["digest"], one["rms"] = "0" * 32, one["rms"] * 1.01
    record.write_text(json.dumps(changed))
    assert replay(recipe, ReplayConfig(step=STEPS, against=str(record))) == 1
    assert "The first tensor that differs: output of layer 1" in capsys.readouterr().out

    other = replace(
        mine, place="another machine", statistics=tuple(replace(one, digest="0" * 32) for one in mine.statistics)
    )
    status, verdict = compare(mine, other)
    assert status == 0 and verdict.startswith("Equal to rounding")

    broken = tuple(replace(one, digest="0" * 32, rms=math.nan) for one in mine.statistics[1:])
    status, verdict = compare(mine, replace(other, statistics=(other.statistics[0], *broken)))
    assert status == 1 and "largest relative difference of a statistic is inf" in verdict, (
        "NaN is not equal to rounding"
    )

    record.write_text("[]")
    with pytest.raises(CheckpointError, match="is not a record of `stratum replay --out`"):
        replay(recipe, ReplayConfig(step=STEPS, against=str(record)))
    with pytest.raises(RecipeError, match="--step 9: the run ends at step 6"):
        replay(recipe, ReplayConfig(step=9))
    shutil.rmtree(run / "checkpoints")
    assert replay(recipe, ReplayConfig(step=1)) == 0  # from the seed, as the run began
