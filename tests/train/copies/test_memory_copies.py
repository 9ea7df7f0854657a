"""Copies in memory: a killed process, a lost node and every kind of damage; a run ends bit for bit like an undisturbed one."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from expert_models import MIXTURE
from killed_runs import Kill, Run, contents_at, recipe_in
from ranks import run_ranks
from tiny import GEMMA, engine_of, recipe_with, steps_of

from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.memory_copies import MemoryCopiesConfig
from recipes.schema.recipe import Recipe
from train.checkpoint import storage
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState, read_manifest
from train.copies import memory_copies, place, restore
from train.copies.memory_copies import MemoryCopies, neighbours
from train.copies.restore import open_copies, resume_from_memory
from train.copies.slot import Slot, slots_in
from train.engine import Engine


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in the memory of this machine."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-") as folder:
        yield Path(folder)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank is a node of its own."""
    for module in (place, restore):
        monkeypatch.setattr(module, "node_name", lambda: f"n{os.environ['RANK']}")


def with_copies(recipe: Recipe, folder: Path, **fields: Any) -> Recipe:
    copies = MemoryCopiesConfig(every_steps=1, folder=str(folder), **fields)
    return replace(recipe, run=replace(recipe.run, memory_copies=copies))


def state_of(engine: Engine) -> dict[str, Any]:
    """Fingerprint of each piece of this rank's state, and of its whole weights."""
    _, small = storage.state_at_boundary(engine, RunState(), {})
    pieces = [*storage.state_until_update(engine), *small]
    for chunk in engine.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    chunks = [chunk.module for chunk in engine.chunks]
    weights = {f"{i} {n}": p.detach().clone() for i, chunk in enumerate(chunks) for n, p in chunk.named_parameters()}
    return {piece.label: piece.sums() for piece in pieces} | {n: w.tolist() for n, w in weights.items()}


def copied(engine: Engine, copies: MemoryCopies, recipe: Recipe, steps: range) -> None:
    """Train `steps`, with a copy after each, which may still be in progress at the end."""
    for step in steps:
        steps_of(engine, recipe, range(step, step + 1), before_update=copies.before_update)
        copies.wait()
        engine.mesh.barrier()
        copies.request(engine, RunState(step=step + 1, position=step + 1), stream={})


def back(engine: Engine, copies: MemoryCopies, recipe: Recipe, run: Path) -> tuple[int, list[str]]:
    """Restore the engine from memory. -> the step (0: from nothing, -1: an error), and the notes."""
    checkpoints = CheckpointFolder(run / "checkpoints", recipe.checkpoint)
    try:
        found = resume_from_memory(copies, checkpoints, engine, recipe=recipe, new=RunState())
    except CheckpointError as error:
        return -1, [str(error)]
    text = found.start.text or "" if found.start is not None else "\n".join(found.notes)
    return (found.start.state.step if found.start is not None else 0), text.splitlines()


def _there_and_back(rank: int, world: int, recipe: Recipe, run: Path, lost: tuple[int, ...]) -> None:
    with engine_of(recipe, rank=rank, world=world) as engine:
        copies = open_copies(recipe.run.memory_copies, engine.mesh, run)
        assert copies is not None
        assert copies.prepare(engine, RunState(), stream={}, used=None) is None
        copied(engine, copies, recipe, range(2))
        then = state_of(engine)
        after = steps_of(engine, recipe, range(2, 3), before_update=copies.before_update)
        assert state_of(engine) != then
        copies.wait()
        engine.mesh.barrier()
        if rank in lost:
            shutil.rmtree(copies.place.folder)
        engine.mesh.barrier()
        again = open_copies(recipe.run.memory_copies, engine.mesh, run)
        assert again is not None
        step, notes = back(engine, again, recipe, run)
        assert step == 2, notes
        assert state_of(engine) == then, "weights, masters, moments, buffers, random state"
        assert steps_of(engine, recipe, range(2, 3)) == after, "and so the next step"
        assert not copies.end(1) and copies.place.folder.exists(), "there was no time left to save step 2"
        assert copies.end(2) and not copies.place.folder.exists()


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"run.global_rows": 4}),
        (2, {"parallel.tensor": 2, "precision.scaling": "delayed", "precision.params": "bf16"}),
        (2, GEMMA | {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "run.global_rows": 4}),
        (4, {"parallel.tensor": 2, "precision.params": "bf16", "parallel.overlap_param_gather": True,
             "parallel.overlap_grad_reduce": True}),
        (2, MIXTURE | {"parallel.expert": 2}),
    ],
    ids=["DP2", "TP2 bf16 delayed", "VPP2 tied", "TP2 DP2 overlap", "EP2"],
)  # fmt: skip
def test_a_state_comes_back_from_memory_bit_for_bit_although_a_node_is_lost(
    world: int, changes: dict[str, Any], memory: Path, tmp_path: Path, nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy starts late, when the next step has gradients: nothing that it reads may change before it has read it. Biases of
    experts changed during the reduction of gradients."""
    real = memory_copies.copy_pieces
    monkeypatch.setattr(memory_copies, "copy_pieces", lambda *given: (time.sleep(0.2), real(*given))[1])
    recipe = with_copies(recipe_with(**changes), memory)
    run_ranks(world, _there_and_back, world, recipe, tmp_path, (1,))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def _newest(folder: Path, node: str, rank: int, key: Callable[..., Any] = max) -> Any:
    """The slot with the newest copy of a rank on a node."""
    return key((s for s in slots_in(folder / node, rank) if s.read() is not None), key=lambda s: s.read().manifest.step)


def _rewritten(slot: Any, **fields: Any) -> None:
    slot.publish(replace(slot.read(), **fields).text())


def _of_another_layout(slot: Any) -> None:
    manifest = slot.read().manifest
    _rewritten(slot, manifest=replace(manifest, layout=manifest.layout | {"data": 1, "tensor": 2}))


def _everywhere(root: Path, act: Callable[[Any], object]) -> None:
    """Act upon both newest copies of rank 0."""
    for node in ("n0", "n1"):
        act(_newest(root, node, 0))


DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "nothing": (lambda root: None, 3, "from copies in memory: 2 ranks from their own node, 0 from another."),
    "a truncated copy": (
        lambda root: os.truncate(_newest(root, "n0", 0).path, 1000), 3, "has 1,000 bytes, its record says"),
    "a record without its copy": (
        lambda root: _newest(root, "n0", 0).path.unlink(), 3, "has 0 bytes, its record says"),
    "a flipped bit": (lambda root: _flip(_newest(root, "n0", 0).path), 3, "is damaged: "),
    "a flipped bit in both copies": (
        lambda root: _everywhere(root, lambda slot: _flip(slot.path)), 2, "is damaged: "),
    "a damaged record": (lambda root: _flip(_newest(root, "n0", 0).record_path), 3, "is not the record of a copy"),
    "one rank at another step": (lambda root: _everywhere(root, Slot.invalidate), 2, "copies of step 3 are not complete"),
    "another run": (
        lambda root: _everywhere(root, lambda slot: _rewritten(slot, token="f" * 32)), 2, "is a copy of another run or rank"),
    "another start of the run": (
        lambda root: _everywhere(root, lambda slot: _rewritten(slot, attempt="other")), 2, "copies of step 3 are not complete"),
    "another layout": (lambda root: _everywhere(root, _of_another_layout), 2, "is a copy at another layout (TP2 PP1 DP1"),
    "all at another layout, and no checkpoint": (
        lambda root: [_of_another_layout(slot) for node in ("n0", "n1") for slot in slots_in(root / node)], -1,
        "has copies of this run at another layout (TP2 PP1 DP1 on 2 ranks), and the run has no checkpoint"),
    "both nodes of a rank lost": (
        lambda root: [slot.remove() for node in ("n0", "n1") for slot in slots_in(root / node, 0)], 0,
        "copies of step 3 are not complete: rank 0 lost both."),
}  # fmt: skip
"""{what happens to the copies of steps 2 and 3: (how, step that the run continues from, part of a note)}."""


def _damaged(rank: int, recipe: Recipe, run: Path) -> list[str]:
    """Every kind of damage in turn. -> what was wrong."""
    wrong = []
    with engine_of(recipe, rank=rank, world=2) as engine:
        copies = open_copies(recipe.run.memory_copies, engine.mesh, run)
        assert copies is not None
        assert copies.prepare(engine, RunState(), stream={}, used=None) is None
        copied(engine, copies, recipe, range(3))
        copies.wait()
        engine.mesh.barrier()
        root, good = copies.place.root, run / "good"
        if rank == 0:
            shutil.copytree(root, good)
        for name, (act, expected, part) in DAMAGE.items():
            engine.mesh.barrier()
            if rank == 0:
                shutil.rmtree(root)
                shutil.copytree(good, root)
                act(root)
            engine.mesh.barrier()
            again = open_copies(recipe.run.memory_copies, engine.mesh, run)
            assert again is not None
            step, notes = back(engine, again, recipe, run)
            if step != expected or not any(part in note for note in notes):
                wrong.append(f"{name}: step {step}, {notes}")
    return wrong


def test_damaged_and_foreign_copies_are_refused_with_a_reason_and_the_next_best_is_used(
    memory: Path, tmp_path: Path, nodes: None
) -> None:
    assert run_ranks(2, _damaged, with_copies(recipe_with(), memory), tmp_path) == [[], []]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two ranks without copies, saved only at its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = recipe_in(folder, steps_=10)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_steps=0))
    run = Run(recipe, 2, folder=folder / "said")
    run.attempt(None)
    return run


def run_like(undisturbed: Run, memory: Path, tmp_path: Path) -> Run:
    recipe = replace(undisturbed.recipe, run=replace(undisturbed.recipe.run, folder=str(tmp_path)))
    return Run(with_copies(recipe, memory), 2, folder=tmp_path / "said")


def ends_alike(run: Run, undisturbed: Run) -> None:
    end = "step_00000010"
    assert contents_at(run.checkpoints / end) == contents_at(undisturbed.checkpoints / end)


def test_a_run_whose_node_is_lost_ends_like_an_undisturbed_one(
    undisturbed: Run, memory: Path, tmp_path: Path, nodes: None
) -> None:
    run = run_like(undisturbed, memory, tmp_path)
    assert run.attempt(Kill(steps=5, delay_s=0.0)) and not run.checkpoints.exists()
    (lost,) = memory.glob("stratum-*/n1")
    shutil.rmtree(lost)
    spikes = replace(run.recipe.run.spikes, policy="rollback")
    run.recipe = replace(
        run.recipe,
        run=replace(run.recipe.run, spikes=spikes),
        checkpoint=replace(run.recipe.checkpoint, every_steps=9, keep_last=9, allow=("arithmetic",)),
    )
    run.attempt(None)
    ends_alike(run, undisturbed)
    for path in run.checkpoints.glob("step_*"):  # rollback also saves at the start, which is not step 0 here
        saved = read_manifest(path)
        assert saved.step > 0 and saved.position == saved.step * run.recipe.run.global_rows
    (audit,) = [line["text"] for line in run.metrics if line["kind"] == "audit"]
    assert "from copies in memory: 1 ranks from their own node, 1 from another. Newest checkpoint: none." in audit
    assert {line["step"] for line in run.metrics if line["kind"] == "step"} == {*range(1, 11)}, "none is lost"
    assert not [*memory.iterdir()] and not (run.folder / place.TOKEN).exists(), "removed at the clean end"


def test_memory_that_is_full_in_mid_run_is_said_once_and_the_run_is_unharmed(
    undisturbed: Run, memory: Path, tmp_path: Path, nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MemoryCopies.request

    def request(self: MemoryCopies, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        if named and self.mesh.rank == 1 and self.made == 2:
            monkeypatch.setattr("train.copies.slot.Slot.buffer", full)

    def full(self: Any, size: int) -> Any:
        raise OSError(28, "No space left on device", str(self.path))

    monkeypatch.setattr(MemoryCopies, "request", request)
    run = run_like(undisturbed, memory, tmp_path)
    run.attempt(None)
    ends_alike(run, undisturbed)
    warnings = [line["text"] for line in run.metrics if line["kind"] == "warning"]
    assert (
        len(warnings) == 1
        and "copies in memory (run.memory_copies) are off until the next start: rank 1: /dev/shm/" in warnings[0]
    )
    assert ": No space left on device. Training continues" in warnings[0]
    (line,) = [line for line in run.metrics if line["kind"] == "memory_copies"]
    assert 2 <= line["count"] <= 4


def _too_small(rank: int, recipe: Recipe, run: Path) -> str:
    with engine_of(recipe, rank=rank, world=1) as engine:
        copies = open_copies(recipe.run.memory_copies, engine.mesh, run)
        assert copies is not None
        try:
            copies.prepare(engine, RunState(), stream={}, used=None)
        except RecipeError as error:
            return str(error)
    return ""


def test_memory_that_is_too_small_is_said_before_training(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(memory)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real[:2], 10, *real[3:]]))
    (said,) = run_ranks(1, _too_small, with_copies(recipe_with(), memory), tmp_path)
    assert said.startswith("run.memory_copies needs 0.01 GiB in ") and "--shm-size of a container" in said


def test_the_peer_is_on_another_node_in_any_order_of_ranks() -> None:
    block, cyclic = ["a", "a", "b", "b", "c", "c"], ["a", "b", "c", "a", "b", "c"]
    assert [neighbours(block, rank, peer_nodes=1).peer for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    assert [neighbours(block, rank, peer_nodes=2).peer for rank in range(6)] == [4, 5, 0, 1, 2, 3]
    assert [neighbours(cyclic, rank, peer_nodes=1).peer for rank in range(6)] == [1, 2, 0, 4, 5, 3]
    assert neighbours(block, 2, peer_nodes=1).held == (0,)
    assert neighbours(["a", "a"], 1, peer_nodes=1).peer is None, "one node: no other failure domain"
    assert neighbours(["a", "b", "b"], 0, peer_nodes=1).held == (1, 2), "nodes of different size"
    assert neighbours(block, 2, peer_nodes=0) == replace(neighbours(block, 2, peer_nodes=3), peer=None), (
        "0 and the number of nodes: own node only"
    )


def test_another_users_folder_is_refused(memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = place.token_of(tmp_path)
    assert place.token_of(tmp_path) == token, "a run keeps its token"
    shutil.copytree(tmp_path, memory / "copied")
    assert place.token_of(memory / "copied") != token, "a copied folder is another run"
    opened = place.open_place(memory, token=token, run=tmp_path)
    assert opened.root.stat().st_mode & 0o777 == 0o700
    opened.root.chmod(0o755)
    with pytest.raises(PermissionError, match="is not a folder that only this user can open"):
        place.open_place(memory, token=token, run=tmp_path)
    if os.getuid() == 0:
        opened.root.chmod(0o700)
        os.chown(opened.root, 4711, 4711)
        with pytest.raises(PermissionError):
            place.open_place(memory, token=token, run=tmp_path)


def test_copies_that_no_run_needs_are_removed_by_their_owner(
    memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {}
    for name in ("ended", "stopped", "deleted", "mine"):
        tokens[name] = place.token_of(tmp_path / name)
        opened = place.open_place(memory, token=tokens[name], run=tmp_path / name)
    place.forget_token(tmp_path / "ended")
    shutil.rmtree(tmp_path / "deleted")
    strangers = memory / "stratum-4711-0123"
    strangers.mkdir()
    with monkeypatch.context() as inside:
        inside.setattr(place, "this_machine", lambda: "another container")
        theirs = place.open_place(memory, token=tokens["ended"], run=tmp_path / "ended")
    assert theirs.root != opened.root and theirs.root.is_dir()
    with caplog.at_level(logging.WARNING):
        place.remove_orphans(memory, but=opened)
    assert theirs.root.is_dir(), "made by another container, where this path may be another run"
    shutil.rmtree(theirs.root)
    left = {path.name.rsplit("-", 1)[1] for path in memory.iterdir()}
    assert left == {tokens["stopped"], tokens["mine"], "0123"}
    assert "which has not ended. If it will not continue on this machine: rm -r " in caplog.text
