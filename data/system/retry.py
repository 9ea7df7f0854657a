"""Waiting times between tries."""


def wait_s(failures: int, *, first_s: float, most_s: float = float("inf")) -> float:
    """Seconds to wait after so many failures in a row: none after success, then `first_s`, doubling, at most `most_s`."""
    return min(most_s, first_s * 2.0 ** (failures - 1)) if failures else 0.0
