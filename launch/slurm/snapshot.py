"""Copies the packages and the user's own recipes when a run is submitted. Jobs run the copy, so later edits of the working tree
do not change a requeued run.

    packages, --config-dir folders --take_snapshot--> runs/NAME/logs/code/{recipes,data,launch,train,config-0,environment.txt}
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.system import disk
from launch.slurm.environment import ENVIRONMENT, environment_text

PACKAGES = ("recipes", "data", "launch", "train")
CODE = "code"
"""Folder of the copy, in a run's logs."""
_PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Snapshot:
    """The copy that a job runs."""

    folder: Path
    """Absolute path."""
    words: list[str]
    """The words of the command, with --config-dir changed to the copy."""


def take_snapshot(logs: Path, words: Sequence[str], *, with_environment: bool) -> Snapshot:
    """Copy everything that a job runs into `logs`/code, replacing an earlier copy. Needs no version control.

    with_environment: also list this Python's packages. False if jobs run in a container, which has other packages.
    """
    folder = logs.resolve() / CODE
    aside = disk.aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(_PROJECT / package, aside / package, ignore=ignored, symlinks=False)
    changed = with_folder(words, folder)
    for number, source in enumerate(config_folders(words)):
        _copy_recipes(source, aside / f"config-{number}")
    if with_environment:
        (aside / ENVIRONMENT).write_text(environment_text())
    shutil.rmtree(folder, ignore_errors=True)
    disk.put_in_place(aside, folder)
    return Snapshot(folder, changed)


def _copy_recipes(source: Path, target: Path) -> None:
    """Copy only the YAML files of a folder and its groups: it may be a run folder, with terabytes of checkpoints.

    Only this user can read the copies: a recipe may contain a URL with a password.
    """
    for path in sorted((*source.glob("*.y*ml"), *source.glob("[!.]*/*.y*ml"))):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o600)


def config_folders(words: Sequence[str]) -> list[Path]:
    """The folders of the user's own recipes that a command line names."""
    found = []
    for position, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            value = value if sign else "".join(words[position + 1 : position + 2])
            if Path(value).is_dir():
                found.append(Path(value))
    return found


def with_folder(words: Sequence[str], folder: Path) -> list[str]:
    """The words, with --config-dir changed to the copy in `folder`."""
    changed, number, follows = [], 0, False
    for word in words:
        name, sign, value = word.partition("=")
        if follows and Path(word).is_dir():
            word, number = str(folder / f"config-{number}"), number + 1
        elif name in ("--config-dir", "-cd") and sign and Path(value).is_dir():
            word, number = f"{name}={folder / f'config-{number}'}", number + 1
        follows = name in ("--config-dir", "-cd") and not sign
        changed.append(word)
    return changed
