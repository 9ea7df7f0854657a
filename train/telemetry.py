"""What a run shows and records: progress bar, metrics.jsonl, TensorBoard, Weights & Biases.

Losses stay on the device, in a buffer of one interval; `flush` sums the buffer over the ranks once and writes one line
per step. metrics.jsonl is the record the others are made from:

    {"kind": "machine", "cpu": ..., "device": ..., "threads": 2, "torch": ..., "flops_per_token": ..., ...}
    {"kind": "step", "step": 12, "tokens": 24576, "loss": ..., "grad_norm": ..., "learning_rate": ..., "seconds": {...}}
    {"kind": "evaluation", "step": 80, "bits_per_byte": {"shakespeare": ..., "python": ...}}
    {"kind": "precision", "step": 20, "scaling": "blockwise", "readings": [{"layer": 0, "linear": ..., "snr_db": ...}]}
    {"kind": "phase", "name": "saving", "seconds": ...}
    {"kind": "save_requested" | "save_staged" | "save" (durable) | "save_retried" | "save_failed", "step": 100, ...}
    {"kind": "start" | "resume" | "audit" | "warning" | ..., "step": ..., ...}

Numbers are written so that they read back to the same bits. Lines are only ever appended: after a resume, steps that
are run again appear again, and readers take the last. A line torn by a kill is closed off and skipped by the reader.
Only metrics.jsonl may stop a run, when its disk is full; a display that fails is switched off with a warning.
"""

import json
import logging
import math
import os
import platform
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train.config import TelemetryConfig
from train.errors import StratumError

METRICS = "metrics.jsonl"
Line = dict[str, Any]
log = logging.getLogger(__name__)

PEAK_BF16_FLOPS = {
    "GB300": 2450e12,
    "GB200": 2450e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
}
"""Dense bf16 peak with fp32 accumulation, FLOP/s, by a part of the device's name; the first part found counts.
Sources: NVIDIA data sheets, half of a figure given with sparsity (A10G: 140 so given); B and GB: dgxc-benchmarking."""


class Telemetry:
    """Recorder of one run. Every rank makes one and calls the same methods; only the writer shows and writes."""

    def __init__(
        self,
        folder: Path,
        config: TelemetryConfig,
        *,
        is_writer: bool,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        total_steps: int,
        first_step: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        recipe_dict: dict[str, Any],
        loss_parts: tuple[str, ...] = (),
    ) -> None:
        """reduce: sums a tensor over all ranks, in place; collective. peak_flops: of all devices together.

        first_step: steps finished before. Raises StratumError where metrics.jsonl cannot be written.
        """
        self._reduce = reduce
        self._device = device
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._loss_parts = loss_parts
        self._losses = torch.zeros(config.log_every_steps, 1 + len(loss_parts), device=device)
        self._pending: list[Line] = []
        self._sick: set[tuple[int, str, str]] = set()
        self._record: _JsonLines | None = None
        self._displays: list[_Display] = []
        self._screen: _Screen | None = None
        if not is_writer:
            return
        self._record = _JsonLines(folder / METRICS)
        self._screen = _Screen(total_steps, first_step, live=config.progress)
        self._displays.append(self._screen)
        if config.tensorboard:
            self._add("TensorBoard", lambda: _TensorBoard(folder / "tensorboard", first_step))
        if config.wandb != "off":
            self._add("Weights & Biases", lambda: _WeightsAndBiases(folder, config, recipe_dict))
        self._write(
            [{"kind": "machine", **_machine(device), "flops_per_token": flops_per_token, "peak_flops": peak_flops}]
        )

    def record(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float,
        learning_rate: float,
        seconds: dict[str, float],
        parts: torch.Tensor | None = None,
    ) -> None:
        """Note one finished step; `loss` is this rank's share, summed over ranks at the next flush (which this may be).

        Nothing is read back from the device before the flush. seconds: of each part of the step; their sum is the step.
        parts: this rank's share of the loss's parts (`loss_parts`).
        """
        self._losses[len(self._pending), 0] = loss.detach()
        if self._loss_parts:
            assert parts is not None
            self._losses[len(self._pending), 1:] = parts.detach()
        self._pending.append(
            {
                "kind": "step",
                "step": step,
                "tokens": step * self._tokens_per_step,
                "loss": None,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
                "seconds": seconds,
                "time": time.time(),
            }
        )
        if self._screen:
            self._screen.advance(step)
        if len(self._pending) == len(self._losses):
            self.flush()

    def flush(self) -> None:
        """Sum the noted losses over the ranks and write them. Collective over the world if anything is noted."""
        if not self._pending:
            return
        losses = self._reduce(self._losses[: len(self._pending)].clone()).tolist()
        lines, self._pending = self._pending, []
        if self._record is None:
            return
        for line, (loss, *parts) in zip(lines, losses, strict=True):
            line["loss"] = loss
            if parts:
                line["loss_parts"] = dict(zip(self._loss_parts, parts, strict=True))
            self._finish(line)
        self._write(lines)

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event at once. Steps noted before it are flushed by the loop, not here."""
        self._write([{"kind": kind, **fields, "time": time.time()}])

    def precision(self, step: int, *, scaling: str, readings: Sequence[Any], policy: str) -> None:
        """Write how well each low-precision operand was quantised (`train.precision.control.Reading`), and warn of those
        that left their band since the last time, by the worst of them."""
        if not readings:
            return
        self.event("precision", step=step, scaling=scaling, readings=[asdict(reading) for reading in readings])
        sick = sorted((r for r in readings if not r.is_healthy), key=lambda r: r.snr_db)
        names = {(r.layer, r.linear, r.operand) for r in sick}
        news, self._sick = names - self._sick, names
        if news:
            worst = sick[0]
            self._warn(
                f"step {step}: {len(sick)} of {len(readings)} quantised operands below their band; the worst: {worst.operand} "
                f"of layer {worst.layer} {worst.linear} at {worst.snr_db:.1f} dB (band from {worst.floor_db:g} dB), "
                f"{worst.saturated:.3%} saturated, {worst.underflowed:.3%} became zero"
                + ("; their layers continue in high precision" if policy == "high_precision" else "")
            )

    def evaluation(self, step: int, by_source: dict[str, float]) -> None:
        """Write held-out bits per byte by source."""
        self.event("evaluation", step=step, bits_per_byte=by_source)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that something else than training goes on (`saving`, `evaluating`), and write how long it took."""
        started = time.perf_counter()
        if self._screen:
            self._screen.describe(name)
        try:
            yield
        finally:
            if self._screen:
                self._screen.describe("training")
        self.event("phase", name=name, seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Close files and the progress bar. Not collective, so that it is safe when another rank has failed.

        Steps never flushed are written as kind "unreduced_step", without a loss: the ranks may not agree to reduce.
        """
        lines, self._pending = self._pending, []
        try:
            for line in lines:
                line["kind"] = "unreduced_step"
                self._finish(line)
            self._write(lines)
        finally:
            for display in list(self._displays):
                self._attempt(display, display.close)
            self._displays.clear()
            self._screen = None
            if self._record:
                self._record.close()
                self._record = None

    def _finish(self, line: Line) -> None:
        """Work out what follows from a step's own numbers."""
        step_s = sum(line["seconds"].values())
        line["grad_norm"] = float(line["grad_norm"])
        line["step_s"] = step_s
        line["tokens_per_s"] = self._tokens_per_step / step_s
        if self._peak_flops:
            line["mfu"] = self._flops_per_token * line["tokens_per_s"] / self._peak_flops
        line["memory_bytes"] = _peak_memory_bytes(self._device)

    def _write(self, lines: list[Line]) -> None:
        if self._record is None or not lines:
            return
        self._record.write(lines)
        for display in list(self._displays):
            self._attempt(display, lambda display=display: display.write(lines))  # type: ignore[misc]

    def _add(self, name: str, make: Callable[[], "_Display"]) -> None:
        try:
            self._displays.append(make())
        except Exception as error:
            self._warn(f"{name} is off: {_reason(error)}")

    def _attempt(self, display: "_Display", act: Callable[[], None]) -> None:
        """Let a display act; one that fails is dropped with a warning, for no display is worth a run."""
        try:
            act()
        except Exception as error:
            if display in self._displays:
                self._displays.remove(display)
            self._warn(f"{display.name} is off from here: {_reason(error)}")

    def _warn(self, text: str) -> None:
        if self._screen not in self._displays:
            log.warning(text)
        self.event("warning", text=text)


class _Display(Protocol):
    """One place where lines are shown or sent."""

    name: str

    def write(self, lines: list[Line]) -> None:
        """Show new lines, oldest first: the steps of one interval, or one event."""

    def close(self) -> None:
        """Show nothing more."""


class _JsonLines:
    """metrics.jsonl: whole lines, handed to the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab+")
            if self._stream.tell() > 0:
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read(1) != b"\n":
                    self._stream.write(b"\n")
        except OSError as error:
            raise self._full(error) from error

    def write(self, lines: list[Line]) -> None:
        text = "".join(json.dumps(_strict(line), allow_nan=False) + "\n" for line in lines)
        try:
            self._stream.write(text.encode())
            self._stream.flush()
        except OSError as error:
            raise self._full(error) from error

    def close(self) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._full(error) from error
        finally:
            self._stream.close()

    def _full(self, error: OSError) -> StratumError:
        return StratumError(
            f"{self._path} cannot be written: {error.strerror or error}. Free space or permit writing there; the same "
            f"command then continues from the newest checkpoint."
        )


class _Screen:
    """A live bar on a terminal, a plain line per interval elsewhere; events as lines above it."""

    name = "the progress display"

    def __init__(self, total_steps: int, first_step: int, *, live: bool) -> None:
        self._console = Console(file=sys.stderr)
        self._total = total_steps
        self._first = first_step
        self._started: float | None = None
        self._live = live and self._console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[left]}"),
            console=self._console,
            refresh_per_second=4,
            disable=not self._live,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step, numbers="", left="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """A step is done, its numbers not known yet. The time left counts evaluations and saves as they came so far."""
        now = time.perf_counter()
        if self._started is None:
            self._started, self._first = now, step
        done = step - self._first
        left = (now - self._started) / done * (self._total - step) if done else math.nan
        self._bar.update(self._task, completed=step, left=f"{_clock(left)} left" if done else "")

    def describe(self, phase: str) -> None:
        """Name what is going on, at the head of the bar."""
        self._bar.update(self._task, description=phase)

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            if line["kind"] != "step" and (text := self._event_text(line)):
                self._say(text)
        steps = [line for line in lines if line["kind"] == "step"]
        if not steps:
            return
        last = steps[-1]
        speed = len(steps) / sum(1 / line["tokens_per_s"] for line in steps)
        numbers = f"loss {last['loss']:.4f}  {speed:,.0f} tok/s"
        if "mfu" in last:
            numbers += f"  MFU {100 * last['mfu'] * speed / last['tokens_per_s']:.0f} %"
        if self._live:
            self._bar.update(self._task, numbers=numbers)
        else:
            self._say(f"step {last['step']}/{self._total}  {numbers}  lr {last['learning_rate']:.2e}")

    def close(self) -> None:
        self._bar.stop()

    def _event_text(self, line: Line) -> str | None:
        match line["kind"]:
            case "evaluation":
                scores = ", ".join(f"{name} {value:.3f}" for name, value in line["bits_per_byte"].items())
                return f"step {line['step']}: held-out bits per byte: {scores}"
            case "save":
                shares = f" ({line['bytes'] / 1e6:,.0f} MB in {line['seconds']:.1f} s)" if "bytes" in line else ""
                return f"step {line['step']}: saved {line['path']}{shares}"
            case "save_retried":
                return f"warning: step {line['step']}: {line['error']} Trying again in {line['wait_s']:g} s."
            case "save_failed":
                return f"warning: step {line['step']} was not saved: {line['error']}"
            case "audit":
                return line["text"]
            case "resume":
                return f"resumed after step {line['step']} ({line['parameters']:,} parameters, {line['layout']})"
            case "start":
                return (
                    f"training {line['parameters']:,} parameters on {line['device']}, {line['layout']}, {self._total} "
                    f"steps"
                )
            case _:
                return f"warning: {line['text']}" if line["kind"] == "warning" else None

    def _say(self, text: str) -> None:
        if self._live:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


class _TensorBoard:
    """TensorBoard events: one scalar per number. What an earlier process wrote past `first_step` is hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            for name, value in _scalars(line).items():
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """The same scalars at Weights & Biases, one run there for one folder here however often it is resumed."""

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: TelemetryConfig, recipe: dict[str, Any]) -> None:
        import wandb

        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            dir=str(folder),
            mode=config.wandb,
            config=recipe,
            id=identity.read_text().strip(),
            resume="allow" if config.wandb == "online" else None,
            # No question on the terminal, no wait without end, no second owner of our output.
            settings=wandb.Settings(silent=True, console="off", login_timeout=10, init_timeout=30, finish_timeout=60),
        )
        self._run.define_metric("*", step_metric="step")  # steps run again are drawn, not refused as out of order

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            if scalars := _scalars(line):
                self._run.log({**scalars, "step": line["step"]})

    def close(self) -> None:
        self._run.finish()


def _scalars(line: Line) -> dict[str, float]:
    """The numbers of a line worth a curve, by name."""
    match line["kind"]:
        case "step":
            names = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "step_s", "mfu", "memory_bytes")
            seconds = {f"seconds/{name}": value for name, value in line["seconds"].items()}
            return {f"train/{name}": line[name] for name in names if name in line} | seconds
        case "evaluation":
            return {f"heldout_bits_per_byte/{name}": value for name, value in line["bits_per_byte"].items()}
        case "precision":
            lowest: dict[str, float] = {}
            for reading in line["readings"]:
                if reading["snr_db"] is not None:
                    name = f"precision/lowest_snr_db/{reading['operand']}"
                    lowest[name] = min(reading["snr_db"], lowest.get(name, math.inf))
            return lowest
        case _:
            return {}


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _strict(value: Any) -> Any:
    """A value as strict JSON can hold it: NaN and infinities become their names, which `read_metrics` turns back."""
    match value:
        case dict():
            return {key: _strict(item) for key, item in value.items()}
        case list() | tuple():
            return [_strict(item) for item in value]
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl in order; a torn line is left out."""
    lines = []
    with path.open("rb") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "kind" in line:
                lines.append(
                    {key: _NOT_FINITE.get(item, item) if isinstance(item, str) else item for key, item in line.items()}
                )
    return lines


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device, FLOP/s: bf16 by name for a GPU (None if unknown), measured in fp32 for a CPU (0.2 s).

    On a CPU it is what this process's threads reach together.
    """
    if device.type == "cuda":
        return peak_by_name(torch.cuda.get_device_name(device))
    size = 1024
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(square, square)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_by_name(name: str) -> float | None:
    """Dense bf16 peak of a GPU by the name its driver gives it; None where we have no figure."""
    words = f" {name} ".replace("-", " ")
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if f" {part} " in words), None)


def _machine(device: torch.device) -> Line:
    return {
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "time": time.time(),
    }


def _cpu_name() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the device for a GPU, of this process (resident) for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
