"""From which source each row of training comes: exact shares that may change with time, a pure function of the position.

    phases --Curriculum--> owed(p): rows of each source that the first p rows should hold, an exact fraction
                           window(p): the stretch of rows around p, with the source of each

A phase holds its shares; one with a ramp first moves to them linearly. `owed` is piecewise linear or quadratic in p. No
order by source can follow it exactly; this one stays within one row of it.

*Windows.* Time is cut into windows whose ends are known without looking at any other window. At an end each source has a
whole number of rows next to what it is owed; between two ends the rows are jobs: the k-th row of a source may come once
k - 1 rows are owed and must have come before k are owed and a further one (|drawn - owed| <= 1). Unit jobs with release
times and deadlines are what "earliest deadline first" solves whenever a solution exists; without window ends one always
does, because the fluid order is a fractional solution (Steiner and Yeomans, Management Science 39, 1993; Tijdeman,
Discrete Mathematics 32, 1980, for one set of shares).

*Ends.* While shares hold still and are c_i / M, every window is a multiple of M long, so all of them look alike and are
laid out once. Along a ramp an end is the first place where the nearest whole numbers of what is owed add up to the
position: each source is then within half a row there. From such ends the order is feasible within 3/2 rows (a row that
must come before t has used up at least one row of what is owed since the end).

*The bound.* Shares that never change: 1 row, always. Phases and ramps: every window is tried with 1 row first, and says
(`Window.within`) what it kept; of thousands of random curricula all but 2 windows in 1,000 keep 1, the others 1.25. Never
more than 2, where shares hold still after a change (an offset below 1 and an order within 1 of it). A rule that looks at
what is owed at one place only and never takes a row back cannot stay within one row for four or more sources (Balinski and
Young, Fair Representation, 1982): this is the price of random access.
"""

import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

WINDOW_ROWS = 4096
"""Rows of a window, about: what is laid out at once (some milliseconds) and kept."""
MAX_PERIOD = 1 << 16
"""Longest period, in rows, that is laid out as one window."""
TOLERANCES = (1.0, 1.25, 1.5, 2.0, 4.0, math.inf)
"""Distances from what is owed that are tried, in rows."""
_CACHED_WINDOWS = 8
_ROUNDING = 1e-9
"""Rows owed within a window are computed in float64, from an exact start."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own shares."""

    start: int
    """First position; the first phase starts at 0."""
    shares: tuple[Fraction, ...]
    """Share of each source; they sum to 1."""
    ramp: int = 0
    """Rows over which the shares move linearly from those of the phase before."""


@dataclass(frozen=True)
class Segment:
    """Part of the curriculum on which shares are linear in the position."""

    start: int
    stop: int | None
    """None: goes on for ever."""
    owed: tuple[Fraction, ...]
    """At `start`."""
    shares: tuple[Fraction, ...]
    """At `start`."""
    slope: tuple[Fraction, ...]
    """Change of the shares per row."""
    drawn: tuple[int, ...]
    """Rows of each source in the order before `start`: whole numbers next to `owed`."""
    period: int
    """Rows after which what is owed has grown by whole numbers, where that is short; else 0."""

    def owed_at(self, position: int) -> list[Fraction]:
        """Rows of each source owed at a position of this segment."""
        q = position - self.start
        return [o + s * q + d * q * q / 2 for o, s, d in zip(self.owed, self.shares, self.slope, strict=True)]

    def shares_at(self, position: int) -> list[Fraction]:
        """Shares at a position of this segment."""
        q = position - self.start
        return [s + d * q for s, d in zip(self.shares, self.slope, strict=True)]


@dataclass(frozen=True)
class Window:
    """Consecutive rows and their sources."""

    start: int
    drawn: np.ndarray
    """[sources] int64: rows of each source before `start`."""
    source: np.ndarray
    """[rows] int16: source of each row."""
    earlier: np.ndarray
    """[rows] int32: rows of the same source before, within the window."""
    within: float
    """|drawn - owed| is at most this everywhere in the window, in rows."""

    @property
    def stop(self) -> int:
        """First position after the window."""
        return self.start + len(self.source)


class Curriculum:
    """The order of sources. Start-up depends on the number of phases, memory on nothing. Safe for threads."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        """phases: by start; a ramp must end before the next phase starts."""
        assert phases and phases[0].start == 0 and phases[0].ramp == 0, "a curriculum starts at 0, without a ramp"
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}
        sources = len(phases[0].shares)
        zero = (Fraction(0),) * sources
        first = phases[0]
        stop = phases[1].start if len(phases) > 1 else None
        self.segments = [_segment(0, stop, zero, first.shares, zero, (0,) * sources)]
        for index, phase in enumerate(phases[1:], start=1):
            stop = phases[index + 1].start if index + 1 < len(phases) else None
            before = self.segments[-1].shares_at(phase.start)
            if phase.ramp:
                end = phase.start + phase.ramp
                assert stop is None or end <= stop, "a ramp ends before the next phase"
                slope = tuple((new - old) / phase.ramp for new, old in zip(phase.shares, before, strict=True))
                self._add(phase.start, end, tuple(before), slope)
            start = phase.start + phase.ramp
            if stop is None or start < stop:
                self._add(start, stop, phase.shares, zero)

    def owed(self, position: int) -> list[Fraction]:
        """Rows of each source that the first `position` rows should hold. Exact."""
        return self.segments[self._segment_of(position)].owed_at(position)

    def drawn(self, position: int) -> np.ndarray:
        """[sources] int64: rows of each source that the first `position` rows do hold."""
        window = self.window(position)
        inside = window.source[: position - window.start]
        return window.drawn + np.bincount(inside, minlength=len(window.drawn))

    def window(self, position: int) -> Window:
        """The window that holds `position`."""
        which = self._segment_of(position)
        number = self._number(which, position)
        with self._lock:
            found = self._windows.get((which, number))
            if found is not None:
                self._windows.move_to_end((which, number))
                return found
        window = self._build(which, number)
        with self._lock:
            self._windows[which, number] = window
            if len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return window

    def _segment_of(self, position: int) -> int:
        which = len(self.segments) - 1
        while self.segments[which].start > position:
            which -= 1
        return which

    def _add(self, start: int, stop: int | None, shares: tuple[Fraction, ...], slope: tuple[Fraction, ...]) -> None:
        """Append a segment. The whole numbers it starts from are those that keep the order closest on both sides."""
        owed = tuple(self.segments[-1].owed_at(start))
        last = len(self.segments) - 1
        begin, low = _end(self.segments[last], _windows_before(self.segments[last], start))
        best: tuple[float, Segment] | None = None
        for wait in _waits(owed, before=self.segments[-1].shares_at(start), after=shares):
            drawn = _whole(owed, low, position=start, wait=wait, shares=shares)
            segment = _segment(start, stop, owed, shares, slope, drawn)
            worst = _lay_out(self.segments[last], begin, start, low, drawn)[2]
            if stop is None or _windows_before(segment, stop) > 0:
                worst = max(worst, _lay_out(segment, start, *_next_end(segment))[2])
            if best is None or worst < best[0]:
                best = worst, segment
            if worst <= TOLERANCES[0]:
                break
        assert best is not None
        self.segments.append(best[1])

    def _number(self, which: int, position: int) -> int:
        """Number of the window of a segment that holds a position."""
        segment = self.segments[which]
        number = (position - segment.start) // _window_rows(segment)
        if segment.stop is not None:
            number = min(number, _windows_before(segment, segment.stop))
        if not segment.period and number and _end(segment, number)[0] > position:
            number -= 1
        return number

    def _build(self, which: int, number: int) -> Window:
        segment = self.segments[which]
        start, low = _end(segment, number)
        is_last = segment.stop is not None and number == _windows_before(segment, segment.stop)
        if is_last:
            assert segment.stop is not None
            source, earlier, within = _lay_out(segment, start, segment.stop, low, self.segments[which + 1].drawn)
        elif segment.period:
            if which not in self._layouts:  # two threads at most do the same work twice
                self._layouts[which] = _lay_out(segment, segment.start, *_next_end(segment))
            source, earlier, within = self._layouts[which]
        else:
            stop, high = _end(segment, number + 1)
            source, earlier, within = _lay_out(segment, start, stop, low, high)
        return Window(start, np.asarray(low, dtype=np.int64), source, earlier, within)


def _segment(
    start: int,
    stop: int | None,
    owed: tuple[Fraction, ...],
    shares: tuple[Fraction, ...],
    slope: tuple[Fraction, ...],
    drawn: tuple[int, ...],
) -> Segment:
    period = math.lcm(*(share.denominator for share in shares))
    if any(slope) or period > MAX_PERIOD:
        period = 0
    return Segment(start, stop, owed, shares, slope, drawn, period)


def _window_rows(segment: Segment) -> int:
    """Rows of a full window: about WINDOW_ROWS, and whole periods."""
    return segment.period * max(1, WINDOW_ROWS // segment.period) if segment.period else WINDOW_ROWS


def _windows_before(segment: Segment, stop: int) -> int:
    """Full windows before the last one of a segment that ends at `stop`; the last takes what is left, up to two's rows."""
    return max(0, (stop - segment.start) // _window_rows(segment) - 1)


def _next_end(segment: Segment) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """End of the first full window, rows drawn at its start and at its end."""
    stop, high = _end(segment, 1)
    return stop, segment.drawn, high


def _end(segment: Segment, number: int) -> tuple[int, tuple[int, ...]]:
    """Where full window `number` starts, and how many rows of each source lie before."""
    if number == 0:
        return segment.start, segment.drawn
    rows = _window_rows(segment)
    position = segment.start + number * rows
    if segment.period:
        grown = (int(share * rows) * number for share in segment.shares)
        return position, tuple(d + g for d, g in zip(segment.drawn, grown, strict=True))
    for place in range(position, position + rows // 2):
        nearest = _nearest(segment, place)
        if sum(nearest) == place:
            return place, tuple(nearest)
    # Many sources hardly move here and their halves add up: the source that moves most makes up for it.
    nearest = _nearest(segment, position)
    shares = segment.shares_at(position)
    nearest[shares.index(max(shares))] += position - sum(nearest)
    return position, tuple(nearest)


def _nearest(segment: Segment, position: int) -> list[int]:
    """Whole numbers nearest to what is owed; never fewer than were drawn before the segment."""
    owed = segment.owed_at(position)
    return [max(math.floor(o + Fraction(1, 2)), d) for o, d in zip(owed, segment.drawn, strict=True)]


def _waits(
    owed: Sequence[Fraction], *, before: Sequence[Fraction], after: Sequence[Fraction]
) -> list[Callable[[int], Fraction]]:
    """Ways to rank the sources that wait for a row: the lowest get it first."""
    part = [o - math.floor(o) for o in owed]
    far = Fraction(10**18)

    def due(shares: Sequence[Fraction]) -> Callable[[int], Fraction]:
        return lambda i: (1 - part[i]) / shares[i] if shares[i] else far - part[i]

    return [lambda i: -part[i], due(after), due(before), lambda i: -part[i] if after[i] else 1 - part[i]]


def _whole(
    owed: Sequence[Fraction],
    low: Sequence[int],
    *,
    position: int,
    wait: Callable[[int], Fraction],
    shares: Sequence[Fraction],
) -> tuple[int, ...]:
    """Whole numbers next to `owed`, none below `low`, that sum to the position; of those that wait, the first in `wait`
    are rounded up."""
    counts = [max(math.floor(o), least) for o, least in zip(owed, low, strict=True)]
    waiting = [i for i, o in enumerate(owed) if counts[i] < o]
    waiting.sort(key=lambda i: (wait(i), i))
    for i in waiting[: max(0, position - sum(counts))]:
        counts[i] += 1
    counts[list(shares).index(max(shares))] += position - sum(counts)  # nothing, but for sources that hardly move
    return tuple(counts)


def _lay_out(
    segment: Segment, start: int, stop: int, low: Sequence[int], high: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Order of the rows from `start` (`low` drawn before) to `stop` (`high` drawn then). -> source, earlier, within."""
    owed, shares = segment.owed_at(start), segment.shares_at(start)
    steps = np.arange(1, stop - start + 1, dtype=np.float64)
    curves = [
        float(owed[i] - low[i]) + float(shares[i]) * steps + float(segment.slope[i]) / 2 * steps * steps
        for i in range(len(low))
    ]
    counts = [b - a for a, b in zip(low, high, strict=True)]
    assert sum(counts) == stop - start and min(counts) >= 0, "window ends fit each other"
    for within in TOLERANCES:
        order = _earliest_deadline_first(curves, counts, within=within)
        if order is not None:
            break
    else:
        raise AssertionError("without release times or deadlines every order is feasible")
    source = np.asarray(order, dtype=np.int16)
    earlier = np.empty(len(source), dtype=np.int32)
    for i, count in enumerate(counts):
        earlier[source == i] = np.arange(count)
    return source, earlier, within


def _earliest_deadline_first(curves: Sequence[np.ndarray], counts: Sequence[int], *, within: float) -> list[int] | None:
    """A source for each slot so that drawn and owed are never more than `within` apart, or None.

    curves[i][t]: rows of source i owed after slot t, not counting those drawn before slot 0.
    """
    slots, sources = len(curves[0]), len(curves)
    releases, codes = [], []
    for i, (curve, count) in enumerate(zip(curves, counts, strict=True)):
        nth = np.arange(1, count + 1)
        releases.append(np.searchsorted(curve, nth - within - _ROUNDING, side="left"))
        deadline = np.minimum(np.searchsorted(curve, nth - 1 + within + _ROUNDING, side="right"), slots - 1)
        codes.append(deadline * sources + i)
    release, code = np.concatenate(releases), np.concatenate(codes)
    by_release = np.argsort(release, kind="stable")
    jobs = code[by_release].tolist()
    released = np.searchsorted(release[by_release], np.arange(slots), side="right").tolist()
    waiting: list[int] = []
    order: list[int] = []
    taken = 0
    for slot, until in enumerate(released):
        while taken < until:
            heapq.heappush(waiting, jobs[taken])
            taken += 1
        if not waiting:
            return None
        job = heapq.heappop(waiting)
        if job < slot * sources:
            return None
        order.append(job % sources)
    return order
