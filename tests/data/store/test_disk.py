"""Files are complete or do not exist, after a full disk, a failing block or a second writer."""

import errno
import os
import threading
from pathlib import Path

import pytest

from data.system import disk


class Full:
    """Stands in for the `os` of data.system.disk: one of its calls fails as on a full disk."""

    def __init__(self, act: str) -> None:
        self.act = act

    def __getattr__(self, name: str) -> object:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        return fail if name == self.act else getattr(os, name)


@pytest.mark.parametrize("act", ["writev", "fsync", "rename"])
@pytest.mark.parametrize("is_own", [False, True])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    act: str, is_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    disk.write_text(path, "old", is_own=is_own)
    monkeypatch.setattr(disk, "os", Full(act))
    with pytest.raises(OSError, match="No space left"):
        disk.write_text(path, "new", is_own=is_own)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"] and path.read_text() == "old"


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"), disk.written_aside(tmp_path / "file") as aside:
        aside.write_text("half")
        raise ValueError("half of it")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".file.writing").write_text("much longer than the new content")
    disk.write_text(tmp_path / "file", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "new")]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    names = [disk.aside_of(tmp_path / "file", is_own=True)]
    thread = threading.Thread(target=lambda: names.append(disk.aside_of(tmp_path / "file", is_own=True)))
    thread.start()
    thread.join()
    assert len({*names}) == 2 and {name.parent for name in names} == {tmp_path}
