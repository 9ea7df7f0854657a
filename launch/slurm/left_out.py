"""Nodes that a run's next jobs must not use: RUN/logs/exclude, in the form of sbatch --exclude.

    launch.slurm.options, suspects.jsonl --at submission--> exclude <--after each job-- nodes on which two attempts failed

sbatch's command line overrides the script's --exclude, so nodes that the user leaves out are in the file, too.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data.system import disk
from recipes.schema.foreign import read_bounded_text
from recipes.schema.run_folder import SUSPECTS, read_metrics

EXCLUDE = "exclude"
"""File in a run's logs: nodes that the next job must not use, separated by commas."""
_NODE = re.compile(r"[\w.-]+")


def left_out(logs: Path) -> list[str]:
    """The nodes in the file, in order; [] without one."""
    try:
        return _split(read_bounded_text(logs / EXCLUDE))
    except (OSError, ValueError):
        return []


def leave_out(logs: Path, nodes: Iterable[str]) -> None:
    """Add nodes to the file."""
    found, before = sorted({*left_out(logs), *nodes}), left_out(logs)
    if found != before:
        disk.write_text(logs / EXCLUDE, ",".join(found) + "\n")


def of_options(options: str) -> list[str]:
    """Nodes that the user's own sbatch options leave out."""
    words, found = shlex.split(options), []
    for position, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name in ("--exclude", "-x"):
            found += _split(value if sign else "".join(words[position + 1 : position + 2]))
        elif word.startswith("-x") and not word.startswith("--"):
            found += _split(word[2:])
    return found


def suspected(run: Path) -> list[str]:
    """Hosts that computed or stored wrong numbers, by the run's suspects.jsonl: once, or twice if a repetition was right."""
    try:
        lines = read_metrics(run / SUSPECTS)
    except OSError:
        return []
    points: Counter[str] = Counter()
    for line in lines:
        hosts = line.get("hosts")
        for host in set(hosts) if isinstance(hosts, list) and all(isinstance(one, str) for one in hosts) else ():
            points[host] += 1 if line["kind"] == "transient" else 2
    return sorted(host for host, count in points.items() if count > 1 and _NODE.fullmatch(host))


def _split(text: str) -> list[str]:
    """A list of nodes as Slurm writes it: commas inside brackets belong to a node expression."""
    return [word for word in re.split(r",(?![^\[]*\])", text.strip()) if word]
