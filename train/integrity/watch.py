"""Everything that a run checks at a step, around the step itself.

    sampled?  replays -> the step's forward and backward -> judge -> compare state -> update -> remember state

A finding of kind `transient` in the replay repeats the step, whose weights have not changed. Any other ends the run with
CorruptionError after the rank and its host were written to the run's file of suspects.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.schema.errors import CorruptionError
from recipes.schema.integrity import IntegrityConfig
from recipes.schema.run_folder import SUSPECTS
from train.engine import Engine
from train.integrity.findings import Finding, write_suspects
from train.integrity.replay import Rows, StepReplay, is_sampled
from train.integrity.state import StateWatch
from train.record.telemetry import Telemetry
from train.step import StepResult

_MOST_REPEATS = 3


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
        self._replay: StepReplay | None = None
        if config.enabled and config.replay_fraction:
            self._replay = StepReplay(engine, rows=rows, compares_ranks=compares_ranks)

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
        train: Callable[[Callable[[], None]], StepResult],
    ) -> StepResult:
        """Run `train(before_update)`, the step counted from 1, with the checks around it. CorruptionError on every rank."""
        for _ in range(_MOST_REPEATS):
            try:
                result = self._take_once(step, microbatches, before_update=before_update, train=train)
            except StepRepeated:
                continue
            if self._state is not None and self._is_compared(step + 1):
                self._state.remember()
            return result
        raise CorruptionError(
            f"step {step} gave different results each of {_MOST_REPEATS} times. Restart without the hosts in "
            f"{self._folder / SUSPECTS}."
        )

    def _take_once(
        self,
        step: int,
        microbatches: list[Any],
        *,
        before_update: Callable[[], None],
        train: Callable[[Callable[[], None]], StepResult],
    ) -> StepResult:
        replay = self._replay if is_sampled(self._config, step, seed=self._seed) else None
        sample = replay.before(microbatches, step=step) if replay is not None else None

        def checked() -> None:
            if self._state is not None and self._is_compared(step):
                self._act(self._state.check(step))
            if replay is not None and sample is not None:
                self._act(replay.judge(sample))
            before_update()

        if replay is None or sample is None:
            return train(checked)
        with replay.observed(sample):
            return train(checked)

    def _is_compared(self, step: int) -> bool:
        return step % self._config.compare_every_steps == 0

    def _act(self, findings: list[Finding]) -> None:
        """Record findings. Raises StepRepeated if all are transient, else CorruptionError."""
        if not findings:
            return
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
        if all(finding.kind == "transient" for finding in findings):
            self._telemetry.event("warning", text=f"{text}. The step is repeated.")
            raise StepRepeated(text)
        clean = min(finding.clean_step for finding in findings)
        raise CorruptionError(
            f"{text}. Restart without the hosts in {self._folder / SUSPECTS}. The last check that found nothing was at step "
            f"{clean}: later checkpoints may be affected; delete those that you do not trust first."
        )
