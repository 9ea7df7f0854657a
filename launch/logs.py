"""`stratum logs RUN`: the last lines of a run's newest logs; `--follow` shows new ones as they come."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.local.failures import SRUN_LOG
from launch.runs import RunFolder
from recipes.schema.errors import StratumError
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser, run_named
from recipes.schema.run_folder import last_texts

_POLL_S = 0.5
_CHUNK = 1 << 16


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum logs`. -> exit status."""
    parser = CommandParser(
        "logs",
        about="The last lines of a run's newest logs: of its ranks, of srun, of its Slurm job.",
        examples="""
stratum logs smoke                                  rank 0, and the job
stratum logs runs/smoke --ranks all -n 5            the last five lines of every rank
stratum logs smoke --follow                         new lines as they come
""",
    )
    parser.add_argument("run", metavar="RUN", help="run folder or name")
    parser.add_argument("--ranks", default="0", metavar="RANKS", help="ranks to show: 0, 0,3 or all")
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="lines of each log")
    parser.add_argument("-f", "--follow", action="store_true", help="show new lines as they come, until Ctrl-C")
    own = parser.parse_args(list(arguments))
    try:
        run = RunFolder(run_named(own.run))
        ranks = None if own.ranks == "all" else frozenset(int(word) for word in own.ranks.split(","))
    except StratumError as error:
        return complain(error)
    except ValueError:
        return complain(f"--ranks={own.ranks}: give ranks as in 0,3, or all")
    paths = logs_of(run, ranks)
    if not paths and not own.follow:
        sys.stderr.write(f"{run.path} has no logs of these ranks yet.\n")
        return 1
    for path in paths:
        sys.stdout.write("".join(f"{line}\n" for line in [f"==> {path} <==", *last_texts(path, own.lines)]))
    sys.stdout.flush()
    try:
        for text in follow(run, ranks) if own.follow else ():
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 0
    return 0


def logs_of(run: RunFolder, ranks: frozenset[int] | None) -> list[Path]:
    """The job's newest log and the newest attempt's logs, in this order. ranks: None takes all."""
    jobs = sorted(run.logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    found = jobs[-1:]
    for folder in run.attempts()[-1:]:
        srun = folder / SRUN_LOG
        found += [srun] if srun.is_file() and srun.stat().st_size else []
        found += [
            path
            for path in sorted(folder.glob("rank-*.log"))
            if ranks is None or int(path.stem.removeprefix("rank-")) in ranks
        ]
    return found


def follow(run: RunFolder, ranks: frozenset[int] | None) -> Iterator[str]:
    """New text of the newest logs for ever, also of attempts that start later; a line says where it changes."""
    places = {path: path.stat().st_size for path in logs_of(run, ranks)}
    last: Path | None = None
    while True:
        for path in logs_of(run, ranks):
            with path.open("rb") as stream:
                stream.seek(places.get(path, 0))
                while data := stream.read(_CHUNK):
                    head = f"==> {path} <==\n" if path != last else ""
                    last = path
                    yield head + data.decode(errors="replace")
                places[path] = stream.tell()
        time.sleep(_POLL_S)
