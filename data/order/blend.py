"""The order of training: global row position -> (source, row of that source), a pure function without state to save.

It has two independent parts. *Which source*: the curriculum (`data.order.curriculum`) keeps the rows drawn of each source
within one row of the configured shares at every position, also where shares change or a source has no rows left. *Which row*:
the k-th draw from a source of n rows is number k mod n of epoch k // n in that source's order (`data.order.permutation`),
keyed by (seed, source, epoch). No index array is stored. Start-up time and memory do not depend on the size of the data.
"""

import copy
import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.order.curriculum import Curriculum, Window
from data.order.left_out import LeftOut
from data.order.permutation import RowOrder
from data.order.shares import Phase
from data.system.recent import Recent
from recipes.schema.data import DataConfig, PhaseConfig
from recipes.schema.data_rules import order_problems
from recipes.schema.errors import DataError, refuse

ORDER = 2
"""Version of the order of rows if shares change or have no short period. With a new version, such runs get other rows."""
TREE_ORDER = 3
"""Version of the order of rows if a tree of many sources draws them."""
_CACHED_WINDOWS = 4


@dataclass(frozen=True)
class BlendSource:
    """What the order of training needs to know about a source."""

    name: str
    weight: float
    rows: int
    """Number of its training rows, at least 1."""
    max_epochs: float | None = None
    """How many times it may be read in full, at most."""
    groups: tuple[int, ...] = ()
    """Number of rows of each of its shards, if rows are shuffled within a few shards at a time."""


@dataclass(frozen=True)
class Draw:
    """Source and row at some positions, arrays of equal length."""

    source: np.ndarray
    """Index of the source."""
    row: np.ndarray
    """Row of that source, below its row count."""
    epoch: np.ndarray
    """How many times the source had been read in full before."""


class Blend:
    """The order of rows of a weighted set of sources. Caches a few windows of the order. Thread-safe."""

    def __init__(
        self,
        sources: Sequence[BlendSource],
        *,
        seed: int,
        row_tokens: int = 1,
        phases: Sequence[PhaseConfig] = (),
        shuffle_shards: int = 0,
        replace_exhausted: bool = False,
    ) -> None:
        """replace_exhausted: when a source has been read max_epochs times, the others take its share. Otherwise reading more of
        it is an error.

        DataError for weights or phases without a positive share, or a source that is drawn but has no row.
        """
        self.sources = list(sources)
        self._row_tokens = row_tokens
        self._most = [None if s.max_epochs is None else int(Fraction(str(s.max_epochs)) * s.rows) for s in self.sources]
        self.curriculum = Curriculum(
            _phases(self.sources, phases, row_tokens=row_tokens), self._most if replace_exhausted else ()
        )
        if not self.curriculum.segments:
            raise DataError(
                "max_epochs of every source is less than one row, so there is nothing to draw. Raise max_epochs of a source."
            )
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
        self._is_capped = any(most is not None for most in self._most)
        self._limits = np.array([math.inf if most is None else most for most in self._most])
        self._draws: Recent[int, Draw] = Recent(most=_CACHED_WINDOWS)
        self.left_out = LeftOut()
        """Rows of the order that no position has."""

    def without(self, left_out: LeftOut) -> "Blend":
        """The same order without some of its rows: later rows move up."""
        shorter = copy.copy(self)
        shorter.left_out = left_out
        return shorter

    @property
    def stop(self) -> int | None:
        """Position after the last row that can be drawn; None if there is no last one."""
        end = self.curriculum.stop
        return None if end is None else max(0, end - self.left_out.rows)

    def draw(self, positions: np.ndarray) -> Draw:
        """Source and row at `positions` (int64, any order). Depends on nothing else. DataError past a source's max_epochs."""
        positions = self.left_out.places(positions)
        if not len(positions):
            return Draw(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        first, last = min(positions.tolist()), max(positions.tolist())
        if self.curriculum.stop is not None and last >= self.curriculum.stop:
            raise DataError(
                f"every source that is drawn at row {self.curriculum.stop:,} has been read max_epochs times. Lower "
                f"run.steps, add text, or raise max_epochs."
            )
        start, whole = self._window(first)
        if last < start + len(whole.source):
            here = positions - start
            drawn = Draw(whole.source[here], whole.row[here], whole.epoch[here])
        else:
            drawn = self._over_windows(positions)
        if self._is_capped and (drawn.row < 0).any():
            self._refuse(positions, drawn)
        return drawn

    def _over_windows(self, positions: np.ndarray) -> Draw:
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

    def _refuse(self, positions: np.ndarray, drawn: Draw) -> None:
        at = min(np.flatnonzero(drawn.row < 0), key=lambda place: positions[place])
        source = self.sources[drawn.source[at]]
        raise DataError(
            f"source {source.name!r} has been read max_epochs={source.max_epochs:g} times at position {positions[at]:,}. Lower "
            f"its weight, add text, raise max_epochs, or set data.on_exhausted=continue."
        )

    def epochs(self, position: int) -> np.ndarray:
        """[sources] float64: how many times each source was read in full before `position`."""
        return self.curriculum.drawn(self.left_out.place(position)) / self._rows

    @property
    def order(self) -> int:
        """Version of the order of rows. It is part of the identity of the data that a run has seen."""
        if self.curriculum.has_trees:
            return TREE_ORDER
        return 1 if self.curriculum.is_plain else ORDER

    def check_length(self, rows: int, *, global_rows: int = 1) -> None:
        """DataError if the first `rows` rows, `global_rows` a step, would read a source more often than its max_epochs.

        The message gives the step at which the source has no rows left, and the remedies.
        """
        rows = rows + self.left_out.rows  # the rows left out come before the run's end, or cost nothing
        end = self.curriculum.stop
        if end is not None and rows > end:
            raise DataError(
                f"every source that is drawn at row {end:,} (step {end // global_rows + 1:,}, token "
                f"{end * self._row_tokens:,}) has been read max_epochs times; the run ends at row {rows:,}. Lower run.steps, "
                f"add text, or raise max_epochs."
            )
        drawn, lines = self.curriculum.drawn(rows), []
        for index, (source, count, most) in enumerate(zip(self.sources, drawn.tolist(), self._most, strict=True)):
            if most is not None and count > most:
                at = self._position_of(index, most, rows)
                lines.append(
                    f"source {source.name!r} runs out at step {at // global_rows + 1:,} (row {at:,}, token "
                    f"{at * self._row_tokens:,}): max_epochs={source.max_epochs:g} of its {source.rows:,} rows are {most:,}, "
                    f"but the run's {rows:,} rows would contain {count:,} ({count / max(1, source.rows):.2f} epochs)."
                )
        if lines:
            remedy = (
                "Lower its weight or run.steps, add text, raise max_epochs, or let the other sources take its share from then "
                "on: data.on_exhausted=continue."
            )
            raise DataError("\n".join([*lines, remedy]))

    def exhausted(self, rows: int) -> list[tuple[str, int]]:
        """(source, position from which the others replace it), by position, for sources that are replaced before row `rows`."""
        found = [(self.sources[i].name, place) for i, place in self.curriculum.runs_out.items() if place < rows]
        return sorted(found, key=lambda item: item[1])

    def positions_of(self, source: int, row: int, *, stop: int) -> list[int]:
        """Every position below `stop` at which this row of this source is drawn, in order."""
        stop = self.left_out.place(stop)
        stop = stop if self.curriculum.stop is None else min(stop, self.curriculum.stop)
        total = int(self.curriculum.drawn(stop)[source])
        rows, found = int(self._rows[source]), []
        for epoch in range(-(-total // rows)):
            nth = epoch * rows + self._orders[source].index_of(row, epoch)
            if nth < total:
                found.append(self._position_of(source, nth, stop))
        kept = (self.left_out.position(place) for place in found)
        return [place for place in kept if place is not None]

    def _position_of(self, source: int, nth: int, stop: int) -> int:
        """Position of the nth draw (from 0) of a source. It must be below `stop`."""
        return bisect_right(range(1, stop), nth, key=lambda position: self.curriculum.drawn(position)[source])

    def _window(self, position: int) -> tuple[int, Draw]:
        """The window of the order that contains a position: its start, and its draws."""
        window = self.curriculum.window(position)
        found = self._draws.get(
            window.start
        )  # several are cached, because reading and fetching ahead use different windows
        return window.start, found or self._draws.keep(window.start, self._resolve(window))

    def _resolve(self, window: Window) -> Draw:
        source = window.source.astype(np.int64)
        nth = window.drawn[source] + window.earlier
        epoch, index = np.divmod(nth, self._rows[source])
        row = np.empty_like(index)
        for which in np.unique(source):
            here = np.flatnonzero(source == which)
            row[here] = self._orders[which].rows_at(index[here], epoch[here])
        row[nth >= self._limits[source]] = -1  # after max_epochs; `draw` raises if such a row is drawn
        return Draw(source, row, epoch)


def blend_of(config: DataConfig, rows: Sequence[int], *, groups: Sequence[tuple[int, ...]] = ()) -> Blend:
    """The order that a recipe configures. rows: number of training rows of each source, in the recipe's order.

    groups: number of rows of each shard of every source, if rows are shuffled within a few shards at a time.
    """
    return Blend(
        [
            BlendSource(name, weight=source.weight, rows=count, max_epochs=source.max_epochs, groups=shards)
            for (name, source), count, shards in zip(
                config.sources.items(), rows, groups or [()] * len(rows), strict=True
            )
        ],
        seed=config.seed,
        row_tokens=config.row_tokens,
        phases=config.phases,
        shuffle_shards=config.shuffle_shards if groups else 0,
        replace_exhausted=config.on_exhausted == "continue",
    )


def _phases(sources: Sequence[BlendSource], phases: Sequence[PhaseConfig], *, row_tokens: int) -> list[Phase]:
    """Phases in rows, with shares that sum to 1. DataError if they contradict each other."""
    weights = {source.name: source.weight for source in sources}
    refuse(order_problems(weights, phases, row_tokens=row_tokens), DataError)
    result = [Phase(0, _shares(weights, list(weights)))]
    for phase in phases:
        start, ramp = -(-phase.from_tokens // row_tokens), -(-phase.ramp_tokens // row_tokens)
        result.append(Phase(start, _shares(phase.weights, list(weights)), ramp))
    return result


def _shares(weights: Mapping[str, float], names: Sequence[str]) -> tuple[Fraction, ...]:
    """Weights as exact shares. A weight is the decimal number that it prints as: 0.1 is 1/10."""
    exact = [Fraction(str(weights.get(name, 0))) for name in names]
    total = sum(exact)
    return tuple(weight / total for weight in exact)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
