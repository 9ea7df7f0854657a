"""Format: whether an answer consists of the wanted parts, in order."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from recipes.schema.errors import DataError
from train.align.verify.sample import Sample

_NAME = re.compile(r"[A-Za-z][\w-]{0,40}")


def open_tags(names: Sequence[str]) -> Callable[[Sample], float]:
    """1 if the answer is <a>...</a> <b>...</b> for the names in order, each tag once, nothing but blanks around them."""
    check_names(names)

    def judge(sample: Sample) -> float:
        rest = sample.answer.strip()
        for name in names:
            start, end = f"<{name}>", f"</{name}>"
            if not rest.startswith(start) or sample.answer.count(start) != 1 or sample.answer.count(end) != 1:
                return 0.0
            _, found, rest = rest.partition(end)
            if not found:
                return 0.0
            rest = rest.strip()
        return float(not rest)

    return judge


def check_names(names: Any) -> None:
    """DataError if these are not names of tags."""
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and _NAME.fullmatch(n) for n in names):
        raise DataError(f"names={names!r} is not a list of tag names, such as [think, answer]")
