"""Traces of single steps: which layer, phase and operation took how long. And when Python may collect garbage.

    RUN/profile/steps_100-103/rank-00000.json.gz       for https://ui.perfetto.dev, with ranges for phases and layers
    RUN/profile/steps_100-103/rank-00000.table.json    the operations that took longest
    RUN/profile/steps_100-103/rank-00000.memory.pickle run.profile_memory on a GPU, for https://pytorch.org/memory_viz

Ranges of layers are of the forward pass. In the backward pass, arrows lead from each forward operation to its gradient's.
Outside the profiled steps the model has no hooks, and a range of a phase costs about 20 microseconds.
"""

import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data.system import disk
from recipes.schema.profile import TABLE, profiled_steps
from recipes.schema.run import RunConfig

log = logging.getLogger(__name__)

_LONGEST = 10


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name a phase of a step in traces."""
    with record_function(name):
        yield


class Profiler:
    """Profiles the steps of `run.profile` on the ranks that shall. Every rank has one; it does nothing elsewhere."""

    def __init__(self, run: RunConfig, *, folder: Path, chunks: Sequence[Any], rank: int, device: torch.device) -> None:
        """folder: the run's. chunks: this rank's parts of the model, wrapped or not."""
        self._run, self._rank, self._chunks = run, rank, chunks
        self._steps = profiled_steps(run)
        if run.profile_ranks and rank not in run.profile_ranks:
            self._steps = range(0)
        self._out = folder / "profile" / f"steps_{run.profile}"
        self._is_on_gpu = device.type == "cuda"
        self._profile: profile | None = None
        self._hooks: list[Any] = []

    def before_step(self, step: int) -> None:
        """Begin to profile if `step`, counted from 1, is the first one to profile, or the first of a resumed run within them."""
        if step in self._steps and self._profile is None:
            for chunk in self._chunks:
                self._hooks += _name_layers(chunk)
            if self._is_on_gpu and self._run.profile_memory:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_on_gpu else [])]
            self._profile = profile(activities=activities, profile_memory=self._run.profile_memory)
            self._profile.start()

    def after_step(self, step: int) -> Path | None:
        """Write the trace after the last profiled step. -> its path, then; None otherwise, or if it cannot be written."""
        if self._profile is None or step + 1 in self._steps:
            return None
        return self.close()

    def close(self) -> Path | None:
        """End profiling, also before its last step. -> the trace, if one was written. A trace that cannot be written is a
        warning: the run is worth more than it."""
        if self._profile is None:
            return None
        finished, self._profile = self._profile, None
        finished.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        trace = self._out / f"rank-{self._rank:05d}.json.gz"
        try:
            self._write(finished, trace)
        except (OSError, RuntimeError) as error:  # RuntimeError: the profiler of PyTorch
            log.warning(
                "no profile: %s cannot be written: %s. The run continues. Free some space or make the folder "
                "writable, and profile later steps.",
                trace,
                error,
            )
            return None
        finally:
            if self._is_on_gpu and self._run.profile_memory:
                torch.cuda.memory._record_memory_history(enabled=None)
        return trace

    def _write(self, finished: profile, trace: Path) -> None:
        """Write the files of a trace. Raises OSError, RuntimeError."""
        self._out.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(trace))
        table = _longest(finished, is_on_gpu=self._is_on_gpu)
        disk.write_text(trace.with_name(trace.name.removesuffix(".json.gz") + TABLE), json.dumps(table))
        if self._is_on_gpu and self._run.profile_memory:
            torch.cuda.memory._dump_snapshot(str(trace).removesuffix(".json.gz") + ".memory.pickle")


class GarbageControl:
    """Switches Python's collector of cyclic garbage off for the time of a loop and runs it after every `every_steps` steps.

    What exists at the start (modules, the model) is left out of collections. 0 changes nothing.
    """

    def __init__(self, every_steps: int) -> None:
        self._every = every_steps

    def __enter__(self) -> Self:
        if self._every:
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect if it is time. Every rank calls it after the same steps, so that all pause together."""
        if self._every and step % self._every == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        if self._every:
            gc.unfreeze()
            gc.enable()


def _name_layers(chunk: Any) -> list[Any]:
    """Hooks that put each layer's forward pass in a range `layer 3 (MambaLayer)`; layers count from 0 over the whole model."""
    hooks = []
    for module in chunk.modules():
        for layer in getattr(getattr(module, "decoder", None), "layers", ()):
            ranges: list[Any] = []  # a stack: recomputation runs a forward pass inside a backward pass
            name = f"layer {layer.layer_number - 1} ({type(layer).__name__})"
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name, ranges=ranges: _open(name, ranges)))
            hooks.append(layer.register_forward_hook(lambda *_, ranges=ranges: _close(ranges), always_call=True))
    return hooks


def _open(name: str, ranges: list[Any]) -> None:
    ranges.append(record_function(name))
    ranges[-1].__enter__()


def _close(ranges: list[Any]) -> None:
    if ranges:
        ranges.pop().__exit__(None, None, None)


def _longest(finished: profile, *, is_on_gpu: bool) -> list[dict[str, Any]]:
    """The operations with the most time of their own: name, calls, seconds, share. Ranges are not operations."""
    averages = [event for event in finished.key_averages() if not event.is_user_annotation]
    seconds = {
        event.key: (event.self_device_time_total if is_on_gpu else event.self_cpu_time_total) / 1e6
        for event in averages
    }
    whole = sum(seconds.values()) or 1.0
    calls = {event.key: event.count for event in averages}
    longest = sorted(seconds, key=lambda key: -seconds[key])[:_LONGEST]
    return [
        {"name": key, "calls": calls[key], "seconds": seconds[key], "share": seconds[key] / whole} for key in longest
    ]
