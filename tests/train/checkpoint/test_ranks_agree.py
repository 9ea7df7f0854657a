"""State that ranks have in common: copies of a weight that several tensor ranks train; random state at another layout."""

from pathlib import Path

import torch
from crashes import SMALL, train_on
from ranks import run_ranks
from tiny import engine_of, recipe_with, steps_of

from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState, read_manifest
from train.checkpoint.random_state import random_states


def drift(rank: int, folder: Path) -> list[list[str]]:
    """Saves of a good step, and after one number of one norm's copy on the second tensor rank moved by its last bit, which is
    trained on. -> the differing copies that each save reported."""
    recipe = recipe_with(**{"parallel.tensor": 2, "checkpoint.every_steps": 1})
    reported = []
    with engine_of(recipe, rank=rank, world=2) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        norm = dict(engine.chunks[0].module.named_parameters())["decoder.final_norm.weight"]
        for step in range(3):
            steps_of(engine, recipe, range(step, step + 1), before_update=checkpoints.before_update)
            if step and rank == 1:
                norm.data[7] = torch.nextafter(norm.data[7], torch.tensor(9.0))
            checkpoints.request(engine, RunState(step=step + 1, position=0, data_hash="h"), background=step == 2)
            checkpoints.wait()
            reported += [
                event.fields.get("differing_copies", []) for event in checkpoints.collect() if event.kind == "save"
            ]
    return reported


def test_a_copy_that_drifted_is_reported(tmp_path: Path) -> None:
    reported, same = run_ranks(2, drift, tmp_path)
    assert reported == same == [[], ["model.decoder.final_norm.weight"], ["model.decoder.final_norm.weight"]]


def drift_of_tied(rank: int, folder: Path) -> list[list[str]]:
    """The same with embeddings tied across two pipeline stages of two tensor ranks: the last stage's copy moves before the
    second save on one tensor rank, before the third on both; the fourth save follows a load. -> the reported copies."""
    changes = {"parallel.tensor": 2, "parallel.pipeline": 2, "model.tie_embeddings": True, "checkpoint.every_steps": 1}
    recipe = recipe_with(**changes)
    reported = []
    with engine_of(recipe, rank=rank, world=4) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        copy = dict(engine.chunks[0].module.named_parameters()).get("output_layer.weight")
        assert (copy is not None) == (rank in (2, 3)), "the last stage's"
        for step in range(3):
            steps_of(engine, recipe, range(step, step + 1), before_update=checkpoints.before_update)
            if copy is not None and step >= 4 - rank:
                copy.data[-1, 5] = torch.nextafter(copy.data[-1, 5], torch.tensor(9.0))
            checkpoints.request(engine, RunState(step=step + 1, position=0, data_hash="h"), background=False)
            reported += [event.fields.get("differing_copies", []) for event in checkpoints.collect()][-1:]
        checkpoints.load(engine, checkpoints.path_of(3))
        checkpoints.request(engine, RunState(step=4, position=0, data_hash="h"), background=False)
        reported += [event.fields.get("differing_copies", []) for event in checkpoints.collect()][-1:]
    return reported


def test_a_tied_embedding_that_drifted_on_another_stage_is_reported_and_repaired_by_loading(tmp_path: Path) -> None:
    name = "model.embedding.word_embeddings.weight"
    for reported in run_ranks(4, drift_of_tied, tmp_path):
        assert reported == [[], [name], [name], []]
    three, four = (read_manifest(tmp_path / f"step_{step:08d}") for step in (3, 4))
    assert three.tensors[name] == four.tensors[name], "the first stage's copy was loaded"


def states_after_loading(rank: int, folder: Path, step: int, world: int) -> dict[str, bytes]:
    """Random states once a checkpoint is loaded, after other numbers were drawn."""
    with engine_of(SMALL, rank=rank, world=world) as engine:
        torch.rand(step + rank)
        checkpoints = CheckpointFolder(folder, SMALL.checkpoint)
        checkpoints.load(engine, checkpoints.path_of(step))
        return {name: state.numpy().tobytes() for name, state in random_states(engine.mesh).items()}


def fresh_states(rank: int) -> dict[str, bytes]:
    with engine_of(SMALL, rank=rank, world=1) as engine:
        return {name: state.numpy().tobytes() for name, state in random_states(engine.mesh).items()}


def test_random_state_at_another_layout_comes_from_seed_and_step(tmp_path: Path) -> None:
    run_ranks(1, train_on, 1, tmp_path, 4)
    assert read_manifest(tmp_path / "step_00000004").layout["world"] == 1
    (first,), (again,) = (run_ranks(1, states_after_loading, tmp_path, 4, 1) for _ in range(2))
    assert first == again, "the same layout takes up what was saved"
    two = run_ranks(2, states_after_loading, tmp_path, 4, 2)
    assert two == run_ranks(2, states_after_loading, tmp_path, 4, 2), "independent of the random numbers drawn before"
    assert two[0] == two[1], "alike on data-parallel ranks"
    (begin,) = run_ranks(1, fresh_states)
    (other, _) = run_ranks(2, states_after_loading, tmp_path, 2, 2)
    for name in two[0]:
        assert two[0][name] not in (begin[name], other[name]), "neither what the run began with nor another step's"
