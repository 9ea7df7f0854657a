"""`stratum logs RUN`: the last lines of a run's newest logs. `--follow` shows new lines as they arrive."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.local.failures import SRUN_LOG
from launch.runs import RunFolder, by_age
from launch.user_errors import exit_status
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import open_regular, printable, printable_lines
from recipes.schema.options import CommandParser, run_named
from recipes.schema.run_folder import last_texts

_POLL_S = 0.5
_CHUNK = 1 << 16
_RANK_LOG = re.compile(r"rank-(\d{1,9})\.log")


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum logs`. -> exit status."""
    parser = CommandParser(
        "logs",
        about="Print the last lines of a run's newest logs: of its ranks, of srun and of its Slurm job.",
        examples="""
stratum logs smoke                                  rank 0, and the job
stratum logs runs/smoke --ranks all -n 5            the last five lines of every rank
stratum logs smoke --follow                         new lines as they arrive
""",
    )
    parser.add_argument("run", metavar="RUN", help="run folder or name")
    parser.add_argument("--ranks", metavar="RANKS", help="ranks to show: 0, 0,3 or all")
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="lines of each log")
    parser.add_argument("-f", "--follow", action="store_true", help="show new lines as they arrive, until Ctrl-C")
    options = parser.parse_args(list(arguments))
    if options.lines < 0:
        parser.error(f"-n {options.lines} is negative. Use 0 or more.")
    return exit_status(lambda: _show(options.run, options.ranks, lines=options.lines, is_following=options.follow))


def _show(name: str, ranks_text: str | None, *, lines: int, is_following: bool) -> int:
    run, ranks = RunFolder(run_named(name)), _ranks(ranks_text or "0")
    paths = logs_of(run, ranks)
    if not is_following:
        _check(run, paths, asked=ranks if ranks_text is not None else None)
    for path in paths:
        texts = [_heading(path), *map(printable, last_texts(path, lines) if lines else [])]
        sys.stdout.write("".join(f"{text}\n" for text in texts))
    sys.stdout.flush()
    try:
        for text in follow(run, ranks) if is_following else ():
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 0
    return 0


def _check(run: RunFolder, paths: Sequence[Path], *, asked: frozenset[int] | None) -> None:
    """RecipeError if there are no logs, or not those of a rank that was asked for."""
    place, found = printable(str(run.path)), _ranks_with_logs(run)
    missing = sorted(asked - found) if asked is not None else []
    if missing:
        some = ", ".join(map(str, sorted(found)[:16])) + ", ..." * (len(found) > 16)
        known = f"It has those of {some}" if found else "It has none of any rank yet"
        named = ", ".join(map(str, missing))
        raise RecipeError(
            f"{place} has no log of rank {named} in its newest attempt. {known}. Use --ranks all for all."
        )
    if not paths:
        raise RecipeError(f"{place} has no logs yet. Wait for them with --follow.")


def _ranks_with_logs(run: RunFolder) -> set[int]:
    """The ranks of the newest attempt that have written a log."""
    paths = [path for folder in run.attempts()[-1:] for path in folder.glob("rank-*.log")]
    return {int(number[1]) for path in paths if (number := _RANK_LOG.fullmatch(path.name)) and path.is_file()}


def logs_of(run: RunFolder, ranks: frozenset[int] | None) -> list[Path]:
    """The job's newest log, then the logs of the newest attempt. ranks: None: all."""
    found = by_age(run.logs.glob("slurm-*.log"))[-1:]
    for folder in run.attempts()[-1:]:
        srun = folder / SRUN_LOG
        found += [srun] if srun.is_file() and srun.stat().st_size else []
        for path in sorted(folder.glob("rank-*.log")):
            number = _RANK_LOG.fullmatch(path.name)
            if number and path.is_file() and (ranks is None or int(number[1]) in ranks):
                found.append(path)
    return found


def follow(run: RunFolder, ranks: frozenset[int] | None) -> Iterator[str]:
    """New text of the newest logs, without end, also of later attempts. A heading names the log whenever it changes."""
    positions = {path: path.stat().st_size for path in logs_of(run, ranks)}
    last: Path | None = None
    while True:
        for path in logs_of(run, ranks):
            try:
                with open_regular(path) as stream:
                    stream.seek(positions.get(path, 0))
                    while data := stream.read(_CHUNK):
                        heading = f"{_heading(path)}\n" if path != last else ""
                        last = path
                        yield heading + printable_lines(data.decode(errors="replace"))
                    positions[path] = stream.tell()
            except OSError:
                continue  # a pipe, or a file that was removed
        time.sleep(_POLL_S)


def _heading(path: Path) -> str:
    return f"==> {printable(str(path))} <=="


def _ranks(text: str) -> frozenset[int] | None:
    try:
        return None if text == "all" else frozenset(int(word) for word in text.split(","))
    except ValueError:
        raise RecipeError(f"--ranks={text} is not a list of ranks. Give ranks as in 0,3, or all.") from None
