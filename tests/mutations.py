"""Damaged and hostile variants of a small valid file, from a seed; and a check that a reader contains them.

for case, content in mutants(valid, count=20, seed=1): ...        bytes: flipped, cut, repeated, numbers made extreme
for case, content in json_mutants(valid, count=20, seed=1): ...   JSON: values replaced, removed, moved
check_reader(read, {"tokenizer.json": mutants(...)}, folder=tmp_path)
"""

import copy
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.schema.errors import StratumError

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, -(2**63), 10**9, 10**30, 1e308, float("nan"), float("inf"), "", " ", "a", "../../x",
    "/dev/zero", "\x1b[2J", "\n", "\ud800", "{a,b}" * 30, "${oc.env:HOME}", "x" * 100_000, [], {}, [[]], {"a": {}}, [0] * 10_000,
)  # fmt: skip
_EXTREMES = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_CODE_OR_DELETION = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")


def mutants(content: bytes, *, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` variants of `content`, each with a name that says how it was made. The same seed gives the same variants."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        steps = [_changed_bytes(rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
        changed = content
        for change in steps:
            changed = change(changed)
        yield f"bytes {seed}/{number}", changed


def json_mutants(content: bytes, *, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """The same for a JSON text: one or more of its values are replaced, removed, repeated or moved."""
    value = json.loads(content)
    for number in range(count):
        rng = random.Random(f"json {seed} {number}")
        changed = value
        for _ in range(rng.choice((1, 1, 2))):
            changed = mutated_value(changed, rng)
        yield f"json {seed}/{number}", json.dumps(changed).encode()


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A copy of plain values (mappings, lists, texts, numbers) with one of them changed."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    if not places:
        return rng.choice(HOSTILE_VALUES)
    owner, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del owner[key]
        case 1:
            other, other_key = rng.choice(places)
            owner[key] = copy.deepcopy(other[other_key])
        case 2 if isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        case 2:
            owner[rng.choice(("", "extra", "\x1b[31m"))] = owner.pop(key)
        case 3:
            deep: Any = []
            for _ in range(
                250
            ):  # copying takes two calls a level: below the 100 levels of `_places` a second change can still copy it
                deep = [deep]
            owner[key] = deep
        case _:
            owner[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return changed


def check_reader(
    read: Callable[[Path], object],
    files: Mapping[str, Iterable[tuple[str, bytes]]],
    *,
    folder: Path,
    errors: tuple[type[Exception], ...] = (StratumError,),
    seconds: int = 10,
    most_bytes: int = 1 << 30,
) -> None:
    """Call `read(path)` on every variant of every file, in one child process. files: variants by the name of their file, which
    is written to `folder`.

    AssertionError if a variant raises anything but `errors`, kills the process, takes more than `seconds` of processor time or
    six times that in all (other programs may run), takes more than `most_bytes` of memory, starts a program, loads a pickle, or
    changes a file outside `folder`.
    """
    folder = folder.resolve()
    log = folder / ".case"
    cases = ((name, case, content) for name, variants in files.items() for case, content in variants)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _read_all(read, cases, folder=folder, log=log, errors=errors, seconds=seconds, most_bytes=most_bytes)
            status = 0
        except BaseException:
            with log.open("a") as stream:
                stream.write("\n" + traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, (
        f"exit status {os.waitstatus_to_exitcode(status)} (-27, -14: longer than {seconds} s) at {log.read_text()}"
    )


def _read_all(
    read: Callable[[Path], object],
    cases: Iterable[tuple[str, str, bytes]],
    *,
    folder: Path,
    log: Path,
    errors: tuple[type[Exception], ...],
    seconds: int,
    most_bytes: int,
) -> None:
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends the process inside a library's C code too
    peak = _peak_bytes()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _watch(folder)
    for name, case, content in cases:
        path = folder / name
        path.write_bytes(content)
        log.write_text(f"{name}, {case}: ")
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(6 * seconds)
        try:
            read(path)
        except errors as error:
            assert "\x1b" not in str(error), f"the message has an escape code: {str(error)!r}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        path.unlink(missing_ok=True)
        used = max(_peak_bytes(), _peak_bytes(resource.RUSAGE_CHILDREN)) - peak
        assert used <= most_bytes, f"it took {used:,} bytes"


def _peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def _watch(folder: Path) -> None:
    """Make every change outside `folder`, and every start of a program or pickle, an error in this process."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_CODE_OR_DELETION) and arguments[:1] != (None,):
            raise AssertionError(f"{event} {arguments!r:.200}")
        writes = event == "open" and isinstance(arguments[0], str | bytes) and _is_for_writing(arguments)
        if (writes or event in _CHANGES) and not _is_inside(arguments[0], folder):
            raise AssertionError(f"a change outside: {event} {arguments!r:.200}")

    sys.addaudithook(refuse)


def _is_for_writing(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2] or 0
    if os.path.isdir(arguments[0]):
        return False  # a temporary file without a name; nothing else opens a folder for writing
    return any(c in (mode or "") for c in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _is_inside(path: Any, folder: Path) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return True  # a descriptor, which was opened under a name before
    name = os.path.realpath(os.fsdecode(path))
    return name == str(folder) or name.startswith(f"{folder}/") or name == os.devnull


def _places(value: Any, *, levels: int = 100) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key) of the upper levels of plain values."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        if levels > 1:
            yield from _places(value[key], levels=levels - 1)


def _changed_bytes(rng: random.Random) -> Callable[[bytes], bytes]:
    kind = rng.randrange(9)

    def change(content: bytes) -> bytes:
        start = rng.randrange(len(content) + 1)
        stop = min(len(content), start + rng.choice((1, 2, 4, 8, 64, 1024)))
        match kind:
            case 0 | 1 if start < len(content):
                return content[:start] + bytes([content[start] ^ (1 << rng.randrange(8))]) + content[start + 1 :]
            case 2:
                return content[:start]
            case 3:
                return content[:start] + content[stop:]
            case 4:
                return content[:stop] + content[start:stop] * rng.choice((1, 2, 100)) + content[stop:]
            case 5 | 6:
                width = rng.choice((1, 2, 4, 8))
                number = (rng.choice(_EXTREMES) % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
                return content[:start] + number + content[start + width :]
            case 7:
                return content[:start] + bytes(stop - start) + content[stop:]
            case _:
                return content[:start] + rng.randbytes(rng.choice((1, 8, 64))) + content[start:]

    return change
