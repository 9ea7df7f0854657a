"""The source of each training row, for exact shares that may change with time. A pure function of the position.

    phases --data.order.shares--> owed(p): rows of each source that the first p rows should contain, an exact fraction
           --Curriculum---> window(p): the successive rows around p, with the source of each

Sources are drawn in whole rows, so no order follows `owed` exactly. This one stays within one row of it.

*Windows.* The order is cut into windows. The end of a window does not depend on other windows. At an end, the rows drawn of
each source are one of the two whole numbers next to the rows owed. Between two ends, each row is a job: the k-th row of a
source may be drawn when k - 1 rows are owed, and must be drawn before k + 1 are owed (|drawn - owed| <= 1). "Earliest deadline
first" solves unit jobs with release times and deadlines whenever a solution exists. Without window ends one always
exists (Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980, for shares that may change with every row;
Steiner and Yeomans, Management Science 39, 1993).

*Ends.* While shares are constant and equal to c_i / M, the length of a window is a multiple of M, so all windows are alike
and only one is laid out. On a ramp, an end is a position where the owed rows, rounded to the nearest whole numbers, add up to
the position: each source is then within half a row there. Whether the bound of one row can be met on both sides of an end
follows from the rows owed near it (`_Stretch.late`, `_Stretch.early`). This is Hall's condition for jobs with release times and
deadlines, and it is exact: between two ends that meet it, an order within one row exists. The first candidate position that
meets it is used. Where shares change, the position is given, and the first way to round the owed rows that meets it is used.

*Many sources.* If shares are constant without a short period, and several sources draw only a few rows a window, all of these
may be owed half a row at the same position. Then the rounded rows add up at no position near it. In this case, and if more
than 12 sources are drawn, a tree of the sources chooses each row's source instead (`data.order.tree`), without windows. A row
costs the depth of the tree. The tree also gives the bound: below 1 row for one heavy source and many light ones.

*The bound.* For shares that never change it is 1 row. For phases and ramps it is 1 row if ends that meet Hall's condition were
found; `Window.within` is the bound that a window meets. A chain of such ends exists (Tijdeman), but it depends on all earlier
rows: on which sources that draw less than a row a window have already drawn theirs. A rule that looks only at the rows owed
at each end cannot guarantee it (Balinski and Young, Fair Representation, 1982, for four or more sources). Proven in any case:
3/2 rows between balanced ends, 2 if shares are constant after a change (an offset below 1 and an order within 1 of it).
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.order.shares import Phase, Segment, course_of
from data.order.tree import ShareTree
from data.system.recent import Recent

WINDOW_ROWS = 4096
"""Approximate number of rows in a window. A window is laid out at once (some milliseconds) and cached."""
MAX_PERIOD = 1 << 16
"""Longest period, in rows, that is laid out as one window."""
TOLERANCES = (1.0, 1.25, 1.5, 2.0, 4.0, math.inf)
"""Bounds on |drawn - owed|, in rows, in the order in which they are tried."""
MOST_IN_WINDOWS = 12
"""Largest number of sources for which windows are used. A tree is used for more sources."""
LIGHT_ROWS = 4
"""A source that draws fewer rows per window is light. A tree is used for two or more light sources."""
_CACHED_WINDOWS = 8
_PLACES = 32
"""Number of balanced positions that are tried as the end of a window."""
_ROUNDINGS = 128
"""Number of ways to round the owed rows that are tried where shares change."""
_ROUNDING = 1e-9
"""Tolerance in rows, because owed rows inside a window are computed in float64 from an exact start."""


@dataclass(frozen=True)
class Window:
    """Consecutive rows and their sources."""

    start: int
    drawn: np.ndarray
    """[sources] int64: number of rows of each source before `start`."""
    source: np.ndarray
    """[rows] int16: source of each row."""
    earlier: np.ndarray
    """[rows] int32: number of earlier rows of the same source in the window."""
    within: float
    """|drawn - owed| is at most this everywhere in the window, in rows."""

    @property
    def stop(self) -> int:
        """First position after the window."""
        return self.start + len(self.source)


@dataclass(frozen=True)
class _End:
    """A position between two windows."""

    position: int
    drawn: tuple[int, ...]
    """Number of rows of each source before it."""


@dataclass(frozen=True)
class _Part:
    """A segment, with the whole numbers of rows drawn before it."""

    segment: Segment
    drawn: tuple[int, ...]
    """Number of rows of each source before its start: a whole number next to the rows owed."""
    period: int
    """Smallest number of rows of which every source gets a whole number, if at most MAX_PERIOD; else 0."""
    tree: ShareTree | None = None
    """The tree that chooses sources, or None if windows do."""

    @property
    def rows(self) -> int:
        """Rows of a full window: about WINDOW_ROWS, and whole periods."""
        return self.period * max(1, WINDOW_ROWS // self.period) if self.period else WINDOW_ROWS

    def full_windows(self) -> int | None:
        """Full windows before the last one, which has the remaining rows (fewer than two windows). None: all are full."""
        segment = self.segment
        return None if segment.stop is None else max(0, (segment.stop - segment.start) // self.rows - 1)


class Curriculum:
    """The order of sources. Start-up time grows with the number of phases; memory is constant. Thread-safe."""

    def __init__(self, phases: Sequence[Phase], limits: Sequence[int | None] = ()) -> None:
        """phases, limits: as for `data.order.shares.course_of`."""
        self._windows: Recent[tuple[int, int], Window] = Recent(most=_CACHED_WINDOWS)
        self._ends: Recent[tuple[int, int], _End] = Recent(most=_CACHED_WINDOWS)
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}
        course = course_of(phases, limits)
        self.segments, self.stop = course.segments, course.stop
        self.runs_out = course.runs_out
        """{source: position from which it is left out, because it has reached its limit}."""
        self._parts: list[_Part] = []
        for segment in self.segments:
            drawn = self._rounded(segment) if self._parts else (0,) * len(segment.owed)
            tree = _tree(segment, drawn, runs_out=segment.stop in self.runs_out.values())
            self._parts.append(_Part(segment, drawn, _period(segment), tree))
        self._final = self._rounded(None) if self.stop is not None else ()

    @property
    def is_plain(self) -> bool:
        """Whether all windows are alike: shares never change and have a short period."""
        return len(self._parts) == 1 and self._parts[0].period > 0

    @property
    def has_trees(self) -> bool:
        """Whether a tree chooses the source of some rows."""
        return any(part.tree is not None for part in self._parts)

    def owed(self, position: int) -> tuple[Fraction, ...]:
        """Rows of each source that the first `position` rows should contain. Exact."""
        return self.segments[self._segment_of(position)].owed_at(position)

    def drawn(self, position: int) -> np.ndarray:
        """[sources] int64: rows of each source that the first `position` rows contain."""
        window = self.window(position if self.stop is None else min(position, self.stop - 1))
        inside = window.source[: position - window.start]
        return window.drawn + np.bincount(inside, minlength=len(window.drawn))

    def window(self, position: int) -> Window:
        """The window that contains `position`, which is below `stop`."""
        assert self.stop is None or position < self.stop, "nothing is left to draw there"
        which = self._segment_of(position)
        number = self._number(which, position)
        found = self._windows.get((which, number))
        return found or self._windows.keep((which, number), self._build(which, number))

    def _segment_of(self, position: int) -> int:
        which = len(self.segments) - 1
        while self.segments[which].start > position:
            which -= 1
        return which

    def _number(self, which: int, position: int) -> int:
        """Number of the window of a part that contains a position."""
        part = self._parts[which]
        number = (position - part.segment.start) // part.rows
        full = part.full_windows()
        if full is not None:
            number = min(number, full)
        if not part.period and number and self._end(which, number).position > position:
            number -= 1
        return number

    def _build(self, which: int, number: int) -> Window:
        part, start = self._parts[which], self._end(which, number)
        if part.tree is not None:
            stop_at = part.segment.stop if number == part.full_windows() else self._end(which, number + 1).position
            assert stop_at is not None
            base = part.segment.start
            source = part.tree.sources(start.position - base, stop_at - base)
            within = max(1.0, part.tree.bound)
            return Window(start.position, np.asarray(start.drawn, dtype=np.int64), source, _earlier(source), within)
        if number == part.full_windows():
            assert part.segment.stop is not None
            is_last = which + 1 == len(self._parts)
            stop = _End(part.segment.stop, self._final if is_last else self._parts[which + 1].drawn)
            source, earlier, within = _lay_out(part.segment, start, stop)
        elif part.period:
            if which not in self._layouts:  # two threads may both do it, with the same result
                self._layouts[which] = _lay_out(part.segment, self._end(which, 0), self._end(which, 1))
            source, earlier, within = self._layouts[which]
        else:
            source, earlier, within = _lay_out(part.segment, start, self._end(which, number + 1))
        return Window(start.position, np.asarray(start.drawn, dtype=np.int64), source, earlier, within)

    def _end(self, which: int, number: int) -> _End:
        """Where full window `number` of a part starts."""
        part = self._parts[which]
        position = part.segment.start + number * part.rows
        if number == 0:
            return _End(position, part.drawn)
        if part.tree is not None:
            counts = part.tree.drawn(position - part.segment.start)
            return _End(position, tuple(d + n for d, n in zip(part.drawn, counts, strict=True)))
        if part.period:
            grown = (int(share * part.rows) * number for share in part.segment.shares)
            return _End(position, tuple(d + g for d, g in zip(part.drawn, grown, strict=True)))
        found = self._ends.get((which, number))
        return found or self._ends.keep((which, number), _balanced_end(part, position))

    def _rounded(self, following: Segment | None) -> tuple[int, ...]:
        """Rows drawn of each source up to the end of the last part: whole numbers next to the rows owed there.

        Among the ways to round, the one is chosen whose order before the end, and after it in `following`, stays closest to
        the rows owed.
        """
        part = self._parts[-1]
        number, position = part.full_windows(), part.segment.stop
        assert number is not None and position is not None
        if part.tree is not None:
            counts = part.tree.drawn(position - part.segment.start)
            return tuple(d + n for d, n in zip(part.drawn, counts, strict=True))
        low, owed = self._end(len(self._parts) - 1, number), part.segment.owed_at(position)
        before = _Stretch(part.segment, low.position, position)
        after, grown = None, None
        if following is not None:
            begins = _Part(following, (), _period(following))
            full = begins.full_windows()
            stop = following.start + begins.rows if full != 0 else following.stop
            assert stop is not None
            after = _Stretch(following, following.start, stop)
            if begins.period and full != 0:  # all windows are alike, so the first one's end counts too
                grown = [int(share * begins.rows) for share in following.shares]
        best: tuple[int, tuple[int, ...]] | None = None
        for drawn in itertools.islice(_roundings(owed, low.drawn, position), _ROUNDINGS):
            excess = max(0, before.early(drawn))
            if after is not None:
                excess = max(excess, after.late(drawn))
                if grown is not None:
                    excess = max(excess, after.early([d + g for d, g in zip(drawn, grown, strict=True)]))
            if best is None or excess < best[0]:
                best = excess, drawn
            if not excess:
                break
        assert best is not None
        return best[1]


class _Stretch:
    """Rows owed on part of a segment, and the fewest and most rows that |drawn - owed| <= 1 allows at each position."""

    def __init__(self, segment: Segment, start: int, stop: int) -> None:
        self._base, curves = _curves(segment, start, stop)
        self._must = np.ceil(curves - 1 - _ROUNDING)
        self._may = np.floor(curves + 1 + _ROUNDING)
        self._after = np.arange(stop - start + 1)

    def late(self, drawn: Sequence[int]) -> int:
        """Rows that must be late if `drawn` rows were drawn before its start; 0 if an order without late rows exists."""
        due = np.maximum(self._must - self._relative(drawn), 0).sum(axis=0)
        return max(0, int((due - self._after).max()))

    def early(self, drawn: Sequence[int]) -> int:
        """Rows that must be early if `drawn` rows are drawn before its end; 0 if an order without early rows exists."""
        left = np.maximum(self._relative(drawn) - self._may, 0).sum(axis=0)
        return max(0, int((left - self._after[::-1]).max()))

    def _relative(self, drawn: Sequence[int]) -> np.ndarray:
        return np.array([[d - b] for d, b in zip(drawn, self._base, strict=True)], dtype=np.float64)


def _tree(segment: Segment, drawn: Sequence[int], *, runs_out: bool) -> ShareTree | None:
    """The tree that chooses the sources of a segment's rows; None if windows do.

    runs_out: a source reaches its limit at the segment's end, so it must not be a whole row ahead there.
    """
    shares = [share for share in segment.shares if share]
    is_many = len(shares) > MOST_IN_WINDOWS or sum(share * WINDOW_ROWS < LIGHT_ROWS for share in shares) > 1
    if any(segment.slope) or _period(segment) or not is_many:
        return None
    tree = ShareTree(segment.shares, [o - d for o, d in zip(segment.owed, drawn, strict=True)])
    return None if runs_out and tree.bound >= 1 else tree


def _period(segment: Segment) -> int:
    period = math.lcm(*(share.denominator for share in segment.shares))
    return 0 if any(segment.slope) or period > MAX_PERIOD else period


def _balanced_end(part: _Part, position: int) -> _End:
    """An end near `position` where the rounded owed rows add up to the position. If possible, it meets the bound of one row."""
    segment, rows = part.segment, part.rows
    first: _End | None = None
    tried = 0
    for place in range(position, position + rows // 2):
        nearest = _nearest(part, place)
        if sum(nearest) != place:
            continue
        end = _End(place, tuple(nearest))
        first = first or end
        before = _Stretch(segment, max(segment.start, place - 3 * rows // 2), place)
        far = place + 5 * rows // 2
        if not before.early(nearest):
            after = _Stretch(segment, place, far if segment.stop is None else min(far, segment.stop))
            if not after.late(nearest):
                return end
        tried += 1
        if tried == _PLACES:
            break
    if first is not None:
        return first
    # Many sources draw almost nothing here, and their half rows add up. The source with the largest share compensates.
    nearest = _nearest(part, position)
    shares = segment.shares_at(position)
    nearest[shares.index(max(shares))] += position - sum(nearest)
    return _End(position, tuple(nearest))


def _nearest(part: _Part, position: int) -> list[int]:
    """Owed rows rounded to the nearest whole numbers, but at least the rows drawn before the segment."""
    owed = part.segment.owed_at(position)
    return [max(math.floor(o + Fraction(1, 2)), d) for o, d in zip(owed, part.drawn, strict=True)]


def _roundings(owed: Sequence[Fraction], low: Sequence[int], position: int) -> Iterator[tuple[int, ...]]:
    """Whole numbers next to `owed`, at least `low`, that sum to the position. The nearest come first."""
    least = [max(math.floor(o), d) for o, d in zip(owed, low, strict=True)]
    waiting = sorted((i for i, o in enumerate(owed) if least[i] < o), key=lambda i: (math.floor(owed[i]) - owed[i], i))
    more = position - sum(least)
    if 0 <= more <= len(waiting):
        for chosen in itertools.combinations(waiting, more):
            yield tuple(count + (i in chosen) for i, count in enumerate(least))
    else:  # sources that draw almost nothing are ahead; the source that is owed most compensates
        counts = [count + (i in waiting[: max(0, more)]) for i, count in enumerate(least)]
        counts[max(range(len(owed)), key=lambda i: owed[i] - low[i])] += position - sum(counts)
        yield tuple(counts)


def _curves(segment: Segment, start: int, stop: int) -> tuple[list[int], np.ndarray]:
    """Rows owed from `start` to `stop`, both included: their whole part at `start`, and the rest [sources, rows + 1]."""
    base = [math.floor(o) for o in segment.owed_at(start)]
    return base, np.stack([_curve(segment, source, start, stop) for source in range(len(base))])


def _curve(segment: Segment, source: int, start: int, stop: int) -> np.ndarray:
    """Rows owed of one source from `start` to `stop`, minus their whole part at `start`: float64 [rows + 1]."""
    q = start - segment.start
    share, slope = segment.shares[source] + segment.slope[source] * q, segment.slope[source]
    owed = segment.owed[source] + segment.shares[source] * q + slope * q * q / 2
    steps = np.arange(stop - start + 1, dtype=np.float64)
    return float(owed - math.floor(owed)) + float(share) * steps + float(slope) / 2 * steps * steps


def _lay_out(segment: Segment, start: _End, stop: _End) -> tuple[np.ndarray, np.ndarray, float]:
    """Order of the rows between two ends. -> source, earlier, within (as in Window)."""
    base = [math.floor(o) for o in segment.owed_at(start.position)]

    def curve(source: int) -> np.ndarray:
        """Rows of a source owed after each slot, minus those drawn before. One source at a time, as there may be thousands."""
        whole = _curve(segment, source, start.position, stop.position)
        return whole[1:] - (start.drawn[source] - base[source])

    counts = [b - a for a, b in zip(start.drawn, stop.drawn, strict=True)]
    assert sum(counts) == stop.position - start.position and min(counts) >= 0, "the ends of neighbouring windows agree"
    for within in TOLERANCES:
        order = _earliest_deadline_first(curve, counts, stop.position - start.position, within=within)
        if order is not None:
            break
    else:
        raise AssertionError("without release times or deadlines every order is feasible")
    source = np.asarray(order, dtype=np.int16)
    return source, _earlier(source), within


def _earlier(source: np.ndarray) -> np.ndarray:
    """int32: for each row, the number of rows of the same source before it."""
    by_source = np.argsort(source, kind="stable")
    counts = np.bincount(source)
    earlier = np.empty(len(source), dtype=np.int32)
    earlier[by_source] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    return earlier


def _earliest_deadline_first(
    curve_of: Callable[[int], np.ndarray], counts: Sequence[int], slots: int, *, within: float
) -> list[int] | None:
    """The source of each slot, such that |drawn - owed| <= `within` after every slot. None if there is no such order.

    curve_of(i)[t]: rows of source i owed after slot t, not counting those drawn before slot 0.
    """
    sources = len(counts)
    releases, codes = [], []
    for i, count in enumerate(counts):
        curve = curve_of(i)
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
