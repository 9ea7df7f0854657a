"""The order of training: global row position -> (source, row of that source), a pure function with nothing to save.

Two independent parts. *Which source* is the curriculum's (`data.curriculum`): within one row of the asked shares after
every position, also where shares change. *Which row*: the k-th draw from a source of n rows is number k mod n of epoch
k // n in that source's order (`data.order`), keyed by (seed, source, epoch). No index array; start-up and memory do not
depend on the corpus.
"""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.config import PhaseConfig
from data.curriculum import Curriculum, Phase, Window
from data.errors import DataError
from data.order import RowOrder

_CACHED_WINDOWS = 4


@dataclass(frozen=True)
class BlendSource:
    """One source, as the order of training sees it."""

    name: str
    weight: float
    rows: int
    """Training rows it has, at least 1."""
    max_epochs: float | None = None
    """Most times it may be read through."""
    groups: tuple[int, ...] = ()
    """Rows of each of its shards, where rows are shuffled within a few shards at a time."""


@dataclass(frozen=True)
class Draw:
    """What lies at some positions, arrays of equal length."""

    source: np.ndarray
    """Index of the source."""
    row: np.ndarray
    """Row of that source, below its row count."""
    epoch: np.ndarray
    """How many times the source had been read through before."""


class Blend:
    """The order of rows of a weighted set of sources. Holds a few windows of the order; safe for threads."""

    def __init__(
        self,
        sources: Sequence[BlendSource],
        *,
        seed: int,
        row_tokens: int = 1,
        phases: Sequence[PhaseConfig] = (),
        shuffle_shards: int = 0,
    ) -> None:
        """DataError for weights or phases that say nothing, or a source that is drawn and has no row."""
        self.sources = list(sources)
        self.curriculum = Curriculum(_phases(self.sources, phases, row_tokens=row_tokens))
        drawn = [any(s.shares[i] or s.slope[i] for s in self.curriculum.segments) for i in range(len(self.sources))]
        for source, is_drawn in zip(self.sources, drawn, strict=True):
            if is_drawn and source.rows < 1:
                raise DataError(
                    f"source {source.name!r} is shorter than one row. Give it more text, or lower data.row_tokens."
                )
        self._rows = np.array([max(1, source.rows) for source in self.sources], dtype=np.int64)
        self._orders = [
            RowOrder(s.rows, key=_key(seed, s.name), groups=s.groups, together=shuffle_shards) for s in self.sources
        ]
        limits = [math.inf if s.max_epochs is None else s.max_epochs * s.rows for s in self.sources]
        self._limits = np.array(limits)
        self._lock = threading.Lock()
        self._draws: OrderedDict[int, tuple[int, Draw]] = OrderedDict()

    def draw(self, positions: np.ndarray) -> Draw:
        """What lies at `positions` (int64, any order). Depends on nothing else. DataError past a source's max_epochs."""
        positions = np.asarray(positions, dtype=np.int64)
        if not len(positions):
            return Draw(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        first, last = min(positions.tolist()), max(positions.tolist())
        start, whole = self._window(first)
        if last < start + len(whole.source):
            here = positions - start
            return Draw(whole.source[here], whole.row[here], whole.epoch[here])
        parts = Draw(*(np.empty(len(positions), dtype=np.int64) for _ in range(3)))
        left = np.ones(len(positions), dtype=bool)
        while left.any():
            start, whole = self._window(int(positions[left].min()))
            inside = np.flatnonzero(left & (positions < start + len(whole.source)))
            here = positions[inside] - start
            parts.source[inside], parts.row[inside] = whole.source[here], whole.row[here]
            parts.epoch[inside] = whole.epoch[here]
            left[inside] = False
        return parts

    def epochs(self, position: int) -> np.ndarray:
        """[sources] float64: how many times each source has been read through before `position`."""
        return self.curriculum.drawn(position) / self._rows

    def check_length(self, rows: int) -> None:
        """DataError where the first `rows` rows would read a source more often than its max_epochs."""
        drawn = self.curriculum.drawn(rows)
        lines = [
            f"the run's {rows:,} rows hold {int(count):,} of source {source.name!r}, which has {source.rows:,}: "
            f"{count / max(1, source.rows):.2f} epochs, more than max_epochs={source.max_epochs:g}."
            for source, count, limit in zip(self.sources, drawn, self._limits, strict=True)
            if count > limit
        ]
        if lines:
            raise DataError("\n".join([*lines, "Lower its weight or run.steps, add text, or raise max_epochs."]))

    def positions_of(self, source: int, row: int, *, stop: int) -> list[int]:
        """Every position below `stop` at which a row of a source lies, in order."""
        total = int(self.curriculum.drawn(stop)[source])
        rows, found = int(self._rows[source]), []
        for epoch in range(-(-total // rows)):
            nth = epoch * rows + self._orders[source].index_of(row, epoch)
            if nth < total:
                found.append(self._position_of(source, nth, stop))
        return found

    def _position_of(self, source: int, nth: int, stop: int) -> int:
        """Position of the nth draw (from 0) of a source; it lies below `stop`."""
        low, high = 0, stop  # drawn(low) <= nth < drawn(high)
        while high - low > 1:
            middle = (low + high) // 2
            if self.curriculum.drawn(middle)[source] <= nth:
                low = middle
            else:
                high = middle
        return low

    def _window(self, position: int) -> tuple[int, Draw]:
        """The window of the order that holds a position: its start, and what lies in it."""
        with self._lock:
            for start, (stop, draw) in self._draws.items():
                if start <= position < stop:
                    return start, draw
        window = self.curriculum.window(position)
        draw = self._resolve(window)
        with self._lock:
            self._draws[window.start] = window.stop, draw
            if len(self._draws) > _CACHED_WINDOWS:
                self._draws.popitem(last=False)
        return window.start, draw

    def _resolve(self, window: Window) -> Draw:
        source = window.source.astype(np.int64)
        nth = window.drawn[source] + window.earlier
        epoch, index = np.divmod(nth, self._rows[source])
        row = np.empty_like(index)
        for which in np.unique(source):
            here = np.flatnonzero(source == which)
            row[here] = self._orders[which].rows_at(index[here], epoch[here])
        spent = nth >= self._limits[source]
        if spent.any():
            at = int(np.argmax(spent))
            name, limit = self.sources[source[at]].name, self.sources[source[at]].max_epochs
            raise DataError(
                f"source {name!r} has been read max_epochs={limit:g} times at position {window.start + at:,}. Lower its "
                f"weight, add text, or raise max_epochs."
            )
        return Draw(source, row, epoch)


def _phases(sources: Sequence[BlendSource], phases: Sequence[PhaseConfig], *, row_tokens: int) -> list[Phase]:
    """Phases in rows, with shares that sum to 1. DataError for what cannot be meant."""
    names = [source.name for source in sources]
    result = [Phase(0, _shares({s.name: s.weight for s in sources}, names, where="data.sources"))]
    for index, phase in enumerate(phases):
        where = f"data.phases[{index}]"
        unknown = [name for name in phase.weights if name not in names]
        if unknown:
            raise DataError(f"{where}.weights names {', '.join(unknown)}; data.sources has {', '.join(names)}.")
        start, ramp = -(-phase.from_tokens // row_tokens), -(-phase.ramp_tokens // row_tokens)
        before = result[-1].start + result[-1].ramp
        if start < max(1, before):
            raise DataError(
                f"{where}.from_tokens={phase.from_tokens:,} lies before the end of the phase before it, ramp included "
                f"({before * row_tokens:,} tokens). Put phases in order, or shorten the ramp."
            )
        result.append(Phase(start, _shares(phase.weights, names, where=f"{where}.weights"), ramp))
    return result


def _shares(weights: Mapping[str, float], names: Sequence[str], *, where: str) -> tuple[Fraction, ...]:
    """Weights, read as the decimals they print as, as exact shares."""
    exact = [Fraction(str(weights.get(name, 0))) for name in names]
    total = sum(exact)
    if not total:
        raise DataError(f"{where}: all weights are 0, so there is nothing to draw. Give one source a weight above 0.")
    return tuple(weight / total for weight in exact)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
