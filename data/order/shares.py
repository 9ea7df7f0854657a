"""The number of rows that each source is *owed* at a position: how many the rows before it should contain. All exact.

    phases, limits --course_of--> segments        Segment.owed_at(p): rows of each source that the first p rows should contain

A phase may begin with a ramp, on which shares change linearly from those of the phase before. After it, shares are constant.
A source with a limit is left out from the last position at which it is owed at most its limit. The others take its share in
proportion to their own. A ramp in progress continues, from these larger shares to those that the others have at its end. The
order ends when no source is left.
"""

import dataclasses
from collections.abc import Container, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Phase:
    """A part of training with its own shares."""

    start: int
    """First position; the first phase starts at 0."""
    shares: tuple[Fraction, ...]
    """Share of each source; they sum to 1."""
    ramp: int = 0
    """Rows over which the shares move linearly from those of the phase before."""


@dataclass(frozen=True)
class Segment:
    """Part of the order on which shares are linear in the position."""

    start: int
    stop: int | None
    """None: it does not end."""
    owed: tuple[Fraction, ...]
    """Rows of each source owed at `start`."""
    shares: tuple[Fraction, ...]
    """Share of each source at `start`."""
    slope: tuple[Fraction, ...]
    """Change of the shares per row."""

    def owed_at(self, position: int) -> tuple[Fraction, ...]:
        """Rows of each source owed at a position of this segment."""
        q = position - self.start
        return tuple(o + s * q + d * q * q / 2 for o, s, d in zip(self.owed, self.shares, self.slope, strict=True))

    def shares_at(self, position: int) -> tuple[Fraction, ...]:
        """Shares at a position of this segment."""
        q = position - self.start
        return tuple(s + d * q for s, d in zip(self.shares, self.slope, strict=True))


@dataclass(frozen=True)
class Course:
    """All segments of a curriculum."""

    segments: list[Segment]
    """By start, without gaps, from 0."""
    runs_out: dict[int, int]
    """{source: position from which it is left out}, for the sources that reach their limits."""
    stop: int | None
    """Position at which no source is left; None if that never happens."""


def course_of(phases: Sequence[Phase], limits: Sequence[int | None] = ()) -> Course:
    """The shares that phases configure, without the sources that have reached their limits.

    phases: by start. A ramp must end before the next phase starts. limits: largest number of rows of each source, or empty.
    """
    assert phases and phases[0].start == 0 and phases[0].ramp == 0, "a curriculum starts at 0, without a ramp"
    sources = len(phases[0].shares)
    segments: list[Segment] = []
    gone: dict[int, int] = {}
    owed: tuple[Fraction, ...] = (Fraction(0),) * sources
    for start, stop, first, last in _configured_parts(phases):
        while stop is None or start < stop:
            end = _without(last, gone)
            begin = _without(first, gone) if any(_without(first, gone)) else end
            if not any(end):
                return Course(segments, gone, start)
            slope = tuple((b - a) / (stop - start) if stop else Fraction(0) for a, b in zip(begin, end, strict=True))
            segment = Segment(start, stop, owed, begin, slope)
            out = [(_runs_out(segment, i, limit), i) for i, limit in enumerate(limits) if limit is not None]
            place, which = min(((p, i) for p, i in out if p is not None and i not in gone), default=(None, -1))
            if place is None:
                segments.append(segment)
                owed = segment.owed_at(stop) if stop is not None else owed
                break
            gone[which] = place
            if place > start:
                segments.append(dataclasses.replace(segment, stop=place))
            start, first, owed = place, segment.shares_at(place), segment.owed_at(place)
    return Course(segments, gone, None)


def _configured_parts(
    phases: Sequence[Phase],
) -> list[tuple[int, int | None, tuple[Fraction, ...], tuple[Fraction, ...]]]:
    """(start, stop, shares at the start, shares at the stop) of every ramp and constant part, ignoring limits."""
    parts: list[tuple[int, int | None, tuple[Fraction, ...], tuple[Fraction, ...]]] = []
    for index, phase in enumerate(phases):
        stop = phases[index + 1].start if index + 1 < len(phases) else None
        level = phase.start + phase.ramp
        assert stop is None or level <= stop, "a ramp ends before the next phase"
        if phase.ramp:
            parts.append((phase.start, level, phases[index - 1].shares, phase.shares))
        if stop is None or level < stop:
            parts.append((level, stop, phase.shares, phase.shares))
    return parts


def _without(shares: Sequence[Fraction], gone: Container[int]) -> tuple[Fraction, ...]:
    """Shares of the remaining sources, summing to 1; all 0 if none of them has a share."""
    remaining = [Fraction(0) if i in gone else share for i, share in enumerate(shares)]
    total = sum(remaining)
    return tuple(share / total if total else share for share in remaining)


def _runs_out(segment: Segment, source: int, limit: int) -> int | None:
    """The last position of a segment at which a source is owed at most its limit; None if it never exceeds it."""

    def owed(position: int) -> Fraction:
        q = position - segment.start
        return segment.owed[source] + segment.shares[source] * q + segment.slope[source] * q * q / 2

    if segment.stop is None:
        if not segment.shares[source]:
            return None
        high = segment.start + 1 + int((limit - segment.owed[source]) / segment.shares[source]) + 1
    else:
        high = segment.stop
        if owed(high) <= limit:
            return None
    low = segment.start
    while high - low > 1:
        middle = (low + high) // 2
        if owed(middle) <= limit:
            low = middle
        else:
            high = middle
    return low
