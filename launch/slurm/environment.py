"""`python -m launch.slurm.environment`: each job runs it at its start, to warn if packages have changed.

    submission --environment_text--> logs/code/environment.txt --start of a job--> one warning that names the changes

A job runs a copy of this project's code (launch.slurm.snapshot). Installed packages are not copied, because an environment has
gigabytes. In a container the first job writes the list, because the submitting machine has other packages.
"""

import contextlib
import importlib.metadata
import sys
from pathlib import Path

from recipes.schema.foreign import printable, read_bounded_text

ENVIRONMENT = "environment.txt"
"""File in the copy of the code: Python's version, then one line `NAME==VERSION` for each package."""
_SHOWN = 12


def environment_text() -> str:
    """The content of `environment.txt` for this Python."""
    names = {(found.name.lower(), found.version) for found in importlib.metadata.distributions() if found.name}
    lines = [f"python=={sys.version.split()[0]}", *(f"{name}=={version}" for name, version in sorted(names))]
    return "\n".join(lines) + "\n"


def changes(before: str, now: str) -> list[str]:
    """Differences of two environments: `torch 2.14.1 -> 2.15.0`, `numpy 2.3.0 removed`, `rich 14.0 added`."""
    old, new = (dict(line.split("==", 1) for line in text.splitlines() if "==" in line) for text in (before, now))
    found = []
    for name in sorted({*old, *new}):
        match old.get(name), new.get(name):
            case str() as then, str() as version if then != version:
                found.append(f"{name} {then} -> {version}")
            case str() as then, None:
                found.append(f"{name} {then} removed")
            case None, str() as version:
                found.append(f"{name} {version} added")
    return found


def check(path: Path) -> str:
    """Compare this environment with the list at `path`, which is written if it is missing. -> a warning, or ""."""
    now = environment_text()
    try:
        found = changes(read_bounded_text(path), now)
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # read-only mount: the run must not fail because of a warning
            path.write_text(now)
        return ""
    except (OSError, ValueError) as error:
        return f"warning: {path} cannot be read ({error}): whether packages changed since submission is unknown.\n"
    if not found:
        return ""
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return (
        f"warning: packages changed since this run was submitted, so its numbers may change: {printable(shown)}. Restore them, "
        f"or submit the run again to accept the new ones.\n"
    )


def main() -> int:
    """Entry point. Only warns. -> 0"""
    sys.stderr.write(check(Path(__file__).resolve().parents[2] / ENVIRONMENT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
