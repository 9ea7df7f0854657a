"""What a run shows and records: progress bar, metrics.jsonl, TensorBoard, Weights & Biases.

Losses stay on the device, in a buffer of one interval; `flush` sums the buffer over the ranks once and writes one line
per step. metrics.jsonl is the record the others are made from:

    {"kind": "step", "step": 12, "tokens": 24576, "loss": ..., "grad_norm": ..., "learning_rate": ..., "seconds": {...}}
    {"kind": "evaluation", "step": 80, "bits_per_byte": {"shakespeare": ..., "python": ...}}
    {"kind": "start" | "resume" | "save" | "warning" | "end", "step": ..., ...}

Numbers are written so that they read back to the same bits. Lines are only ever appended: after a resume, steps that are
run again appear again, and readers take the last. A line torn by a kill is closed off and skipped by the reader.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.config import TelemetryConfig

METRICS = "metrics.jsonl"

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
}
"""Dense bf16 tensor-core peak by a part of the device's name: NVIDIA data sheets (A10G: half of its 140 TFLOP/s fp8-less
tensor figure with fp32 accumulation)."""


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
    ) -> None:
        """reduce: sums a tensor over all ranks, in place; collective. peak_flops: of all devices together."""
        self._config = config
        self._reduce = reduce
        self._device = device
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._losses = torch.zeros(config.log_every_steps, device=device)
        self._pending: list[dict[str, Any]] = []
        self._last_flush = time.perf_counter()
        self._sinks: list[Any] = []
        if is_writer:
            self._sinks.append(_JsonLines(folder / METRICS))
            self._sinks.append(_Screen(total_steps, first_step, live=config.progress))
            if config.tensorboard:
                self._sinks.append(_TensorBoard(folder / "tensorboard"))
            if config.wandb != "off":
                self._add_wandb(folder, recipe_dict)

    def record(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: float,
        learning_rate: float,
        seconds: dict[str, float],
    ) -> None:
        """Note one finished step; `loss` is this rank's share, summed over ranks at the next flush (which this may be)."""
        self._losses[len(self._pending)] = loss
        self._pending.append(
            {
                "kind": "step",
                "step": step,
                "tokens": step * self._tokens_per_step,
                "loss": 0.0,
                "grad_norm": float(grad_norm),
                "learning_rate": learning_rate,
                "seconds": seconds,
            }
        )
        if len(self._pending) == len(self._losses):
            self.flush()

    def flush(self) -> None:
        """Sum the noted losses over the ranks and write them. Collective over the world if anything is noted."""
        if not self._pending:
            return
        losses = self._reduce(self._losses[: len(self._pending)].clone()).tolist()
        memory = self._memory_bytes()
        for line, loss in zip(self._pending, losses, strict=True):
            line["loss"] = loss
            step_s = sum(line["seconds"].values())
            line["step_s"] = step_s
            line["tokens_per_s"] = self._tokens_per_step / step_s
            if self._peak_flops:
                line["mfu"] = self._flops_per_token * self._tokens_per_step / step_s / self._peak_flops
            line["memory_bytes"] = memory
            self._write(line)
        self._pending.clear()

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event at once. Steps noted before it are flushed by the loop, not here."""
        self._write({"kind": kind, **fields, "time": time.time()})

    def evaluation(self, step: int, by_source: dict[str, float]) -> None:
        """Write held-out bits per byte by source."""
        self._write({"kind": "evaluation", "step": step, "bits_per_byte": by_source, "time": time.time()})

    def close(self) -> None:
        """Close files and the progress bar. Unflushed steps are dropped: the ranks may no longer agree to reduce."""
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()

    def _write(self, line: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(line)

    def _memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _add_wandb(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Weights & Biases must never stop a run: whatever it raises becomes a warning."""
        try:
            self._sinks.append(_WeightsAndBiases(folder, self._config, recipe))
        except Exception as error:
            self.event("warning", text=f"Weights & Biases is off: {type(error).__name__}: {error}")


class _JsonLines:
    """metrics.jsonl, one flushed line per record."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._stream: TextIO = path.open("a")
        if torn:
            self._stream.write("\n")

    def write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


class _Screen:
    """A live bar on a terminal, a plain line per interval elsewhere; events as lines above it."""

    def __init__(self, total_steps: int, first_step: int, *, live: bool) -> None:
        self._console = Console(file=sys.stderr)
        self._total = total_steps
        self._steps_seen = 0
        self._live = live and self._console.is_terminal
        self._bar = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("step", total=total_steps, completed=first_step, numbers="")
        self._bar.start()

    def write(self, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "step":
                numbers = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tok/s"
                if "mfu" in line:
                    numbers += f"  MFU {100 * line['mfu']:.0f} %"
                self._bar.update(self._task, completed=line["step"], numbers=numbers)
                self._steps_seen += 1
                if not self._live and (line["step"] % 10 == 0 or line["step"] == self._total):
                    self._say(f"step {line['step']}/{self._total}  {numbers}  lr {line['learning_rate']:.2e}")
            case "evaluation":
                scores = ", ".join(f"{name} {value:.3f}" for name, value in line["bits_per_byte"].items())
                self._say(f"step {line['step']}: held-out bits per byte: {scores}")
            case "save":
                self._say(f"step {line['step']}: saved {line['path']}")
            case "resume":
                self._say(f"resumed after step {line['step']} ({line['parameters']:,} parameters, {line['layout']})")
            case "start":
                self._say(
                    f"training {line['parameters']:,} parameters on {line['device']}, {line['layout']}, "
                    f"{self._total} steps"
                )
            case "warning":
                self._say(f"warning: {line['text']}")

    def _say(self, text: str) -> None:
        if self._live:
            self._bar.console.print(text, highlight=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        self._bar.stop()


class _TensorBoard:
    """TensorBoard events: one scalar per number."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """The same scalars at Weights & Biases."""

    def __init__(self, folder: Path, config: TelemetryConfig, recipe: dict[str, Any]) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(
            project=config.wandb_project, name=folder.name, dir=str(folder), mode=config.wandb, config=recipe
        )

    def write(self, line: dict[str, Any]) -> None:
        scalars = _scalars(line)
        if scalars:
            self._run.log({**scalars, "step": line["step"]})

    def close(self) -> None:
        self._run.finish()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line worth a curve, by name."""
    match line["kind"]:
        case "step":
            names = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "step_s", "mfu", "memory_bytes")
            seconds = {f"seconds/{name}": value for name, value in line["seconds"].items()}
            return {f"train/{name}": line[name] for name in names if name in line} | seconds
        case "evaluation":
            return {f"heldout_bits_per_byte/{name}": value for name, value in line["bits_per_byte"].items()}
        case _:
            return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; a torn line is left out."""
    lines = []
    with path.open() as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device, FLOP/s: bf16 by name for a GPU (None if unknown), measured in fp32 for a CPU (0.2 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
    size = 1024
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(square, square)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
