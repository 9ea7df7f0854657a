"""Everything that a run checks at a step, around the step itself.

    sampled?  replays -> the step's forward and backward -> compare state -> judge the replays -> sum of gradients
              -> sums of products and collectives -> update -> collectives of the update -> remember state

A finding of kind `transient` repeats the step, whose weights have not changed. Any other ends the run with
CorruptionError after the rank and its host were written to the run's file of suspects.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import CorruptionError
from recipes.schema.integrity import IntegrityConfig
from recipes.schema.run_folder import SUSPECTS
from train.checkpoint.random_state import random_states, set_random_states
from train.engine import Engine
from train.integrity.collectives import CollectiveWatch
from train.integrity.findings import Finding, host_name, write_suspects
from train.integrity.replay import Rows, StepReplay, is_sampled
from train.integrity.state import StateWatch
from train.model.experts import Load, loads_of, set_loads
from train.native.product_check import checks_of
from train.record.telemetry import Telemetry
from train.step import StepResult

PRODUCTS = "the sums of products"
COLLECTIVES = "the sums of collectives"
_MOST_REPEATS = 3


@dataclass(frozen=True)
class _Before:
    """What a step changes before its update, as it was at its beginning."""

    random: dict[str, torch.Tensor]
    buffers: list[torch.Tensor]
    loads: list[Load]


@dataclass(frozen=True)
class _SumFault:
    """A product or collective whose sums do not agree."""

    ranks: tuple[int, ...]
    text: str
    detector: str
    is_gather: bool = False


class StepRepeated(Exception):
    """The step's gradients cannot be trusted; nothing has changed yet. Raised on every rank."""


class Integrity:
    """The checks of one run. Every rank has one; its methods are collective over the world."""

    def __init__(
        self,
        config: IntegrityConfig,
        engine: Engine,
        *,
        telemetry: Telemetry,
        folder: Path,
        seed: int,
        rows: Rows | None,
        compares_ranks: bool,
    ) -> None:
        """rows: reads training rows by position. compares_ranks: whether all ranks compute the same bits (equal kernels)."""
        self._config = config
        self._engine = engine
        self._telemetry = telemetry
        self._folder = folder
        self._seed = seed
        self._state = StateWatch(engine) if config.enabled and config.compare_every_steps else None
        is_alone = engine.mesh.layout.world == 1
        self._collectives = CollectiveWatch(engine.mesh, keeps_records=config.collectives and not is_alone)
        self._replay: StepReplay | None = None
        if config.enabled and config.replay_fraction:
            self._replay = StepReplay(engine, collectives=self._collectives, rows=rows, compares_ranks=compares_ranks)
        modules = [chunk.module for chunk in engine.chunks]
        self._buffers = [buffer for module in modules for buffer in module.buffers()] if config.enabled else []
        self._products = [check for module in modules for check in checks_of(module)] if config.enabled else []
        self._sums_collectives = config.enabled and config.collectives and not is_alone
        self._clean_step = 0
        self._accused: set[int] = set()
        """Ranks that checks of sums accused in the current step."""
        self._gathers_again = False

    def forget(self) -> None:
        """The state was filled from a checkpoint."""
        if self._state is not None:
            self._state.forget()

    def take(
        self,
        step: int,
        microbatches: list[Any],
        *,
        before_update: Callable[[], None],
        train: Callable[[Callable[[], None], Callable[[], None]], StepResult],
    ) -> StepResult:
        """Run `train(before_update, after_reduction)`, the step counted from 1, with the checks around it. CorruptionError on
        every rank."""
        mesh = self._engine.mesh
        before = _Before(
            random_states(mesh), [buffer.detach().clone() for buffer in self._buffers], loads_of(self._engine.chunks)
        )
        self._accused.clear()
        for _ in range(_MOST_REPEATS):
            try:
                result = self._take_once(step, microbatches, before_update=before_update, train=train)
            except StepRepeated:
                self._go_back(before)
                continue
            if self._state is not None and self._is_compared(step + 1):
                self._state.remember()
            return result
        raise CorruptionError(
            f"step {step} gave different results each of {_MOST_REPEATS} times. Restart without the hosts in "
            f"{self._folder / SUSPECTS}."
        )

    def _go_back(self, before: "_Before") -> None:
        """Restore what the forward and backward passes of a step may have changed, so that its repetition gives the same bits."""
        set_random_states(before.random, self._engine.mesh, place="the beginning of the step")
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, before.buffers, strict=True):
                buffer.copy_(copy)
        set_loads(self._engine.chunks, before.loads)
        for check in self._products:
            check.take()
        self._collectives.forget()

    def _take_once(
        self,
        step: int,
        microbatches: list[Any],
        *,
        before_update: Callable[[], None],
        train: Callable[[Callable[[], None], Callable[[], None]], StepResult],
    ) -> StepResult:
        replay = self._replay if is_sampled(self._config, step, seed=self._seed) else None
        sample = replay.before(microbatches, step=step) if replay is not None else None

        def before_reduction() -> None:
            if self._state is not None and self._is_compared(step):
                self._act(self._state.check(step))
            if replay is not None and sample is not None:
                self._act(replay.judge(sample))
            before_update()

        def after_reduction() -> None:
            self._act(self._check_sums(step, is_update_made=False))

        with self._collectives.watching() if self._sums_collectives else nullcontext():
            if self._gathers_again:
                self._gather_weights()
            with replay.observed(sample) if replay is not None and sample is not None else nullcontext():
                result = train(before_reduction, after_reduction)
            if self._sums_collectives:
                findings = self._check_sums(step, is_update_made=True)
                if findings and self._gathers_again and all(one.kind == "transient" for one in findings):
                    self._record(findings, "The weights are gathered again.")
                    self._gather_weights()
                    findings = self._check_sums(step, is_update_made=True)
                self._act(findings)
        return result

    def _gather_weights(self) -> None:
        """Gather the weights from the ranks that own them. Collective over the data-parallel groups."""
        self._gathers_again = False
        for chunk in self._engine.chunks:
            chunk.start_param_sync(force_sync=True)

    def _check_sums(self, step: int, *, is_update_made: bool) -> list[Finding]:
        """Products and collectives since the last call. -> what was found, the same on every rank. Collective over the world.

        An update that was made from a wrong sum cannot be undone; a wrong copy of weights can be gathered again.
        """
        mesh = self._engine.mesh
        if not self._products and not self._sums_collectives:
            return []
        faults = [
            _SumFault((mesh.rank,), fault.describe(), PRODUCTS) for check in self._products for fault in check.take()
        ]
        if self._sums_collectives:
            faults += [
                _SumFault(fault.ranks, fault.text, COLLECTIVES, fault.is_gather) for fault in self._collectives.judge()
            ]
        if not mesh.any_rank(bool(faults)):
            self._clean_step = step - (not is_update_made)
            return []
        everyone = mesh.gather_objects((faults, host_name()))
        hosts = [host for _, host in everyone]
        findings = []
        for fault in dict.fromkeys(fault for found, _ in everyone for fault in found):
            is_gone = is_update_made and not fault.is_gather
            is_repeated = bool(self._accused & set(fault.ranks))
            self._gathers_again |= fault.is_gather
            findings.append(
                Finding(
                    detector=fault.detector,
                    kind="transit" if is_gone else "persistent" if is_repeated else "transient",
                    step=step,
                    ranks=fault.ranks,
                    hosts=tuple(hosts[rank] for rank in fault.ranks),
                    clean_step=self._clean_step,
                    text=fault.text,
                )
            )
        self._accused |= {rank for one in findings for rank in one.ranks}
        return findings

    def _is_compared(self, step: int) -> bool:
        return step % self._config.compare_every_steps == 0

    def _record(self, findings: list[Finding], action: str) -> str:
        """Write findings to the run's files; `action` follows in the warning, if there is one. -> the findings in one line."""
        if self._engine.mesh.rank == 0:
            write_suspects(self._folder, findings)
        for finding in findings:
            self._telemetry.event(
                "corruption",
                step=finding.step,
                detector=finding.detector,
                fault=finding.kind,
                ranks=list(finding.ranks),
                hosts=list(finding.hosts),
                clean_step=finding.clean_step,
            )
        text = "; ".join(finding.describe() for finding in findings)
        if action:
            self._telemetry.event("warning", text=f"{text}. {action}")
        return text

    def _act(self, findings: list[Finding]) -> None:
        """Record findings. Raises StepRepeated if all are transient, else CorruptionError."""
        if not findings:
            return
        if all(finding.kind == "transient" for finding in findings):
            raise StepRepeated(self._record(findings, "The step is repeated."))
        text = self._record(findings, "")
        clean = min(finding.clean_step for finding in findings)
        raise CorruptionError(
            f"{text}. Restart without the hosts in {self._folder / SUSPECTS}. The last check that found nothing was at step "
            f"{clean}: later checkpoints may be affected; delete those that you do not trust first."
        )
