"""Displays of a run on this machine, in addition to metrics.jsonl: terminal and TensorBoard."""

import errno
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from data.system.console import bars, open_console
from recipes.schema import units
from recipes.schema.foreign import printable_lines
from recipes.schema.run_folder import Line
from train.record.trackers.rows import scalars_of

_ELAPSED, _LEFT = "0:00:00", "9 d 00:00:00 left"
"""The widest texts of the bar's clocks."""


class Display(Protocol):
    """Something that shows or sends lines of the record."""

    name: str

    def write(self, lines: list[Line]) -> None:
        """Show new lines, oldest first: the steps of one interval, or one event."""

    def close(self) -> None:
        """Stop showing."""


class Screen:
    """A live progress bar on a terminal, otherwise a plain line per interval. Events are printed as lines above the bar."""

    name = "the progress display"

    def __init__(
        self, total_steps: int, first_step: int, *, live: bool, precision_at: Callable[[int], str] = lambda tokens: ""
    ) -> None:
        """precision_at: text about the precision of the step that ended after this many tokens."""
        self._console = open_console(stderr=True, wraps=True)
        self._total = total_steps
        self._first = first_step
        self._started: float | None = None
        self._precision_at = precision_at
        self._reward: float | None = None
        """Mean reward of the newest batch of answers; None if the objective has none."""
        self._live = live and self._console.is_terminal
        step = f"{total_steps}/{total_steps}"
        room = max(len("loss 8.8523"), self._console.width - len(f"evaluating  {step}  {_ELAPSED} {_LEFT}") - 1)
        self._bar = bars(
            # On a narrow terminal the bar shrinks first, then the numbers after the loss are cut; the rest always fits.
            TextColumn("[bold]{task.description:<10}", table_column=Column(no_wrap=True, min_width=10)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=_whole(step)),
            TextColumn(
                "{task.fields[numbers]}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=room)
            ),
            TimeElapsedColumn(table_column=_whole(_ELAPSED)),
            TextColumn("[cyan]{task.fields[left]}", table_column=_whole(_LEFT)),
            console=self._console,
            is_shown=self._live,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step, numbers="", left="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Show that a step is done; its numbers follow later. The time left includes evaluations and saves so far."""
        now = time.perf_counter()
        if self._started is None:
            self._started, self._first = now, step
        done = step - self._first
        left = (now - self._started) / done * (self._total - step) if done else math.nan
        self._bar.update(self._task, completed=step, left=f"{units.clock(left)} left" if done else "")

    def describe(self, phase: str) -> None:
        """Show the name of the current phase at the start of the bar."""
        self._bar.update(self._task, description=phase)

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            if line["kind"] == "rollouts":
                self._reward = self._reward if line["reward_mean"] is None else line["reward_mean"]
            if line["kind"] != "step" and (text := self._event_text(line)):
                self._say(text)
        steps = [line for line in lines if line["kind"] == "step"]
        if not steps:
            return
        last = steps[-1]
        speed = len(steps) / sum(1 / line["tokens_per_s"] for line in steps)
        numbers = f"loss {last['loss']:.4f}  {speed:,.0f} tok/s"
        if self._reward is not None:
            numbers = f"reward {self._reward:.3f}  KL {last['loss_parts']['kl']:.4f}  {numbers}"
        if "mfu" in last:
            numbers += f"  MFU {100 * last['mfu'] * speed / last['tokens_per_s']:.0f} %"
        if precision := self._precision_at(last["tokens"]):
            numbers += f"  {precision}"
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
            case "tasks":
                scores = ", ".join(
                    f"{task} {name} {metric['value']:.3f}"
                    for task, entry in line["tasks"].items()
                    for name, metric in list(entry["metrics"].items())[:1]
                )
                return f"step {line['step']}: {scores}"
            case "save":
                shares = f" ({units.size(line['bytes'])} in {line['seconds']:.1f} s)" if "bytes" in line else ""
                return f"step {line['step']}: saved {line['path']}{shares}"
            case "save_retried":
                return f"warning: step {line['step']}: {line['error']} Trying again in {line['wait_s']:g} s."
            case "save_failed":
                return f"warning: step {line['step']} was not saved: {line['error']}"
            case "storage_fetch":
                return f"step {line['step']}: fetched from {line['storage']} in {line['seconds']:.1f} s and verified"
            case "storage_copy":
                size = units.size(line["bytes"])
                return f"step {line['step']}: copied to {line['path']} ({size} in {line['seconds']:.1f} s)"
            case "storage_retried":
                return f"warning: step {line['step']}: {line['error']} Copying again in {line['wait_s']:g} s."
            case "storage_failed":
                return f"warning: {line['error']}"
            case "audit":
                return line["text"]
            case "resume":
                return (
                    f"resumed after step {line['step']} ({line['parameters']:,} parameters, {line['layout']}, "
                    f"{line['precision']}{_kernels(line)})"
                )
            case "start":
                return (
                    f"training {line['parameters']:,} parameters on {line['device']}, {line['layout']}, {self._total} "
                    f"steps, {line['precision']}{_kernels(line)}"
                )
            case _:
                return f"warning: {line['text']}" if line["kind"] == "warning" else None

    def _say(self, text: str) -> None:
        text = printable_lines(text)  # names of sources and folders may contain escape codes
        if self._live:
            self._bar.console.print(text)
            return
        try:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        except OSError as error:  # a log file on a full disk; later lines may find space again
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


class TensorBoard:
    """TensorBoard events: one scalar per number. What an earlier process wrote after `first_step` is hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and off in many runs

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            for name, value in scalars_of(line).items():
                self._writer.add_scalar(name, value, line["step"])
            if line["kind"] == "samples":
                for number, sample in enumerate(line["samples"], start=1):
                    # Markdown: an indented text is shown as it is.
                    text = sample["prompt"] + sample["text"]
                    shown = "\n".join(f"    {part}" for part in printable_lines(text).split("\n"))
                    self._writer.add_text(f"samples/{number}", shown, line["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _whole(widest: str) -> Column:
    """A column that is never shortened."""
    return Column(no_wrap=True, min_width=len(widest))


def _kernels(line: Line) -> str:
    return f", kernels {line['kernels']}" if line.get("kernels") else ""
