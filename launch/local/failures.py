"""Finds the rank that failed first, and writes one message with its error, from the records that failing ranks write.

    rank 3: exception --> failure-00003.json {status, time, traceback}      (launch.local.rank)
    all records of an attempt --> the cause: the earliest that is not a lost connection --> one message

When one rank dies, the others lose their connection to it and die moments later, each with a long traceback. Those tracebacks
are consequences: they stay in the log files.
"""

import json
import math
import re
import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.local.continuation import describe
from recipes.schema.foreign import printable, read_bounded, read_json
from recipes.schema.run_folder import last_texts
from recipes.schema.typed import FieldError, build

_CONSEQUENCE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|DistBackendError|DistNetworkError|connectFullMesh|"
    r"Timed out waiting|remote process exited|another rank|see its message",
    re.IGNORECASE,
)
_HUNG = re.compile(r"^hang: (.*)$", re.MULTILINE)
_WAITED = re.compile(r"^(?:hang|lost peer): (.*)$", re.MULTILINE)
"""Lines of train.resilience.hangs. Only the first kind waited for launch.timeout_s: a dead peer is seen at once."""
_SHOWN_LINES = 30
STACK_S = 0.3
"""Time that a rank gets to write its stack."""
STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write the Python stacks of its threads into its log, also while it waits in compiled code (faulthandler)."""
_STACK_FRAMES = 8
SRUN_LOG = "srun.log"
"""Log of srun's own messages, in an attempt's folder."""
_SIGNAL_WORDS = {
    "Out Of Memory": signal.SIGKILL,
    "Killed": signal.SIGKILL,
    "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS,
    "Aborted": signal.SIGABRT,
    "Illegal instruction": signal.SIGILL,
    "Floating point exception": signal.SIGFPE,
}
"""The signal that ended a task, by srun's text for it."""


@dataclass(frozen=True)
class RankFailure:
    """The failure of one rank."""

    rank: int
    status: int
    """Exit status in the form of shells: 128 + the signal's number if a signal killed the process."""
    time: float
    """Seconds since the epoch, by the clock of its host."""
    host: str = ""
    error: str = ""
    """Traceback; empty if the rank's log contains the error, or the rank could not write it."""


def log_of(folder: Path, rank: int) -> Path:
    """The log file of a rank."""
    return folder / f"rank-{rank:05d}.log"


def write_failure(folder: Path, failure: RankFailure) -> None:
    """Write a rank's record. An error is ignored, because the exit status still shows the failure."""
    try:
        (folder / f"failure-{failure.rank:05d}.json").write_text(json.dumps(asdict(failure)))
    except OSError:
        return


def stacks_message(folder: Path, ranks: Iterable[int]) -> str:
    """Where ranks were that did not end, from the stacks that they have written: the main thread's innermost calls. "" without
    any."""
    parts = []
    for rank in sorted(ranks):
        lines = last_texts(log_of(folder, rank), 10_000)
        starts = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
        if starts:
            frames = [line.strip() for line in lines[starts[-1] + 1 :] if line.startswith("  File")]
            shown = [f"    {frame}" for frame in frames[:_STACK_FRAMES]]
            parts.append("\n".join([f"rank {rank} was still running (innermost call first):", *map(printable, shown)]))
    return "\n".join(parts)


def record_stop(folder: Path, status: int) -> None:
    """Record that a rank saved and stopped after a signal: an empty file with the status in its name."""
    (folder / f"stopped-{status}").touch()


def read_stop(folder: Path) -> int | None:
    """Exit status of the ranks that stopped after a signal; None if no rank did."""
    names = [path.name.removeprefix("stopped-") for path in folder.glob("stopped-*")]
    found = [int(name) for name in names if name.isdecimal() and len(name) < 4]
    return max(found, default=None)


def read_failures(folder: Path) -> list[RankFailure]:
    """The records of an attempt, the most likely cause first."""
    found = []
    for path in folder.glob("failure-*.json"):
        try:
            found.append(build(RankFailure, read_json(path), "failure"))
        except (OSError, ValueError, FieldError):
            continue  # half-written by a rank that was killed
    return by_cause(folder, found)


def read_silent_failures(folder: Path) -> list[RankFailure]:
    """Ranks without a record that srun reports as killed (`srun: error: n1: task 1: Killed`).

    Ranks that srun ended afterwards (Terminated) are left out. They come after failures with a record.
    """
    try:
        text = read_bounded(folder / SRUN_LOG).decode(errors="replace")
    except OSError:
        return []
    known = {failure.rank for failure in read_failures(folder)}
    found = []
    for host, ranks, words in re.findall(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*)$", text, re.MULTILINE):
        status = next((128 + number for start, number in _SIGNAL_WORDS.items() if words.startswith(start)), None)
        first = int(re.split(r"[,-]", ranks)[0])
        if status is not None and first not in known:
            found.append(RankFailure(first, status, math.inf, host))
    return found


def first_failure(failures: Iterable[RankFailure], *, timeout_s: float) -> float | None:
    """When the first rank failed; if ranks waited for one that hung, `timeout_s` before they gave up. None without failures."""
    times = [one.time - timeout_s * bool(_HUNG.search(one.error)) for one in failures]
    return min((one for one in times if math.isfinite(one)), default=None)


def is_consequence(folder: Path, failure: RankFailure) -> bool:
    """Whether a rank failed because another one was gone."""
    return bool(_CONSEQUENCE.search(error_text(folder, failure)))


def has_lost_node(folder: Path) -> bool:
    """Whether srun reports that a node of the attempt failed (`srun: error: Node failure on n2`)."""
    try:
        text = read_bounded(folder / SRUN_LOG).decode(errors="replace")
    except OSError:
        return False
    return re.search(r"^srun: error: Node failure on ", text, re.MULTILINE) is not None


def by_cause(folder: Path, failures: list[RankFailure]) -> list[RankFailure]:
    """Failures in order: causes before consequences, then by time."""
    return sorted(failures, key=lambda failure: (is_consequence(folder, failure), failure.time))


def error_text(folder: Path, failure: RankFailure) -> str:
    """The rank's traceback, or the last error message in its log; "" without either."""
    if failure.error:
        return failure.error.rstrip()
    lines = last_texts(log_of(folder, failure.rank), 400)
    starts = [i for i, line in enumerate(lines) if re.match(r"(error( on rank \d+)?: |Fatal Python error)", line)]
    return "\n".join(lines[starts[-1] :]).rstrip() if starts else ""


def failure_message(folder: Path, failures: list[RankFailure], *, seen_live: frozenset[int] = frozenset()) -> str:
    """One message for an attempt's failures, causes first as `by_cause` gives them.

    seen_live: ranks whose output the user has already seen; errors in that output are not repeated. Control characters are
    shown as escapes.
    """
    first, others = failures[0], failures[1:]
    text = error_text(folder, first)
    already_shown = {_bare(error_text(folder, f)) for f in failures if f.rank in seen_live and not f.error}
    head = f"rank {first.rank}{f' on {first.host}' if first.host else ''} failed first, with {describe(first.status)}"
    waited = _WAITED.findall(text)
    if waited:
        head = f"{waited[-1]}. Rank {first.rank} was the first to give up, with {describe(first.status)}"
    if not text:
        last = [f"    {line}" for line in last_texts(log_of(folder, first.rank), 5) if first.rank not in seen_live]
        message = [f"{head}, without a message."] + (["Its last lines:", *last] if last else [])
    elif _bare(text) in already_shown:
        message = [f"{head}: the error above."]
    else:
        message = [f"{head}:", *(f"    {line}" for line in _shortened(text))]
    if others:
        ranks = sorted(f.rank for f in others)
        names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        message.append(f"{'Ranks' if len(ranks) > 1 else 'Rank'} {names} failed after it.")
    message.append(f"Logs: {folder}")
    return "\n".join(map(printable, message))


def _bare(text: str) -> str:
    return re.sub(r"^error on rank \d+: ", "error: ", text)


def _shortened(text: str) -> list[str]:
    lines = text.splitlines()
    if len(lines) <= _SHOWN_LINES:
        return lines
    return [lines[0], f"  ... {len(lines) - _SHOWN_LINES} lines in its log ...", *lines[1 - _SHOWN_LINES :]]
