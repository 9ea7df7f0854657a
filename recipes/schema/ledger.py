"""What a run did about spikes so far: the part of its state that checkpoints record and other programs read without torch.

The rows left out make the order of training a function of seed and ledger. The window of past values makes the decision about the
next step the same after a resume.
"""

import math
from dataclasses import dataclass
from typing import Any

_MOST = 1 << 62


@dataclass(frozen=True)
class Ledger:
    """Steps and rows that a run left out, and the values that the next step is compared with."""

    left_out: tuple[tuple[int, int], ...] = ()
    """Ranges of rows of the full order, (first, after the last), that the run does not train on."""
    skipped_steps: tuple[int, ...] = ()
    """Steps, counted from 1, whose update was not made."""
    skips_in_a_row: int = 0
    """How many of the last steps were skipped without one in between that was not."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint."""
    losses: tuple[float, ...] = ()
    """Losses of the last steps, the newest last; NaN and infinity are left out."""
    grad_norms: tuple[float, ...] = ()
    """Their gradient norms."""

    def describe(self) -> str:
        """Counts in one line: `2 steps skipped, 1 rollback, 8 rows left out`."""
        rows = sum(stop - start for start, stop in self.left_out)
        counts = (
            (len(self.skipped_steps), "step", "skipped"),
            (self.rollbacks, "rollback", ""),
            (rows, "row", "left out"),
        )
        parts = [f"{count:,} {name}{'s' * (count != 1)} {act}".rstrip() for count, name, act in counts if count]
        return ", ".join(parts) or "none"


def ledger_of(plain: Any) -> Ledger:
    """A ledger as JSON has it. ValueError if it is not one."""
    if not isinstance(plain, dict) or plain.keys() - Ledger.__dataclass_fields__.keys():
        raise ValueError(f"ledger is {str(plain)[:80]!r}, not the ledger of a run")
    ranges = tuple((start, stop) for start, stop in plain.get("left_out", ()))
    ledger = Ledger(
        left_out=ranges,
        skipped_steps=tuple(plain.get("skipped_steps", ())),
        skips_in_a_row=plain.get("skips_in_a_row", 0),
        rollbacks=plain.get("rollbacks", 0),
        losses=tuple(plain.get("losses", ())),
        grad_norms=tuple(plain.get("grad_norms", ())),
    )
    counts = [*(edge for pair in ranges for edge in pair), *ledger.skipped_steps]
    if not all(type(n) is int and 0 <= n <= _MOST for n in (*counts, ledger.skips_in_a_row, ledger.rollbacks)):
        raise ValueError("ledger has a number that is not a count")
    edges = [edge for pair in ranges for edge in pair]
    if sorted(set(edges)) != edges:
        raise ValueError(f"ledger.left_out has ranges that overlap or are not in order: {str(ranges)[:80]}")
    if not all(type(x) in (int, float) and math.isfinite(x) for x in (*ledger.losses, *ledger.grad_norms)):
        raise ValueError("ledger has a loss or a gradient norm that is not a finite number")
    return ledger
