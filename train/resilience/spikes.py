"""Finds steps whose loss or gradient is not finite, or an outlier, and keeps the ledger of what was done about them.

The rule is OLMo-core's (`SkipStepOptimizer`): a value more than `sigma` standard deviations above the mean of the values of the
last `window_steps` steps is an outlier, for the loss and for the gradient norm alike. The step's own value is not part of the
window that it is compared with, and joins it afterwards whether it was an outlier or not, so that a lasting change of level is
accepted after a while. The decision is made from sums over all ranks before weights and moments change.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.dataset import Dataset
from data.order.left_out import left_out
from data.trace import pieces_of
from recipes.schema.errors import NumericsError
from recipes.schema.ledger import Ledger
from recipes.schema.spikes import SpikesConfig

MOST_DOCUMENTS = 64
"""Documents of a step that a record names; it says how many there are."""
_CHARS = 120
_SHOWN = 3
"""Documents named in a warning."""


@dataclass(frozen=True)
class Spike:
    """A step whose update was not made."""

    step: int
    """Counted from 1."""
    reason: str
    loss: float
    grad_norm: float


class SpikeWatch:
    """Decides about each step of a run. Every rank has one and passes it the same numbers."""

    def __init__(self, config: SpikesConfig, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._losses = deque(ledger.losses, maxlen=config.window_steps)
        self._grad_norms = deque(ledger.grad_norms, maxlen=config.window_steps)

    @property
    def ledger(self) -> Ledger:
        """What checkpoints record."""
        return replace(self._ledger, losses=tuple(self._losses), grad_norms=tuple(self._grad_norms))

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this mean loss and gradient norm must not change the weights; None if it may. Changes nothing."""
        for name, value, window in (
            ("loss", loss, self._losses),
            ("gradient norm", grad_norm, self._grad_norms),
        ):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if self._config.sigma == 0 or len(window) < self._config.window_steps // 2:
                continue
            mean, deviation = float(np.mean(window)), float(np.std(window, ddof=1))
            if deviation > 0 and value - mean > self._config.sigma * deviation:
                return (
                    f"its {name} {value:.6g} is {(value - mean) / deviation:.1f} standard deviations above the mean "
                    f"{mean:.6g} of the last {len(window)} steps (run.spikes.sigma={self._config.sigma:g})"
                )
        return None

    def note(self, step: int, *, loss: float, grad_norm: float, refused: str | None) -> None:
        """Record a step. NumericsError on every rank if too many in a row were refused."""
        for value, window in ((loss, self._losses), (grad_norm, self._grad_norms)):
            if math.isfinite(value):
                window.append(value)
        if refused is None:
            if self._ledger.skips_in_a_row:
                self._ledger = replace(self._ledger, skips_in_a_row=0)
            return
        in_a_row = self._ledger.skips_in_a_row + 1
        if in_a_row > self._config.most_in_a_row:
            raise NumericsError(
                f"step {step}: {refused}. Steps in a row that could not be used: {in_a_row} "
                f"(run.spikes.most_in_a_row={self._config.most_in_a_row}). Weights and checkpoints are intact. Continue with a "
                f"lower optim.lr or a longer schedule.warmup (checkpoint.allow=[arithmetic])."
            )
        skipped = (*self._ledger.skipped_steps, step)
        self._ledger = replace(self._ledger, skipped_steps=skipped, skips_in_a_row=in_a_row)


def ledger_after_rollback(
    found: Spike, config: SpikesConfig, *, now: Ledger, saved: Ledger, saved_step: int, global_rows: int
) -> Ledger:
    """The ledger to continue with from a checkpoint: the checkpoint's own window, and the rows left out so far and now.

    now: the ledger at the spike. saved, saved_step: of the checkpoint. NumericsError after `most_rollbacks`.
    """
    if now.rollbacks >= config.most_rollbacks:
        raise NumericsError(
            f"step {found.step}: {found.reason}. The run has gone back {now.rollbacks} time{'s' * (now.rollbacks != 1)} "
            f"(run.spikes.most_rollbacks={config.most_rollbacks}) and stops here. Weights and checkpoints are intact. Continue "
            f"with a lower optim.lr, a longer schedule.warmup or another run.spikes (checkpoint.allow=[arithmetic])."
        )
    first = max(saved_step, found.step - config.leave_out_steps)
    ranges = left_out(now.left_out).plus(first * global_rows, found.step * global_rows).ranges
    return replace(saved, left_out=ranges, rollbacks=now.rollbacks + 1)


def documents_of_step(dataset: Dataset, step: int, *, global_rows: int) -> tuple[list[dict[str, object]], int]:
    """(the first documents of a step with source, file, record and the start of their text; number of all of them)."""
    documents: list[dict[str, object]] = []
    count = 0
    for position in range((step - 1) * global_rows, step * global_rows):
        row = dataset.locate(position)
        count += len(row.pieces)
        if len(documents) >= MOST_DOCUMENTS:
            continue
        for piece in pieces_of(dataset, row, chars=_CHARS):
            where = {"position": position, "source": dataset.source_names[row.source]}
            documents.append(
                where | {"file": piece.file, "record": piece.record, "part": piece.part, "text": piece.text}
            )
    return documents[:MOST_DOCUMENTS], count


def named(documents: Sequence[dict[str, object]], count: int) -> str:
    """The documents in one line, for a warning."""
    shown = ", ".join(f"{one['source']}: {one['file']} record {one['record']}" for one in documents[:_SHOWN])
    return shown + (f" and {count - _SHOWN:,} more" if count > _SHOWN else "")
