"""NaN and infinity are refused by name before anything is published. Steps of older versions that contain them are skipped.
Every rank ends the same way."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import SMALL, contents, manifest_at, train_on
from ranks import run_ranks
from tiny import engine_of, recipe_with, steps_of

from recipes.schema import checkpoint_steps as steps
from recipes.schema.errors import CheckpointError, NumericsError
from recipes.schema.manifest import _digest
from train.checkpoint import finite, saving
from train.checkpoint.__main__ import main as command
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState, read_manifest
from train.checkpoint.pieces import local_tensors_of, optimizer_parts


def poison(engine: Any, where: str) -> None:
    """Damage one number that this rank will save. where: `weight`, `moment`, a word in a buffer's or parameter's name, or
    `copy`: of the tied embedding on the last stage."""
    module = engine.chunks[-1].module
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        match where:
            case "moment":
                local_tensors = local_tensors_of([module], engine.mesh.groups.dp_cp)
                part = optimizer_parts(engine.optimizer, [module], local_tensors)[0]
                part.moments["exp_avg_sq"].reshape(-1)[-1] = math.inf
            case "row":
                named["embedding.word_embeddings.weight"][3] = math.nan
            case _:
                name = next(name for name in named if where in name)
                named[name].reshape(-1)[0] = -math.inf


def save_sick(rank: int, world: int, folder: Path, recipe: Any, where: str, sick_rank: int, background: bool) -> str:
    """Train, save, train, damage one rank's state, save again. -> the error of the second save."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        checkpoints = CheckpointFolder(folder, replace(recipe.checkpoint, on_failure="continue"))
        steps_of(engine, recipe, range(1))
        checkpoints.save(engine, RunState(step=1, position=4, data_hash="h"))
        steps_of(engine, recipe, range(1, 2))
        if rank == sick_rank:
            poison(engine, where)
        try:
            checkpoints.request(engine, RunState(step=2, position=8, data_hash="h"), background=background)
            checkpoints.wait()
            checkpoints.check()
        except NumericsError as error:
            return str(error)
        return "saved"


BF16 = replace(SMALL, precision=replace(SMALL.precision, params="bf16"))
DELAYED = replace(SMALL, precision=replace(SMALL.precision, params="bf16", scaling="delayed"))


def laid_out(**degrees: int) -> Any:
    return replace(SMALL, parallel=replace(SMALL.parallel, **degrees))


TIED = replace(laid_out(pipeline=2), model=replace(SMALL.model, tie_embeddings=True))
SICK: dict[str, tuple[int, Any, str, int, str]] = {
    "a row of the embedding": (1, SMALL, "row", 0, "model.embedding.word_embeddings.weight (32 elements)"),
    "a second moment only": (1, SMALL, "moment", 0, "optimizer.exp_avg_sq."),
    "a weight in bf16 storage": (1, BF16, "output_layer.weight", 0, "model.output_layer.weight (1 element)"),
    "A_log": (1, SMALL, "A_log", 0, "A_log"),
    "D": (1, SMALL, "mixer.D", 0, "mixer.D"),
    "dt_bias": (1, SMALL, "dt_bias", 0, "dt_bias"),
    "a delayed scale": (1, DELAYED, "low_precision_scale", 0, "low_precision_scale"),
    "tensor rank 1": (2, laid_out(tensor=2), "output_layer.weight", 1, "model.output_layer.weight (1 element)"),
    "pipeline rank 1": (2, laid_out(pipeline=2), "output_layer.weight", 1, "model.output_layer.weight (1 element)"),
    "a moment of data rank 1": (2, SMALL, "moment", 1, "optimizer.exp_avg_sq."),
    "the last stage's copy of a tied embedding": (
        2,
        TIED,
        "output_layer.weight",
        1,
        "model.embedding.word_embeddings.weight",
    ),
}


@pytest.mark.parametrize("fault", SICK)
def test_state_that_is_not_finite_is_refused_by_name_on_every_rank(fault: str, tmp_path: Path) -> None:
    world, recipe, where, rank, name = SICK[fault]
    texts = run_ranks(world, save_sick, world, tmp_path, recipe, where, rank, rank == 0)
    assert len(set(texts)) == 1, texts
    assert "step 2 is not saved: 1 tensor contains NaN or infinity" in texts[0] and name in texts[0]
    assert "step_00000001 is the newest finite checkpoint" in texts[0]
    assert list(contents(tmp_path)) == [1] and not list(tmp_path.glob(".*"))
    assert manifest_at(tmp_path, 1).not_finite == {}


def save_anyway(rank: int, folder: Path, at: tuple[int, ...]) -> None:
    """Checkpoints of a version that did not check for NaN: steps 1, 2, ...; those in `at` have a row of NaN."""
    saving.not_finite = lambda *_: {}
    with engine_of(SMALL, rank=rank, world=1) as engine:
        checkpoints = CheckpointFolder(folder, replace(SMALL.checkpoint, keep_last=9))
        for step in range(1, 4):
            if step in at:
                poison(engine, "row")
            else:
                steps_of(engine, SMALL, range(step - 1, step))
            checkpoints.save(engine, RunState(step=step, position=4 * step, data_hash="h"))


def forget(path: Path) -> None:
    """Remove from a manifest the fields that older versions did not write."""
    body = json.loads((path / "manifest.json").read_text())
    body.pop("digest")
    for record in body["tensors"].values():
        record.pop("not_finite")
    (path / "manifest.json").write_text(json.dumps(body | {"digest": _digest(body)}))


@pytest.fixture(scope="module")
def sick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1 is finite, steps 2 and 3 are not, and their manifests do not say so."""
    folder = tmp_path_factory.mktemp("sick")
    run_ranks(1, save_anyway, folder, (2, 3))
    for path in steps.steps_in(folder):
        forget(path)
    return folder


def test_steps_with_nan_of_older_versions_are_skipped_and_replaced(sick_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(sick_run, folder)
    assert finite.newest_finite(folder) == folder / "step_00000001"
    ((begin, notes),) = run_ranks(
        1, train_on, 1, folder, 2, replace(SMALL, checkpoint=replace(SMALL.checkpoint, keep_last=1))
    )
    assert begin == 1 and notes.count("model.embedding.word_embeddings.weight (32 elements)") == 2
    assert manifest_at(folder, 2).not_finite == {}, "trained from step 1 and saved in the sick one's place"
    assert finite.newest_finite(folder) == folder / "step_00000002"


def test_verify_calls_not_finite_numbers_a_failure(sick_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["verify", str(sick_run / "step_00000003")]) == 1
    out = capsys.readouterr().out
    assert "model.embedding.word_embeddings.weight: 32 of 8,192 elements are NaN or infinite" in out
    assert command(["verify", str(sick_run / "step_00000001")]) == 0
    assert command(["list", str(sick_run), "--verify"]) == 1


def test_a_manifest_that_records_nan_is_skipped_without_reading_tensors(sick_run: Path, tmp_path: Path) -> None:
    run_ranks(1, save_anyway, tmp_path, (3,))
    good, notes = steps.candidates(tmp_path)
    assert [manifest.step for _, manifest in good] == [2, 1]
    assert "word_embeddings.weight (32 elements)" in notes[0]
    assert read_manifest(tmp_path / "step_00000003").not_finite == {"model.embedding.word_embeddings.weight": 32}


def test_a_run_of_sick_steps_only_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    run_ranks(1, save_anyway, tmp_path, (1, 2, 3))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete:(\n.*NaN or infinity.*){3}"):
        steps.newest_in(tmp_path)
    assert "No earlier checkpoint without them" in finite.advice_after_not_finite(tmp_path, remedies="care")


def test_advice_names_the_weight_of_the_objective_and_what_the_recipe_does_not_have_yet() -> None:
    grpo = {"objective.kind": "grpo", "objective.grpo.kl_weight": 1e30, "optim.lr": 0.001}
    expected = (
        "a lower objective.grpo.kl_weight (it is 1e+30), a lower optim.lr (it is 0.001) or a longer schedule.warmup"
    )
    assert finite.remedies_of(recipe_with(**grpo)) == expected
    dpo = {"objective.kind": "dpo", "optim.clip_norm": 0.0, "precision.params": "bf16", "optim.lr": 0.001}
    assert finite.remedies_of(recipe_with(**dpo)) == (
        "a lower objective.dpo.beta (it is 0.1), a lower optim.lr (it is 0.001), a longer schedule.warmup, optim.clip_norm=1 or "
        "precision.params=fp32"
    )
