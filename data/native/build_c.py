"""C sources of this project, built once for this machine with its compiler: the one place that knows how.

A library lies in the user's cache folder under a name that holds a hash of the source, the flags, the compiler and the
processor, so that nothing stale is ever loaded. Standard library only.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from data.system import disk

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""No fast math: it changes results."""


def load_if_possible(
    *sources: Path, flags: tuple[str, ...] = (), what: str, instead: str = "plain torch"
) -> ctypes.CDLL | None:
    """Like `load`; None where compiled code is not wanted or not possible here, which is said at info level.

    what: said to be not compiled; instead: what does its work then.
    """
    if not wanted():
        return None
    try:
        return load(*sources, flags=flags)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.info("%s not compiled (%s); %s is used instead", what, reason, instead)
        return None


def wanted() -> bool:
    """Whether compiled kernels are to be used at all: STRATUM_NATIVE=0 turns them off."""
    return os.environ.get("STRATUM_NATIVE", "1") != "0"


def load(*sources: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library of these C sources (the first gives its name; the others are headers it includes).

    Raises OSError where there is no compiler or the library cannot be loaded, subprocess.CalledProcessError with the
    compiler's words in `stderr` where it refuses the source.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler found: install gcc, or set CC")
    texts = [source.read_text() for source in sources]
    key = hashlib.sha256("\n".join([*texts, *FLAGS, *flags, compiler, _processor()]).encode()).hexdigest()[:16]
    path = _folder() / f"{sources[0].stem}-{key}.so"
    if not path.exists():
        # Each under a name of its own: ranks that start together do not read each other's unfinished file.
        with disk.written_aside(path, is_own=True) as aside:
            command = [compiler, *FLAGS, *flags, "-shared", "-fPIC", "-o", str(aside), str(sources[0]), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(path))


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratum"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"stratum-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise OSError(f"{folder} belongs to someone else") from None
    return folder


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
