"""SIGKILL at each disk operation of a save: the next start finds bitwise the old or the new step, and the run ends as an
uninterrupted one."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from crashes import SMALL, Act, Half, contents, train_on
from ranks import RankFailed, run_ranks

from recipes.schema import checkpoint_steps as steps
from train.checkpoint import offline, publishing

OLD, NEW, END = 2, 4, 6
KEEP_ALL = replace(SMALL, checkpoint=replace(SMALL.checkpoint, keep_last=9))
KEEP_ONE = replace(SMALL, checkpoint=replace(SMALL.checkpoint, keep_last=1))
Contents = dict[int, dict[str, str]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of an uninterrupted run, by number of ranks."""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp("whole")
        run_ranks(world, train_on, world, folders[world], END, KEEP_ALL)
    return folders


class KillAt:
    """Kill `rank` before its disk operation `number`, or in the middle of it if it is a write; log which it was."""

    def __init__(self, rank: int, number: int, log: Path) -> None:
        self.rank, self.number, self.log = rank, number, log

    def __call__(self, rank: int, act: Act) -> None:
        if rank != self.rank or act.number != self.number:
            return
        with self.log.open("a") as stream:
            stream.write(f"{act.name} {Path(act.target).name}\n")
        if act.name == "writev":
            raise Half
        os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_save(world: int, rank: int, number: int, *, whole: Path, work: Path, log: Path) -> str | None:
    """From step OLD on, kill during the save of step NEW, which also retires OLD. -> the act, None without one of that
    number; what is left is checked."""
    folder = work / f"{world}-{rank}-{number}"
    shutil.copytree(whole / steps.name_of(OLD), folder / steps.name_of(OLD))
    publishing.point_at(folder, steps.name_of(OLD))
    before = log.read_text().splitlines()
    try:
        run_ranks(world, train_on, world, folder, NEW, KEEP_ONE, KillAt(rank, number, log), timeout_s=60.0)
    except RankFailed as failure:
        after = log.read_text().splitlines()
        assert len(after) == len(before) + 1, failure
        publishing.clean_up(folder)
        found = steps.newest_in(folder)
        assert found is not None, after[-1]
        assert found[1].step in (OLD, NEW)
        assert offline.verify(found[0], lambda _: None) == []
        expected = contents(whole)
        assert all(tensors == expected[step] for step, tensors in contents(folder).items()), after[-1]
        return after[-1]
    shutil.rmtree(folder)
    return None


def test_a_kill_at_every_act_of_a_save(undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """Two ranks; rank 0 dies at every disk operation, from making the folder to deleting the last file of the old step."""
    log = tmp_path / "acts"
    log.touch()
    killed = []
    while (act := kill_in_a_save(2, 0, len(killed), whole=undisturbed[2], work=tmp_path, log=log)) is not None:
        killed.append(act)
    for expected in (
        "mkdir .step_00000004.writing", "writev rank_00000.safetensors", "fsync rank_00000.safetensors",
        "writev index.json", "writev manifest.json", "fsync index.json", "fsync manifest.json",
        "fsync .step_00000004.writing", "rename .step_00000004.writing", "writev .latest.writing",
        "fsync .latest.writing", "rename .latest.writing", "rename step_00000002", "unlink manifest.json",
        "unlink rank_00000.safetensors", "unlink rank_00001.safetensors", "rmdir .step_00000002.deleting",
    ):  # fmt: skip
        assert expected in killed, (expected, killed)
    for number in (1, len(killed) - 1):  # and the run continues from what is left
        folder = tmp_path / f"2-0-{number}"
        (begin, _), _ = run_ranks(2, train_on, 2, folder, END, KEEP_ALL)
        assert begin == steps_left(number, killed)
        assert contents(folder)[END] == contents(undisturbed[2])[END]


def steps_left(number: int, killed: list[str]) -> int:
    """The step that exists after a kill at act `number`: the new one if it has its name."""
    return NEW if number > killed.index("rename .step_00000004.writing") else OLD


@pytest.mark.parametrize(("world", "rank", "number"), [(2, 1, 0), (2, 1, 1), (1, 0, 1), (1, 0, 9)])
def test_a_kill_of_another_rank_or_of_the_only_one(
    world: int, rank: int, number: int, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    log = tmp_path / "acts"
    log.touch()
    assert kill_in_a_save(world, rank, number, whole=undisturbed[world], work=tmp_path, log=log) is not None
    run_ranks(world, train_on, world, tmp_path / f"{world}-{rank}-{number}", END, KEEP_ALL)
    assert contents(tmp_path / f"{world}-{rank}-{number}")[END] == contents(undisturbed[world])[END]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_of_two_ranks_at_every_act(rank: int, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    log = tmp_path / "acts"
    log.touch()
    number = 0
    while kill_in_a_save(2, rank, number, whole=undisturbed[2], work=tmp_path, log=log) is not None:
        run_ranks(2, train_on, 2, tmp_path / f"2-{rank}-{number}", END, KEEP_ALL)
        assert contents(tmp_path / f"2-{rank}-{number}")[END] == contents(undisturbed[2])[END]
        number += 1
    assert number >= (20 if rank == 0 else 2)
