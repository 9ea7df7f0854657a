"""Formats numbers with units for people: sizes, durations, times. The only place with such rules."""

import time

GIB = 2.0**30
"""Bytes of a GiB."""


def size(count: float) -> str:
    """Bytes on a disk or in a transfer, in powers of 1,000: `512 B`, `4.20 MB`, `79.6 GB`."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{_three_digits(count)} {unit}"
    return f"{_three_digits(count / 1000)} TB"


def gib(count: float) -> str:
    """Bytes of memory, in powers of 1,024: `0.50 GiB`, `79.6 GiB`."""
    return f"{_three_digits(count / GIB)} GiB"


def span(seconds: float) -> str:
    """A rough duration: `8.0 s`, `12.5 min`, `3.1 h`, `2.5 days`."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def clock(seconds: float) -> str:
    """A duration to the second: `0:00:07`, `2 d 3:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def moment(seconds: float) -> str:
    """A time in seconds since the epoch, in this machine's time zone: `2026-03-01 12:00:00`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def stamp() -> str:
    """The time now, for names that sort by time: `20260301-120000`."""
    return time.strftime("%Y%m%d-%H%M%S")


def _three_digits(value: float) -> str:
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
