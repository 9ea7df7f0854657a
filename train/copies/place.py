"""Where the copies of a run are: a private folder in the memory of each node.

    /dev/shm/stratum-1000-9a04...-5f3c.../      mode 700; the user's number, the container, and a random token of the run
        run                             path of the run's folder: whose copies these are
        NODE/rank_00003.0 ...           the copies on this node (train.copies.slot)

The token is in RUN/memory_copies.json until the run ends without an error. So a folder whose token is not in the run's folder
belongs to nobody, and is removed when the same user starts a run on that node. Other users cannot read the folder, and cannot
guess its name before it is made.

Two containers may share this memory and the user's number, and name different folders alike. So the name has a digest of the
machine's start and the process namespace: a container neither uses nor removes what another one has made. A copied run folder
would bring its token along, so the token's file also names the run's folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from data.system import disk
from data.system.node import node_name, this_machine
from recipes.schema import units
from recipes.schema.foreign import read_bounded_text, read_json

log = logging.getLogger(__name__)

TOKEN = "memory_copies.json"
"""File in the run's folder."""
_RUN = "run"
_MOST_PATH_BYTES = 1 << 14


@dataclass(frozen=True)
class Place:
    """The folders of a run's copies on this node."""

    root: Path
    folder: Path
    """The copies of this node: `root`/NODE."""
    token: str
    node: str


def token_of(run: Path) -> str:
    """The run's token, from its folder; a new one is written the first time. For rank 0. Raises OSError."""
    known = _token_in(run)
    if known is not None:
        return known
    token = secrets.token_hex(16)
    run.mkdir(parents=True, exist_ok=True)
    disk.write_text(run / TOKEN, json.dumps({"token": token, "run": str(run.resolve())}))
    return token


def forget_token(run: Path) -> None:
    """The run needs its copies no more. For rank 0."""
    with contextlib.suppress(OSError):
        disk.remove(run / TOKEN)


def open_place(memory: Path, *, token: str, run: Path) -> Place:
    """The run's folder in this node's memory; made if it does not exist. OSError if it cannot be made or is not this user's."""
    root = memory / f"stratum-{os.getuid()}-{_container()}-{token}"
    place = Place(root, root / node_name(), token, node_name())
    for folder in (place.root, place.folder):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} is not a folder that only this user can open")
    disk.write_text(root / _RUN, str(run.resolve()), is_own=True)
    return place


def remove_place(place: Place) -> None:
    """Remove this node's copies, and the run's folder if no other node of this machine has copies in it."""
    with contextlib.suppress(OSError):
        disk.remove_tree(place.folder)
    with contextlib.suppress(OSError):
        if {path.name for path in place.root.iterdir()} <= {_RUN}:
            disk.remove_tree(place.root)


def remove_orphans(memory: Path, *, but: Place | None = None) -> None:
    """Remove this user's copies of runs that have ended, been deleted, or begun again, if made in this container. Warn about
    those of runs that have not."""
    for root in sorted(memory.glob(f"stratum-{os.getuid()}-{_container()}-*")):
        token = root.name.rsplit("-", 1)[1]
        if (but is not None and root == but.root) or not re.fullmatch(r"[0-9a-f]{32}", token) or root.is_symlink():
            continue
        with contextlib.suppress(OSError, ValueError):
            run = Path(read_bounded_text(root / _RUN, most_bytes=_MOST_PATH_BYTES))
            size = units.size(sum(path.lstat().st_size for path in root.rglob("*") if path.is_file()))
            if _token_in(run) == token:
                log.warning(
                    "%s contains %s of copies of %s, which has not ended. If it will not continue on this machine: rm -r %s",
                    root, size, run, root,
                )  # fmt: skip
            elif run.parent.is_dir():  # otherwise its file system may not be mounted here
                log.warning("removed %s (%s): %s does not need these copies any more", root, size, run)
                disk.remove_tree(root)


def _token_in(run: Path) -> str | None:
    try:
        found = read_json(run / TOKEN)
    except (OSError, ValueError):
        return None
    token = found.get("token") if isinstance(found, dict) else None
    if not isinstance(token, str) or not re.fullmatch(r"[0-9a-f]{32}", token):
        return None
    first = found.get("run")
    if isinstance(first, str) and first != str(run.resolve()) and (Path(first) / TOKEN).is_file():
        return None  # a copy of that run
    return token


def _container() -> str:
    """Which containers of this machine's start may share copies: those with one process namespace."""
    return hashlib.sha256(this_machine().encode()).hexdigest()[:12]
