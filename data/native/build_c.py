"""C sources of this project, built once for this machine with its compiler: the one place that knows how.

    source, flags, compiler, processor --> scan-KEY-DIGEST.so in the user's cache folder, or in a folder of this process alone

The key says what a library was made from, so that nothing stale is loaded; the digest is that of the library itself, and is
compared before it is loaded: loading a torn one would end the process with a bus error. Code is only loaded from files and
folders that nobody but this user (or root) can write, and no link is followed there. Standard library only.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.system import disk

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""No fast math: it changes results."""


class NoCompilerError(OSError):
    """There is no C compiler on PATH."""


class Cached[**P, T]:
    """A function that works once for each of its arguments. If two threads call it at the same time, one waits for the other:
    neither `functools.cache` nor a file in the cache folder would keep them from compiling the same library twice."""

    def __init__(self, work: Callable[P, T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._results: dict[Any, T] = {}
        functools.update_wrapper(self, work)

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        key = (arguments, tuple(named.items()))
        if key not in self._results:
            with self._lock:
                if key not in self._results:
                    self._results[key] = self._work(*arguments, **named)
        return self._results[key]

    def cache_clear(self) -> None:
        """Forget the results."""
        self._results.clear()


def load_if_possible(
    *sources: Path, flags: tuple[str, ...] = (), what: str, instead: str = "plain torch"
) -> ctypes.CDLL | None:
    """Like `load`; None if compiled code is not wanted, or not possible here: that is a warning, for bits may differ.

    what: reported as not compiled; instead: what does its work then.
    """
    if not wanted():
        return None
    try:
        return load(*sources, flags=flags)
    except NoCompilerError as error:
        _warn_of_no_compiler(str(error))
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("%s not compiled (%s); %s is used instead", what, _reason(error), instead)
    return None


@Cached
def _warn_of_no_compiler(reason: str) -> None:
    """Once in a process: every library has the same reason."""
    log.warning("%s. Plain torch and numpy are used instead of compiled kernels: several times slower", reason)


def wanted() -> bool:
    """Whether compiled kernels are to be used at all: STRATUM_NATIVE=0 turns them off."""
    return os.environ.get("STRATUM_NATIVE", "1") != "0"


def load(*sources: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library of these C sources (the first gives its name; the others are headers it includes).

    Raises NoCompilerError without a compiler, OSError if the library cannot be loaded, subprocess.CalledProcessError with the
    compiler's words in `stderr` where it refuses the source.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompilerError("no C compiler found: install gcc, or set CC")
    texts = [source.read_text() for source in sources]
    key = hashlib.sha256("\n".join([*texts, *FLAGS, *flags, compiler, _processor()]).encode()).hexdigest()[:16]
    name = f"{sources[0].stem}-{key}"
    command = [compiler, *FLAGS, *flags, "-shared", "-fPIC", str(sources[0]), "-lm", "-o"]
    kept: Path | None = None
    try:
        folder = _cache_folder()
        kept = _library_in(folder, name) or _build(command, folder, name)
        return _mapped(kept)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _reason(error)
        if isinstance(error, OSError) and error.errno is not None:  # the system's: ours say what to do
            reason += ". Set XDG_CACHE_HOME to a folder that you can write"
    with tempfile.TemporaryDirectory(prefix="stratum-") as private:
        _refuse_open_to_others(Path(private))
        path = (kept and _copy(kept, Path(private), name)) or _build(command, Path(private), name)
        library = _mapped(path)  # it stays mapped when the folder is gone
    made = "compiled" if kept is None else "copied"
    log.warning("%s was %s for this process alone, as it will be at each start: %s", sources[0].name, made, reason)
    return library


def _mapped(path: Path) -> ctypes.CDLL:
    """The library at `path`, loaded. OSError says what to do about a file system that is mounted noexec."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "failed to map segment" not in str(error):
            raise
        raise OSError(
            f"{error}: nothing on its file system may be executed. Set XDG_CACHE_HOME to a folder on one that is not mounted "
            f"noexec"
        ) from error


def _copy(kept: Path, folder: Path, name: str) -> Path | None:
    """A copy of a library in another folder; None if it cannot be read, or is not the one that was built."""
    try:
        content = kept.read_bytes()
    except OSError:
        return None
    if _named(name, content) != kept.name:
        return None
    path = folder / kept.name
    disk.write_new(path, [content])
    return path


def _library_in(folder: Path, name: str) -> Path | None:
    """A library of this name whose content has the digest in its file's name; torn, foreign and linked ones are removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(FileNotFoundError):  # another rank removed it
            if _is_right(path, name):
                return path
            path.unlink()
    return None


def _is_right(path: Path, name: str) -> bool:
    if path.is_symlink():
        return False
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        found = os.fstat(stream.fileno())
        return _is_ours_alone(found) and stat.S_ISREG(found.st_mode) and _named(name, stream.read()) == path.name


def _build(command: list[str], folder: Path, name: str) -> Path:
    """Compile into a folder. The name is given last, so that no process meets an unfinished file."""
    handle, aside = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
    os.close(handle)
    try:
        subprocess.run([*command, aside], check=True, capture_output=True, text=True)
        os.chmod(aside, 0o700)  # whatever the umask is
        path = folder / _named(name, Path(aside).read_bytes())
        disk.put_in_place(Path(aside), path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def _named(name: str, content: bytes) -> str:
    """The file's name of a library with this content."""
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _cache_folder() -> Path:
    """The user's folder of libraries, made if need be. OSError if it cannot be made or others could put code there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    for parent in reversed((base, *base.parents)):
        if not os.path.lexists(parent):
            parent.mkdir(mode=0o700, exist_ok=True)
    folder = base / "stratum"
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    _refuse_open_to_others(folder)
    return folder


def _refuse_open_to_others(folder: Path) -> None:
    """OSError unless only this user and root can change what is in `folder`, or what its path leads to.

    On the way there a folder that others can write is fine if it is sticky, like /tmp: they cannot rename what is not theirs.
    So is a group of the user's own, as many systems give each (the same number as the user's).
    """
    found = os.lstat(folder)
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is a link or not a folder: no code is loaded from there")
    if not _is_ours_alone(found):
        raise OSError(
            f"{folder} belongs to or can be written by other users: no code is loaded from there. Delete it, or set "
            f"XDG_CACHE_HOME to a folder of your own"
        )
    way = Path(os.path.realpath(folder.parent))
    lexical = [parent for parent in folder.parents if parent.is_symlink()]
    for parent in (way, *way.parents, *lexical):
        found = os.lstat(parent)
        by_others = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != found.st_uid else 0)
        is_open = found.st_mode & by_others and not found.st_mode & stat.S_ISVTX and not stat.S_ISLNK(found.st_mode)
        if found.st_uid not in (0, os.geteuid()) or is_open:
            raise OSError(
                f"{parent} belongs to or can be written by other users: no code is loaded from below it. Set XDG_CACHE_HOME to a "
                f"folder of your own, or: chmod go-w {parent}"
            )


def _is_ours_alone(found: os.stat_result) -> bool:
    """Whether a file or folder is this user's or root's, and nobody else can write it."""
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """In one line: the compiler's own first error, or what the system says."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or str(error)).strip().splitlines() or [str(error)]
        # gcc's last line, `collect2: error: ld returned 1`, hides the linker's reason, e.g. `final link failed: No space left`.
        lines = [line for line in lines if not line.startswith("collect2:")] or lines
        return next((line for line in lines if "error" in line.lower() or "failed" in line), lines[0])
    return str(error)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
