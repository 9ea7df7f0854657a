"""The last number in a text."""

import re

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, commas between thousands ignored; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
