"""`stratum doctor --qualify` (`make gpu-day`): does everything that needs a GPU work on this machine, and how fast?

    schedule(options) -> pieces, most valuable first -> run, each a process of its own -> report.md, report.json

A piece that fails, hangs or is killed costs its own time only: the next one starts, and the report is written after every piece.
A piece gets its limit or what is left of the budget; one that would get less than a third of its limit is left out, and the
report says so. What a piece needs and this machine does not have (Transformer Engine, mamba-ssm, a second GPU) is written next to
it; steps then run on the reference and emulated backends of the GPU, which `backend` in the table shows.

`--rehearse` walks the same path on a CPU with small shapes. **The pieces have not been run on a GPU.**
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from launch.children import checkout, python_module, stratum
from launch.doctor.gpu import visible_gpus
from launch.doctor.machine import Machine
from launch.doctor.pieces import Options, Piece, Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from launch.doctor.qualify_report import Reporter

BUDGET_MINUTES = 40.0
SCALINGS = ("delayed", "current", "blockwise", "mxfp8", "nvfp4")
PRECISIONS = ("bf16", "fp8_current", "fp8_blockwise", "fp8_delayed", "mxfp8", "nvfp4")
LEAST_SHARE = 1 / 3
"""A piece starts only with this share of its limit left."""
_TAIL_LINES = 25


def options_of(folder: Path, *, budget_minutes: float, rehearse: bool) -> Options:
    """The options with the facts about this machine that the schedule depends on."""
    machine = Machine()
    have = machine.packages()
    missing = tuple(name for name in ("transformer-engine", "mamba-ssm") if name not in have)
    return Options(folder, budget_minutes, rehearse, gpus=visible_gpus(machine), missing=missing)


def schedule(options: Options) -> list[Piece]:
    """The pieces in order of value; limits are what each may take, not what it will."""
    pieces = [
        Piece("versions", "driver, CUDA, packages, limits", tuple(stratum("doctor", "--json")), 1),
        Piece("torch", "torch's own description of the machine", tuple(python_module("torch.utils.collect_env")), 1),
        _speed(options, "smoke", "bf16", limit=3),
        *_tests(options),
    ]
    pieces += [_speed(options, "smoke", precision, limit=2) for precision in PRECISIONS[1:]]
    for name in ("layers of Nano 12B", "130M"):
        pieces += [_speed(options, name, precision, limit=3) for precision in PRECISIONS]
    name = f"{options.folder.name}-resume"
    small = ("-cn", "nemotron_h_tiny") if options.rehearse else ()
    pieces.append(
        Piece(
            "resume",
            "prepare, train, kill, resume: equal losses to the bit, a sample",
            (*python_module("launch.smoke"), *small, "--name", name, *_here(options)),
            6,
        )
    )
    trace = ("train", "-cn", "smoke", f"run.folder={options.folder}/runs", "run.name=trace", "run.profile=6-7")
    pieces.append(
        Piece("trace", "a profile of two steps, for ui.perfetto.dev",
              (*stratum(*trace), "run.steps=8", "run.profile_memory=true", *_here(options)), 3)
    )  # fmt: skip
    degrees = ("parallel.tensor=2", "parallel.sequence=true")
    pieces.append(
        Piece(
            "two ranks",
            "tensor parallelism over NCCL (gloo in a rehearsal)",
            (
                *python_module("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                "-m",
                "train.speed",
                *_shape(options, "smoke"),
                *degrees,
                "precision=bf16",
                *_here(options),
            ),
            3,
            needs="" if options.gpus > 1 or options.rehearse else "a second GPU",
        )
    )
    return pieces


def _here(options: Options) -> tuple[str, ...]:
    return ("run.device=cpu",) if options.rehearse else ("run.device=cuda",)


def _shape(options: Options, name: str) -> tuple[str, ...]:
    """Recipe arguments of a shape. A rehearsal has the same layers in small."""
    if name == "smoke":
        return ("-cn", "smoke")
    if name == "130M":
        return ("-cn", "nemotron_h_tiny") if options.rehearse else ("-cn", "nemotron_h_130m")
    # One layer of each kind, between layers that fp8_blockwise leaves in bf16 in the whole model.
    model = "smoke" if options.rehearse else "nemotron_nano_12b_v2"
    rows = (
        ("data.row_tokens=256", "run.global_rows=2")
        if options.rehearse
        else ("data.row_tokens=8192", "run.global_rows=4")
    )
    ends = ("precision.high_precision_first=0", "precision.high_precision_last=0")
    return ("-cn", "smoke", f"model={model}", "model.pattern=M-*-", *rows, "run.microbatch_rows=1", *ends)


def _speed(options: Options, name: str, precision: str, *, limit: float) -> Piece:
    words = (*_shape(options, name), f"precision={precision}")
    if precision == "bf16":
        words = tuple(word for word in words if "high_precision" not in word)
    steps = ("--steps", "2" if options.rehearse else "20")
    return Piece(
        f"step: {name}, {precision}", "training steps on random tokens", (*python_module("train.speed"), *words, *steps,
        *_here(options)), limit, plan=words,
    )  # fmt: skip


def _tests(options: Options) -> list[Piece]:
    """`make test-gpu` in pieces: a crash in a kernel ends one process, not all tests."""
    needs = "" if checkout() else "a checkout: an installed wheel has no tests"
    tests = ("-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu")
    pieces = [
        Piece(
            "tests: layers",
            "scan, attention and MLP of both families on this device against float64",
            (*python_module("pytest"), *tests, "tests/gpu/test_layers.py"),
            4,
            needs=needs,
        )
    ]
    if not needs and "transformer-engine" in options.missing:
        needs = "transformer-engine: its kernels cannot be compared"
    for scaling in SCALINGS:
        words = (*python_module("pytest"), *tests, "tests/gpu/test_precision.py", "-k", scaling)
        pieces.append(Piece(f"tests: {scaling}", "quantised numbers, linears, training and resume against emulation", words,
                            4, needs=needs))  # fmt: skip
    return pieces


def dry_run(options: Options) -> str:
    """The schedule as text."""
    lines = [f"{options.budget_minutes:g} minutes, in this order; a piece that fails does not stop the next ones:", ""]
    for number, piece in enumerate(schedule(options), 1):
        lines.append(f"{number:3}. {piece.name}  (at most {piece.limit_minutes:g} min)  {piece.about}")
        lines.append(f"     {'LEFT OUT, needs ' + piece.needs if piece.needs else shown(piece.command)}")
    return "\n".join(lines) + "\n"


def shown(command: Sequence[str]) -> str:
    """A command as a user would type it."""
    return " ".join("python" if word == sys.executable else word for word in command)


def run(pieces: Sequence[Piece], options: Options, report: Reporter) -> list[Result]:
    """Run pieces in their order. Ctrl-C, SIGTERM or a closed terminal (SIGHUP) ends the piece that runs and the schedule; what
    is done is reported."""
    options.folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.budget_minutes
    results = [Result(piece.name, piece.about, shown(piece.command)) for piece in pieces]
    with _stops_as_interrupts():
        for piece, result in zip(pieces, results, strict=True):
            left = ends - time.monotonic()
            if piece.needs:
                result.state, result.reason = "left out", f"needs {piece.needs}"
            elif left < 60 * piece.limit_minutes * LEAST_SHARE:
                result.reason = f"{max(left, 0):.0f} s of the budget were left"
            else:
                report.begin(result)
                try:
                    _run_piece(piece, result, options, seconds=min(left, 60 * piece.limit_minutes))
                except KeyboardInterrupt:
                    result.state, result.reason = "failed", "interrupted; the schedule ends here"
                    report.write(results)
                    break
            report.write(results)
    return results


@contextlib.contextmanager
def _stops_as_interrupts() -> Iterator[None]:
    """Pieces are in sessions of their own: without this, a schedule that is stopped would leave the running one behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_piece(piece: Piece, result: Result, options: Options, *, seconds: float) -> None:
    log = options.folder / f"{''.join(c if c.isalnum() else '-' for c in piece.name)}.log"
    environment = dict(os.environ)
    if options.rehearse:
        environment |= {"STRATUM_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            piece.command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=checkout(),
            env=environment,
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(child)
    result.seconds = time.monotonic() - started
    text = log.read_text(encoding="utf-8", errors="replace")
    if status is None:
        result.state, result.reason = "out of time", f"ended after its limit of {seconds:.0f} s"
    elif status == 0 or (piece.name == "versions" and status == 1):  # findings of doctor are not failures of this piece
        result.state = "passed"
    elif status == 2 and piece.plan:
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        result.state, result.reason = "refused", errors[-1] if errors else "exit status 2"
    else:
        result.state, result.reason = "failed", f"exit status {status}" if status > 0 else f"signal {-status}"
    if "pytest" in piece.command and status in (0, 5):
        counts = text.strip().splitlines()[-1] if text.strip() else ""
        result.reason = counts
        if "passed" not in counts:
            result.state = "skipped"
            result.tail = tail(text)
    if result.state not in ("passed", "skipped"):
        result.tail = tail(text)
    elif piece.plan or piece.name == "two ranks":
        result.figures = last_object(text)
    if piece.plan:
        result.planned = _planned(piece.plan)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a piece and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _planned(words: Sequence[str]) -> dict[str, Any]:
    """The plan for one GPU of this kind; {} with no GPU in the planner's table."""
    name = (Machine().run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "h100").splitlines()[0]
    done = subprocess.run(
        stratum("plan", *words, "--gpus", "1", "--device", name, "--json"), capture_output=True, text=True, check=False
    )
    found = last_object(done.stdout)
    return {key: found[key] for key in ("tokens_per_s_per_gpu", "mfu", "memory_gib_per_rank", "device") if key in found}


def last_object(text: str) -> dict[str, Any]:
    """The last line that contains a JSON object, or {}."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


def tail(text: str) -> str:
    """The last lines of a log."""
    return "\n".join(text.strip().splitlines()[-_TAIL_LINES:])
