"""Checkpoints: bitwise equal at the same layout, equal training at another one, complete or absent after any failure."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks
from tiny import Numbers, engine_of, recipe_with, steps_of

from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.errors import CheckpointError
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState, read_manifest
from train.checkpoint.resume import resume
from train.model.initial import global_names

SAVED_AT, STEPS = 2, 5
TP2_PP2 = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True}
LAYOUTS = {
    "one": (1, {}),
    "DP2": (2, {}),
    "TP2 PP2": (4, TP2_PP2),
}


def save_on_the_way(rank: int, recipe: Recipe, world: int, folder: Path) -> tuple[Numbers, dict[str, torch.Tensor]]:
    """Train STEPS steps, saving after SAVED_AT. -> the numbers after the save, and this rank's last weights."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(SAVED_AT))
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(step=SAVED_AT, position=8, data_hash="h"))
        numbers = steps_of(engine, recipe, range(SAVED_AT, STEPS))
        return numbers, weights_of(engine.chunks)


def load_and_go_on(rank: int, recipe: Recipe, world: int, folder: Path) -> tuple[Numbers, dict[str, torch.Tensor]]:
    """Start from other weights, load, train the remaining steps; the step counter must be restored too."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        found = checkpoints.newest()
        assert found is not None and found[1].step == SAVED_AT and found[1].position == 8
        checkpoints.load(engine, found[0])
        numbers = steps_of(engine, recipe, range(SAVED_AT, STEPS))
        counts = {group["step"] for group in engine.optimizer.param_groups if group["params"]}
        assert counts == {STEPS}, f"Adam's step count is {counts} after {STEPS} steps"
        return numbers, weights_of(engine.chunks)


def weights_of(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for chunk in chunks for name, p in global_names(chunk.module)}


def other_start(changes: dict[str, object]) -> Recipe:
    return recipe_with(**changes, **{"run.seed": 99})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["one", "DP2", pytest.param("TP2 PP2", marks=pytest.mark.slow)]
)  # by default test_layout_matrix has TP2 PP2
def test_same_layout_continues_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    world, changes = LAYOUTS[name]
    changes = {**changes, "precision.params": precision}
    saved = run_ranks(world, save_on_the_way, recipe_with(**changes), world, tmp_path)
    resumed = run_ranks(world, load_and_go_on, other_start(changes), world, tmp_path)
    for (numbers, weights), (again, weights_again) in zip(saved, resumed, strict=True):
        assert numbers == again
        assert all(torch.equal(weights[key], weights_again[key]) for key in weights)


def scan_parameters_in_bf16_models(rank: int) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    with engine_of(recipe_with(**{"precision.params": "bf16"}), rank=rank, world=1) as engine:
        parameters = dict(engine.chunks[0].module.named_parameters())
        with engine_of_fp32() as reference:
            same = {n: torch.equal(parameters[n], p) for n, p in reference.items()}
        assert all(same.values()), same
        return {n: (p.dtype, p.main_grad.dtype) for n, p in parameters.items()}


class engine_of_fp32:
    """The initial scan parameters of an fp32 model, computed from their rule alone."""

    def __enter__(self) -> dict[str, torch.Tensor]:
        from tiny import TINY

        from train.model.initial import _draw

        names = [
            f"decoder.layers.{i}.mixer.{n}"
            for i, k in enumerate(TINY.pattern)
            if k == "M"
            for n in ("A_log", "dt_bias", "D")
        ]
        return {n: _draw(n, [TINY.mamba_heads], model=TINY, layers=len(TINY.pattern), seed=1234) for n in names}

    def __exit__(self, *_: object) -> None: ...


def test_scan_parameters_stay_fp32_in_bf16_models() -> None:
    kinds = run_ranks(1, scan_parameters_in_bf16_models)[0]
    for name, (storage, gradient) in kinds.items():
        fp32 = name.endswith(("A_log", "dt_bias", "mixer.D"))
        assert storage == (torch.float32 if fp32 else torch.bfloat16), name
        assert gradient == torch.float32, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, save_on_the_way, recipe_with(), 1, folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> CheckpointFolder:
    shutil.copytree(saved, tmp_path / "copy")
    return CheckpointFolder(tmp_path / "copy", CheckpointConfig(every_steps=1, keep_last=2))


def test_a_lost_or_torn_pointer_loses_nothing(copy: CheckpointFolder) -> None:
    (copy.folder / "latest").write_text("step_0000")
    assert copy.newest() is not None
    (copy.folder / "latest").unlink()
    assert copy.newest() is not None


def test_unfinished_writing_is_not_a_checkpoint(copy: CheckpointFolder) -> None:
    shutil.copytree(copy.path_of(SAVED_AT), copy.folder / ".step_00000009.writing")
    found = copy.newest()
    assert found is not None and found[1].step == SAVED_AT


def test_a_damaged_checkpoint_falls_back_to_an_older_whole_one(copy: CheckpointFolder) -> None:
    newer = copy.path_of(SAVED_AT + 1)
    shutil.copytree(copy.path_of(SAVED_AT), newer)
    file = next(newer.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    found = copy.newest()
    assert found is not None and found[0] == copy.path_of(SAVED_AT)


@pytest.mark.parametrize("damage", ["truncated", "missing file", "empty manifest", "future format"])
def test_damage_without_another_is_an_error_not_a_fresh_start(copy: CheckpointFolder, damage: str) -> None:
    path = copy.path_of(SAVED_AT)
    file = next(path.glob("*.safetensors"))
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-10])
        case "missing file":
            file.unlink()
        case "empty manifest":
            (path / "manifest.json").write_text("")
        case "future format":
            manifest = path / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match="step_00000002"):
        copy.newest()


def save_several(rank: int, folder: Path, every: int) -> None:
    recipe = recipe_with(**{"checkpoint.keep_last": 2, "checkpoint.keep_every_steps": every})
    with engine_of(recipe, rank=rank, world=2) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        for step in range(1, 6):
            checkpoints.save(engine, RunState(step=step, position=step, data_hash="h"))


def test_retention_keeps_the_last_and_the_milestones(tmp_path: Path) -> None:
    run_ranks(2, save_several, tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == [f"step_{s:08d}" for s in (2, 4, 5)]
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    assert not list(tmp_path.glob(".*"))
    assert read_manifest(tmp_path / "step_00000005").layout["data"] == 2


def save_on_full_disk(rank: int, folder: Path) -> None:
    recipe = recipe_with(**{"checkpoint.retries": 1, "checkpoint.retry_wait_s": 0.01})
    with engine_of(recipe, rank=rank, world=2) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        checkpoints.save(engine, RunState(step=1, position=1, data_hash="h"))
        usage = shutil.disk_usage(folder)
        shutil.disk_usage = lambda _path: usage._replace(free=1000)  # type: ignore[assignment]
        checkpoints.save(engine, RunState(step=2, position=2, data_hash="h"))


def test_a_full_disk_is_named_before_anything_is_lost(tmp_path: Path) -> None:
    with pytest.raises(
        RankFailed, match=r"CheckpointError: cannot save into .*: about [\d,]+ bytes needed, 1,000 free"
    ):
        run_ranks(2, save_on_full_disk, tmp_path)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000001"]
    assert not list(tmp_path.glob(".*"))


def resume_modes(rank: int, folder: Path) -> list[str]:
    messages = []
    for mode in ("never", "auto"):
        recipe = recipe_with(**{"checkpoint.resume": mode})
        with engine_of(recipe, rank=rank, world=1) as engine:
            checkpoints = CheckpointFolder(folder, recipe.checkpoint)
            try:
                resume(checkpoints, engine, recipe=recipe, new=RunState(data_hash="other"))
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_resume_refuses_other_data_and_forbidden_folders(saved: Path) -> None:
    never, other_data = run_ranks(1, resume_modes, saved)[0]
    assert never.startswith("RecipeError: checkpoint.resume=never")
    assert other_data.startswith("RecipeError") and "trained on data h" in other_data
