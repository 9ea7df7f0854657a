"""Reading a run folder that may be damaged or foreign: no call hangs, and only documented errors are raised."""

import json
import os
from pathlib import Path

import pytest

from launch.runs import RunFolder
from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.foreign import read_bounded
from recipes.schema.run_folder import (
    METRICS,
    POINTER,
    RECIPE,
    last_metrics,
    last_texts,
    pointed_at,
    read_metrics,
    recipe_in,
    steps_in,
)


def put(path: Path, kind: str) -> None:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind: str, tmp_path: Path) -> None:
    for name in (RECIPE, METRICS, POINTER, "log"):
        put(tmp_path / name, kind)
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read: .*(not a regular file|Is a directory)"):
        recipe_in(tmp_path)
    for read in (read_metrics, lambda path: pointed_at(path.parent)):
        with pytest.raises(OSError, match=r"not a regular file|directory"):
            read(tmp_path / METRICS)
    assert last_metrics(tmp_path / METRICS) == [] and last_texts(tmp_path / "log", 5) == []
    run = RunFolder(tmp_path)
    assert (run.progress(), run.total_steps(), run.newest_checkpoint(), run.longest_stop_s()) == (None, None, None, 0.0)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 20_000, b"- a\n", b"", b"a: [", b"!!python/object:os.system x"]
)
def test_a_file_that_is_not_a_recipe_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read"):
        recipe_in(tmp_path)
    assert RunFolder(tmp_path).total_steps() is None


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / RECIPE).open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(RecipeError, match="longer than 8,388,608 bytes"):
        recipe_in(tmp_path)
    with pytest.raises(OSError, match="longer than 10 bytes"):
        read_bounded(tmp_path / RECIPE, most_bytes=10)


def test_torn_and_foreign_lines_of_a_record_are_left_out(tmp_path: Path) -> None:
    good = {"kind": "step", "step": 1, "loss": "NaN", "parts": {"a": ["-Infinity", "'NaN"]}}
    lines = [b"[" * 20_000, b'{"step": 2}', b"\xff", b"3", json.dumps(good).encode(), b'{"kind": "st']
    (tmp_path / METRICS).write_bytes(b"\n".join(lines))
    for (line,) in (read_metrics(tmp_path / METRICS), last_metrics(tmp_path / METRICS)):
        assert line["loss"] != line["loss"] and line["parts"] == {"a": [float("-inf"), "NaN"]}


def test_steps_are_listed_by_number(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000002", "step_x", ".step_00000011.writing", "step_²"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000012").write_text("no folder")
    assert [path.name for path in steps_in(tmp_path)] == ["step_00000002", "step_00000010"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            steps_in(tmp_path)
    finally:
        tmp_path.chmod(0o755)
