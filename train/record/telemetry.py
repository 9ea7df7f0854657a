"""Records a run in metrics.jsonl, and shows it in the progress bar, TensorBoard and trackers.

Losses stay on the device in a buffer of one logging interval. `flush` sums the buffer over the ranks once and writes one
line per step. Everything else is made from metrics.jsonl:

    {"kind": "machine", "cpu": ..., "device": ..., "threads": 2, "torch": ..., "flops_per_token": ..., ...}
    {"kind": "step", "step": 12, "tokens": 24576, "loss": ..., "grad_norm": ..., "learning_rate": ..., "seconds": {...}}
                     of chats also "labels": learned ones of the step
    {"kind": "evaluation", "step": 80, "bits_per_byte": {"shakespeare": ..., "python": ...}}
    {"kind": "tasks", "step": 80, "tasks": {"needle-1k": {"hash": ..., "items": 32, "metrics": {"accuracy": {"value": ...}}}}}
    {"kind": "samples", "step": 80, "samples": [{"prompt": ..., "text": ...}]}
    {"kind": "precision", "step": 20, "scaling": "blockwise", "readings": [{"layer": 0, "linear": ..., "snr_db": ...}]}
    {"kind": "skip" | "rollback", "step": 12, "reason": ..., "loss": ..., "grad_norm": ..., "documents": [...], ...}
    {"kind": "experts", "step": 20, "layers": [{"layer": 1, "load_max": 1.3, "entropy": 0.98, "dropped": 0.0, ...}]}
    {"kind": "phase", "name": "saving", "seconds": ...}
    {"kind": "save_requested" | "save_staged" | "save" (durable) | "save_retried" | "save_failed", "step": 100, ...}
    {"kind": "storage_fetch" | "storage_copy" (durable in storage) | "storage_retried" | "storage_failed", "step": 100, ...}
    {"kind": "start" | "resume" | "audit" | "warning" | ..., "step": ..., ...}

Numbers are written so that they read back to the same bits. Lines are only appended: repeated steps after a resume appear
again, and readers use the last. A line cut short by a kill is ended at the next start and skipped by readers.
A failure to write metrics.jsonl stops the run, or its lines wait in memory (`checkpoint.on_failure: continue`). A display that
fails is switched off with a warning.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.starts import process_age_s
from recipes.schema.credentials import without_credentials
from recipes.schema.errors import StratumError
from recipes.schema.run_folder import METRICS, Line
from recipes.schema.telemetry import TelemetryConfig
from train.record.displays import Display, Screen, TensorBoard
from train.record.machine import describe_machine, peak_memory_bytes
from train.record.metrics import JsonLines
from train.record.trackers.build import follow, trackers

log = logging.getLogger(__name__)


class Telemetry:
    """Recorder of one run. Every rank creates one and calls the same methods; only the writer writes and displays."""

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
        data_hash: str = "",
        loss_parts: tuple[str, ...] = (),
        kernels: str = "",
        precision_at: Callable[[int], str] = lambda tokens: "",
        waits_for_space: bool = False,
        load_s: float = 0.0,
    ) -> None:
        """reduce: sums a tensor over all ranks, in place; collective. peak_flops: of all devices together.
        precision_at: text about the precision of a step that starts after this many tokens.

        first_step: steps already finished. data_hash: identity of the prepared data, for trackers. kernels: which CPU kernels
        the ranks run (`train.native.kernel_versions`). waits_for_space: see `JsonLines`. load_s: how long loading the state took,
        until now.

        Raises StratumError if metrics.jsonl cannot be written.
        """
        self._reduce = reduce
        self._device = device
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._loss_parts = loss_parts
        self._losses = torch.zeros(config.log_every_steps, 1 + len(loss_parts), device=device)
        self._pending: list[Line] = []
        self.not_finite: tuple[int, float] | None = None
        """First step since the start whose loss is NaN or infinite, and its loss. Known after a flush, on every rank."""
        self._unhealthy: set[tuple[int, str, str]] = set()
        self._record: JsonLines | None = None
        self._displays: list[Display] = []
        self._screen: Screen | None = None
        if not is_writer:
            return
        self._record = JsonLines(folder / METRICS, waits_for_space=waits_for_space)
        self._screen = Screen(
            total_steps,
            first_step,
            live=config.progress,
            precision_at=lambda tokens: precision_at(tokens - tokens_per_step),
        )
        self._displays.append(self._screen)
        if config.tensorboard:
            self._add("TensorBoard", lambda: TensorBoard(folder / "tensorboard", first_step))
        for name, package, make in trackers(config):
            self._add(
                name,
                lambda name=name, package=package, make=make: follow(  # type: ignore[misc]
                    name, package, make, folder=folder, first_step=first_step, recipe=recipe_dict, data=data_hash
                ),
            )
        self._write(
            [
                {
                    "kind": "machine",
                    **describe_machine(device),
                    "kernels": kernels,
                    "flops_per_token": flops_per_token,
                    "peak_flops": peak_flops,
                    "started_s": process_age_s(),
                    "load_s": load_s,
                }
            ]
        )

    def record(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float,
        learning_rate: float,
        seconds: dict[str, float] | Callable[[], dict[str, float]],
        parts: torch.Tensor | None = None,
        tokens: int | None = None,
        step_tokens: int | None = None,
        labels: int | None = None,
        counts: Mapping[str, int] | None = None,
        is_skipped: bool = False,
    ) -> None:
        """Record one finished step. `loss` is this rank's share; the next flush, possibly in this call, sums it over ranks.

        Nothing is read from the device before the flush. seconds: time of each part; their sum is the step's time. If it is a
        function, it is called at the flush, on the writer only.
        parts: this rank's share of the loss's parts (`loss_parts`). labels: learned labels of the step, where not all are.
        counts: numbers of events so far, such as skipped steps. is_skipped: the step changed no weights, so its loss may be NaN.
        tokens, step_tokens: of all steps so far and of this one, where they do not follow from the number of steps.
        """
        self._losses[len(self._pending), 0] = loss.detach()
        if self._loss_parts:
            assert parts is not None
            self._losses[len(self._pending), 1:] = parts.detach()
        self._pending.append(
            {
                "kind": "step",
                "step": step,
                "tokens": step * self._tokens_per_step if tokens is None else tokens,
                "step_tokens": self._tokens_per_step if step_tokens is None else step_tokens,
                "loss": None,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
                "seconds": seconds,
                "time": time.time(),
                **({} if labels is None else {"labels": labels}),
                **{name: count for name, count in (counts or {}).items() if count},
                **({"skipped": True} if is_skipped else {}),
            }
        )
        if self._screen:
            self._screen.advance(step)
        if len(self._pending) == len(self._losses):
            self.flush()

    def flush(self) -> None:
        """Sum the recorded losses over the ranks and write them. Collective over the world if any step is recorded."""
        if not self._pending:
            return
        losses = self._reduce(self._losses[: len(self._pending)].clone()).tolist()
        lines, self._pending = self._pending, []
        if self.not_finite is None:
            wrong = (
                (line["step"], loss)
                for line, (loss, *_) in zip(lines, losses, strict=True)
                if not line.get("skipped", False)
            )
            self.not_finite = next((found for found in wrong if not math.isfinite(found[1])), None)
        if self._record is None:
            return
        for line, (loss, *parts) in zip(lines, losses, strict=True):
            line["loss"] = loss
            if parts:
                line["loss_parts"] = dict(zip(self._loss_parts, parts, strict=True))
            self._finish(line)
        self._write(lines)

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event at once. It does not flush recorded steps: the training loop does that first."""
        self._write([{"kind": kind, **fields, "time": time.time()}])

    def precision(self, step: int, *, scaling: str, readings: Sequence[Any], policy: str) -> None:
        """Write the quantisation error of each low-precision operand (`train.precision.control.Reading`). Warn if operands
        are below their lower limit that were not at the last measurement; the warning names the worst."""
        if not readings:
            return
        self.event("precision", step=step, scaling=scaling, readings=[asdict(reading) for reading in readings])
        unhealthy = sorted((r for r in readings if not r.is_healthy), key=lambda r: r.snr_db)
        names = {(r.layer, r.linear, r.operand) for r in unhealthy}
        new, self._unhealthy = names - self._unhealthy, names
        if new:
            worst = unhealthy[0]
            self._warn(
                f"step {step}: {len(unhealthy)} of {len(readings)} quantised operands are below their lower limit; the worst: "
                f"{worst.operand} of layer {worst.layer} {worst.linear} at {worst.snr_db:.1f} dB (limit {worst.floor_db:g} dB), "
                f"{worst.saturated:.3%} saturated, {worst.underflowed:.3%} became zero"
                + ("; their layers continue in high precision" if policy == "high_precision" else "")
            )

    def experts(self, step: int, readings: Sequence[Any]) -> None:
        """Write what the routers of `E` layers did since the last call (`train.model.experts.LoadReading`)."""
        if readings:
            self.event("experts", step=step, layers=[asdict(reading) for reading in readings])

    def evaluation(self, step: int, by_source: dict[str, float]) -> None:
        """Write held-out bits per byte by source."""
        self.event("evaluation", step=step, bits_per_byte=by_source)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase other than training (`saving`, `evaluating`), and record how long it took."""
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
        """Close files and the progress bar. Not collective, so it is safe if another rank has failed.

        Steps that were not flushed are written as kind "unreduced_step", without a loss, because that needs a collective.
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
        """Compute what follows from a step's numbers: speed, utilisation, memory."""
        if callable(line["seconds"]):
            line["seconds"] = line["seconds"]()
        step_s = sum(line["seconds"].values())
        line["grad_norm"] = float(line["grad_norm"])
        line["step_s"] = step_s
        line["tokens_per_s"] = line.pop("step_tokens") / step_s
        if self._peak_flops:
            line["mfu"] = self._flops_per_token * line["tokens_per_s"] / self._peak_flops
        line["memory_bytes"] = peak_memory_bytes(self._device)

    def _write(self, lines: list[Line]) -> None:
        if self._record is None or not lines:
            return
        if warning := self._record.write(lines):
            self._warn(warning)
        for display in list(self._displays):
            self._attempt(display, lambda display=display: display.write(lines))  # type: ignore[misc]

    def _add(self, name: str, make: Callable[[], "Display"]) -> None:
        try:
            self._displays.append(make())
        except Exception as error:
            self._warn(f"{name} is off: {_reason(error)}")

    def _attempt(self, display: "Display", act: Callable[[], None]) -> None:
        """Call a display. If it fails it is removed with a warning, because a display must not end a run."""
        try:
            act()
        except Exception as error:
            if display in self._displays:
                self._displays.remove(display)
            self._warn(f"{display.name} is off from now on: {_reason(error)}")

    def _warn(self, text: str) -> None:
        if self._screen not in self._displays:
            log.warning(text)
        self.event("warning", text=text)


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, StratumError | TimeoutError) else f"{type(error).__name__}: {error}"
    return without_credentials(text)
