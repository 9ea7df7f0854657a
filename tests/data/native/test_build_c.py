"""Compiled libraries: checked before they are loaded, built again if wrong, never loaded from a place where others can write."""

import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from mounts import NOEXEC, mount_in_memory
from ranks import run_ranks
from unprivileged import NOBODY, folder_for_anyone, unprivileged

from data.native import build_c

SEVEN = "int stratum_seven(void) { return 7; }"
EIGHT = SEVEN.replace("7", "8")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C source for the test, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STRATUM_NATIVE", raising=False)
    path = tmp_path / f"seven{os.getpid()}.c"
    path.write_text(SEVEN)
    return path


def seven(source: Path) -> int:
    return build_c.load(source).stratum_seven()  # type: ignore[no-any-return]


def libraries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "stratum").glob("*.so"))


def torn(path: Path, tmp_path: Path) -> None:
    with path.open("rb+") as stream:
        stream.truncate(path.stat().st_size // 2)


def edited(path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"")


def linked(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def open_to_others(path: Path, tmp_path: Path) -> None:
    path.chmod(0o777)


def of_another_source(path: Path, tmp_path: Path) -> None:
    """Somebody's code under the name of ours."""
    other = tmp_path / "other.c"
    other.write_text(EIGHT)
    shutil.copy(build_c.load(other)._name, path)


@pytest.mark.parametrize("spoil", [torn, edited, empty, linked, open_to_others, of_another_source])
def test_a_library_that_is_not_the_one_built_is_built_again(
    spoil: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    """Written by another process, because overwriting a library that this process has mapped would crash it."""
    pid = os.fork()
    if pid == 0:
        os._exit(seven(source))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    (path,) = libraries(tmp_path)
    spoil(path, tmp_path)
    assert seven(source) == 7
    assert [p for p in libraries(tmp_path) if p.name.startswith(source.stem)] == [path]
    assert not path.is_symlink() and build_c._is_right(path, path.name.rpartition("-")[0])


def test_built_libraries_are_private_under_any_umask(source: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert seven(source) == 7
    finally:
        os.umask(before)
    for path in (tmp_path / "cache", tmp_path / "cache" / "stratum", *libraries(tmp_path)):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def shared(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def of_a_group(cache: Path) -> None:
    (cache / "stratum").mkdir(parents=True)
    (cache / "stratum").chmod(0o775)


def a_link(cache: Path) -> None:
    cache.mkdir()
    (cache.parent / "theirs").mkdir(mode=0o700)
    (cache / "stratum").symlink_to(cache.parent / "theirs")


def of_another_user(cache: Path) -> None:
    (cache / "stratum").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(cache / "stratum", NOBODY, NOBODY)


def a_file(cache: Path) -> None:
    cache.touch()


def below_a_file(cache: Path) -> None:
    cache.touch()
    os.environ["XDG_CACHE_HOME"] = str(cache / "sub")


def too_long(cache: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache / ("x" * 300))


@pytest.mark.parametrize("spoil", [a_file, below_a_file, too_long])
def test_a_cache_that_cannot_be_made_says_what_to_set(
    spoil: Callable[[Path], None], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        assert seven(source) == 7
    assert "Set XDG_CACHE_HOME to a folder that you can write" in caplog.text


UNSAFE = {"a shared folder": shared, "a group's": of_a_group, "a link": a_link, "of another user": of_another_user}


@pytest.mark.parametrize("where", UNSAFE)
def test_no_code_is_loaded_from_where_others_can_write(
    where: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    UNSAFE[where](tmp_path / "cache")
    if where == "of another user" and os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with caplog.at_level(logging.WARNING):
        library = build_c.load(source)
    assert library.stratum_seven() == 7 and not library._name.startswith(str(tmp_path / "cache"))
    assert "compiled for this process alone" in caplog.text and "no code is loaded from" in caplog.text
    assert not libraries(tmp_path) and not list((tmp_path / "theirs").glob("*"))


def test_a_cache_that_may_not_be_written_is_replaced_by_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with folder_for_anyone() as folder:
        source = folder / "seven.c"
        source.write_text(SEVEN)
        (folder / "cache").mkdir(mode=0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with unprivileged(), caplog.at_level(logging.WARNING):
            library = build_c.load(source)
    assert library.stratum_seven() == 7 and "Permission denied" in caplog.text
    assert "Set XDG_CACHE_HOME to a folder that you can write" in caplog.text


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler that fails if it writes to the full disk of the cache, and works otherwise."""
    path = tmp_path / "cc"
    real = shutil.which("cc") or shutil.which("gcc")
    said = 'echo "ld: final link failed: No space left on device" >&2; echo "collect2: error: ld returned 1 exit status" >&2'
    full = f'case "$*" in *{tmp_path}/cache/*) {said}; exit 1;; esac'
    path.write_text(f'#!/bin/sh\n{full}\nexec {real} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    yield path


def test_a_full_disk_is_left_for_a_private_folder(
    source: Path, tmp_path: Path, compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert seven(source) == 7
    assert "No space left on device" in caplog.text and not list((tmp_path / "cache" / "stratum").iterdir())


def test_a_folder_that_forbids_execution_is_left_for_a_private_one(tmp_path: Path) -> None:
    """A file system that is really mounted noexec: the library is compiled there once, and copied at each start."""
    (tmp_path / "cache").mkdir()
    texts, compiled = run_ranks(1, start_twice_on_noexec, tmp_path)[0]
    for text in texts:
        assert "was copied for this process alone" in text and "failed to map segment" in text, text
        assert "Set XDG_CACHE_HOME to a folder on one that is not mounted noexec" in text, text
    assert compiled == 1


def start_twice_on_noexec(_rank: int, folder: Path) -> tuple[list[str], int]:
    """-> the warnings, and how often the compiler ran."""
    mount_in_memory(folder / "cache", flags=NOEXEC)
    source, compiler = folder / "seven.c", folder / "cc"
    source.write_text(SEVEN)
    compiler.write_text(
        f'#!/bin/sh\necho >> {folder}/compiled\nexec {shutil.which("cc") or shutil.which("gcc")} "$@"\n'
    )
    compiler.chmod(0o755)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "CC": str(compiler)}
    with mock.patch.object(build_c.log, "warning") as warned:
        assert seven(source) == seven(source) == 7
    texts = [call.args[0] % call.args[1:] for call in warned.call_args_list]
    return texts, (folder / "compiled").read_text().count("\n")


def test_two_threads_that_need_a_library_at_once_compile_it_once() -> None:
    calls: list[str] = []

    @build_c.Cached
    def slow(name: str) -> int:
        calls.append(name)
        time.sleep(0.05)
        return len(name)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(slow, ["a", "a", "bb", "a"])) == [1, 1, 2, 1]
    assert sorted(calls) == ["a", "bb"]


def test_without_a_compiler_a_message_names_the_fallback(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    build_c._warn_of_no_compiler.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert build_c.load_if_possible(source, what="seven.c is") is None
        assert build_c.load_if_possible(source, what="another is") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no C compiler found: install gcc, or set CC. Plain torch and numpy are used instead of compiled kernels: several times "
        "slower"
    ]
