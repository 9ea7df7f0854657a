"""Files of checkpoints that the system refuses to delete or read, and changed random state. Run without root's rights."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashes import SMALL, Act, contents, train_on
from ranks import run_ranks
from test_fault_matrix import DAMAGE
from unprivileged import folder_for_anyone, give_to_nobody, load_kernels, unprivileged

from recipes.schema import checkpoint_steps as steps
from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import _digest
from train.checkpoint.__main__ import main as command
from train.checkpoint.files import Reader

OLD, NEW = 2, 4
KEEP_ONE = replace(SMALL, checkpoint=replace(SMALL.checkpoint, keep_last=1))


@pytest.fixture
def folder(pair: Path) -> Iterator[Path]:
    """The same, owned by an unprivileged user."""
    load_kernels()
    with folder_for_anyone() as parent:
        shutil.copytree(pair, parent / "checkpoints")
        give_to_nobody(parent)
        yield parent / "checkpoints"


def train_unprivileged(rank: int, world: int, folder: Path, *arguments: Any) -> tuple[int, str, list[str]]:
    """`crashes.train_on` without rights. -> where it began, its notes, what was logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train.checkpoint").addHandler(handler)
    with unprivileged():
        return *train_on(rank, world, folder, *arguments), said


def closed(old: Path) -> None:
    """Its files cannot be deleted; it can be renamed."""
    old.chmod(0o555)


def refuse(name: str, code: int) -> Callable[[int, Act], None]:
    def trap(_rank: int, act: Act) -> None:
        if act.name == name and steps.name_of(OLD) in act.target:
            raise OSError(code, os.strerror(code), act.target)

    return trap


UNDELETABLE: dict[str, tuple[Callable[[Path], None], Callable[[int, Act], None] | None]] = {
    "a folder closed to us": (closed, None),
    "an immutable folder": (lambda old: None, refuse("rename", errno.EPERM)),
    "immutable files": (lambda old: None, refuse("unlink", errno.EPERM)),
    "a file that an NFS client holds open": (lambda old: None, refuse("rmdir", errno.ENOTEMPTY)),
}


@pytest.mark.parametrize("fault", UNDELETABLE)
def test_an_old_step_that_cannot_be_deleted_is_warned_of_once_and_left(fault: str, folder: Path) -> None:
    spoil, trap = UNDELETABLE[fault]
    spoil(folder / steps.name_of(OLD))
    for until in (NEW + 4, NEW + 6):  # two more saves, and a resume with one more
        ((_, _, said),) = run_ranks(1, train_unprivileged, 1, folder, until, KEEP_ONE, trap)
        assert [steps.name_of(OLD) in text and "cannot be deleted" in text for text in said] == [True], said
    kept = [step for step in contents(folder) if step != OLD]
    assert kept == [NEW + 6]
    assert [path for path in folder.iterdir() if steps.name_of(OLD) in path.name]


def test_a_leftover_in_the_way_of_a_save_is_moved_out_of_it(folder: Path) -> None:
    """Files that a killed process left, of the step that is saved next, cannot be deleted."""
    with unprivileged():
        left = folder / f".{steps.name_of(NEW + 2)}.writing"
        left.mkdir()
        (left / "rank_00000.safetensors").write_text("half")
        left.chmod(0o555)
    ((_, _, said),) = run_ranks(1, train_unprivileged, 1, folder, NEW + 2)
    assert len(said) == 1 and "cannot be deleted" in said[0]
    assert NEW + 2 in contents(folder) and (folder / f"{left.name}.deleting").is_dir()


def refuse_step_4(name: str, target: str) -> Callable[[int, Act], None]:
    def trap(_rank: int, act: Act) -> None:
        if act.name == name and Path(act.target).name == target:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), act.target)

    return trap


def test_a_damaged_step_that_cannot_be_renamed_does_not_fail_the_save_of_that_step(folder: Path) -> None:
    """Step 4 is damaged and immutable: training continues from step 2, and the new step 4 gets another name."""
    (folder / steps.name_of(NEW) / "rank_00001.safetensors").unlink()
    trap = refuse_step_4("rename", steps.name_of(NEW))
    ((began, _, said),) = run_ranks(1, train_unprivileged, 1, folder, NEW, SMALL, trap)
    assert began == OLD and len(said) == 1 and f"{steps.name_of(NEW)} cannot be deleted" in said[0], said
    good, notes = steps.candidates(folder)
    assert [path.name for path, _ in good] == ["step_000000004", steps.name_of(OLD)]
    assert (folder / "latest").read_text() == "step_000000004\n" and len(notes) == 1
    ((began, _, said),) = run_ranks(1, train_unprivileged, 1, folder, NEW + 2, KEEP_ONE, trap)
    assert began == NEW and len(said) == 1, said
    assert list(contents_of_good(folder)) == [NEW + 2]


def contents_of_good(folder: Path) -> dict[int, Path]:
    return {manifest.step: path for path, manifest in steps.candidates(folder)[0]}


def test_a_leftover_that_cannot_even_be_renamed_does_not_fail_a_save(folder: Path) -> None:
    left = folder / f".{steps.name_of(NEW + 2)}.writing"
    left.mkdir()

    def trap(_rank: int, act: Act) -> None:
        if act.name in ("rename", "rmdir") and act.target == str(left):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), act.target)

    ((_, _, said),) = run_ranks(1, train_unprivileged, 1, folder, NEW + 2, SMALL, trap)
    assert len(said) == 1 and f"{left} cannot be deleted" in said[0], said
    assert NEW + 2 in contents_of_good(folder) and left.is_dir()


@pytest.mark.parametrize("pointer", ["cannot be replaced", "is a folder"])
def test_a_pointer_that_cannot_be_replaced_does_not_fail_a_save(pointer: str, folder: Path) -> None:
    if pointer == "is a folder":
        (folder / "latest").unlink()
        (folder / "latest" / "inner").mkdir(parents=True)
    trap = refuse_step_4("rename", ".latest.writing")
    ((_, _, said),) = run_ranks(1, train_unprivileged, 1, folder, NEW + 2, SMALL, trap)
    assert NEW + 2 in contents_of_good(folder)
    assert any("latest cannot be replaced" in text and steps.name_of(NEW + 2) in text for text in said), said


UNREADABLE: dict[str, Callable[[Path], Path]] = {
    "a shard": lambda new: new / "rank_00001.safetensors",
    "the index": lambda new: new / "index.json",
    "the manifest": lambda new: new / "manifest.json",
    "the step's folder": lambda new: new,
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_file_that_may_not_be_read_is_an_error_of_reading_and_the_older_step_is_tried(
    fault: str, folder: Path
) -> None:
    path = UNREADABLE[fault](folder / steps.name_of(NEW))
    path.chmod(0)
    for began, notes, _ in run_ranks(2, train_unprivileged, 2, folder, OLD):
        assert began == OLD and "Permission denied" in notes and "another model" not in notes, notes


def look_at_closed(rank: int, folder: Path, mode: int) -> int:
    folder.chmod(mode)
    with unprivileged():
        for look, place in (
            (steps.newest_in, folder),
            (steps.checkpoint_at, folder.parent),
            (steps.checkpoint_at, folder),
        ):
            with pytest.raises(CheckpointError) as caught:
                look(place)
            assert "Permission denied" in str(caught.value)
        return command(["verify", "--all", str(folder)])


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444], ids=oct)
def test_a_folder_of_checkpoints_that_may_not_be_read_is_not_an_empty_one(mode: int, folder: Path) -> None:
    assert run_ranks(1, look_at_closed, folder, mode) == [2]


def edit_state(new: Path, change: Callable[[bytearray], None], key: str = "torch") -> None:
    reader = Reader(new)
    (place,) = reader.index[f"random.00001.{key}"]
    path = new / place.file
    content = bytearray(path.read_bytes())
    state = content[place.start : place.start + place.elements]
    change(state)
    content[place.start : place.start + place.elements] = state
    path.write_bytes(content)


def edit_records(new: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors in the manifest and correct its digest."""
    body = json.loads((new / "manifest.json").read_text())
    body.pop("digest")
    change(body["tensors"])
    (new / "manifest.json").write_text(json.dumps(body | {"digest": _digest(body)}))


def put(state: bytearray, start: int, value: int) -> None:
    state[start] ^= value


TRACKER = "tracker.model-parallel-rng"
EDITS: dict[str, Callable[[Path], None]] = {
    "first byte": lambda new: edit_state(new, lambda s: put(s, 0, 1)),
    "byte in the middle": lambda new: edit_state(new, lambda s: put(s, 2500, 0x80)),
    "last byte": lambda new: edit_state(new, lambda s: put(s, -1, 1)),
    "all zero": lambda new: edit_state(new, lambda s: s.__setitem__(slice(None), bytes(len(s)))),
    "all ones": lambda new: edit_state(new, lambda s: s.__setitem__(slice(None), b"\xff" * len(s))),
    "reversed": lambda new: edit_state(new, lambda s: s.reverse()),
    "the tracker's": lambda new: edit_state(new, lambda s: put(s, 100, 4), TRACKER),
    "record dropped": lambda new: edit_records(new, lambda t: t.pop("random.00001.torch")),
    "another rank's record": lambda new: edit_records(
        new, lambda t: t.update({"random.00001.torch": t["random.00000.torch"] | {"fingerprint": "0" * 32}})
    ),
    "format of another size": lambda new: edit_records(new, lambda t: t["random.00001.torch"].update(dtype="I8")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_checkpoint_with_changed_random_state_is_skipped(edit: str, pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    EDITS[edit](folder / steps.name_of(NEW))
    for began, notes in run_ranks(2, train_on, 2, folder, OLD):
        assert began == OLD and "random.00001" in notes and "damaged" in notes, notes


@pytest.mark.slow
@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_named_without_roots_rights_too(fault: str, folder: Path) -> None:
    with unprivileged():
        DAMAGE[fault](folder / steps.name_of(NEW))
    ((began, notes, _),) = run_ranks(1, train_unprivileged, 1, folder, OLD)
    assert began == OLD and steps.name_of(NEW) in notes
