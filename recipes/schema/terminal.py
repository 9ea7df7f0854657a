"""Breaks long lines of help at blanks, so that a narrow terminal does not break them inside words."""

import re
import shutil
from typing import TextIO

_NARROWEST = 20
"""Columns below which lines are left as they are."""


def fitted(text: str, stream: TextIO) -> str:
    """The text for this stream: on a terminal, lines that are wider are broken between words; otherwise it is unchanged."""
    columns = shutil.get_terminal_size().columns if stream.isatty() else 0
    return text if columns < _NARROWEST else "\n".join(_broken(line, columns) for line in text.split("\n"))


def _broken(line: str, columns: int) -> str:
    """One line in several. Later ones begin below its second column, if there is enough room, otherwise a little further in."""
    if len(line) <= columns:
        return line
    import textwrap  # most help is printed without it, and has to appear at once

    indent = len(line) - len(line.lstrip())
    second = re.search(r"\S {2,}(?=\S)", line)
    below = second.end() if second is not None and second.end() <= columns // 2 else min(indent + 4, columns // 2)
    return textwrap.fill(line, columns, subsequent_indent=" " * below, break_long_words=False, break_on_hyphens=False)
