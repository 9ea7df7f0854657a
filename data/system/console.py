"""The terminal: the one place that makes rich's consoles and progress bars.

Texts are printed as they are: names and messages come from files, and rich would read brackets in them as its markup.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 200
"""Columns of a table in a file or pipe, where nothing limits it."""
_FOLDED = 12
"""Fewest columns for cells that may be broken inside words (`overflow="fold"`)."""


def open_console(
    *, stderr: bool = False, quiet: bool = False, wraps: bool = False, width: int | None = None
) -> Console:
    """A console without markup and highlighting. wraps: break long lines, and fit tables to the terminal's usual width in files
    too. Otherwise lines stay whole, so that they can be copied and searched."""
    console = Console(stderr=stderr, quiet=quiet, soft_wrap=not wraps, markup=False, highlight=False, width=width)
    if width is None and not wraps and not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def print_table(console: Console, table: Table) -> None:
    """Print a table; on a console too narrow for its words, each row as a few lines: the first cell, then `name: value`."""
    if _fewest_columns(console, table) <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="bold")
    for cells in zip(*(list(column.cells) for column in table.columns), strict=True):
        named = [(str(column.header), cell) for column, cell in zip(table.columns, cells, strict=True)]
        (first_name, first), *others = named
        if not table.show_header and len(others) == 1:
            console.print(_named(str(first), others[0][1]))
            continue
        console.print(_named(first_name, first))
        for name, cell in others:
            if name and str(cell):  # a column without a name is a picture of another one
                console.print(Padding(_named(name, cell), (0, 0, 0, 2), expand=False))
    if table.caption:
        console.print(table.caption)


def _named(name: str, cell: object) -> Text:
    value = cell if isinstance(cell, Text) else Text(str(cell))
    return Text.assemble(f"{name}: ", value) if name else value


def _fewest_columns(console: Console, table: Table) -> int:
    """Columns of a terminal in which the table breaks no word."""
    wide, count = console.options.update(width=10_000), 1
    for column in table.columns:
        shown = [*([column.header] if table.show_header else []), *column.cells]
        words = max((Measurement.get(console, wide, cell).minimum for cell in shown), default=0)
        count += 3 + (min(words, _FOLDED) if column.overflow == "fold" else words)
    return count


def bars(*columns: ProgressColumn | str, console: Console, is_shown: bool = True, transient: bool = False) -> Progress:
    """Progress bars with these columns, on terminals only. transient: they disappear at the end."""
    is_hidden = not (is_shown and console.is_terminal)
    return Progress(*columns, console=console, transient=transient, disable=is_hidden, refresh_per_second=4)


@contextmanager
def progress(
    title: str, total: float, *, in_bytes: bool = True, is_shown: bool = True
) -> Iterator[Callable[[float], None]]:
    """One bar on standard error while a command works. Yields a function to call with each amount that is done."""
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *amount, TimeRemainingColumn())
    with bars(*columns, console=open_console(stderr=True), is_shown=is_shown, transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda done: shown.advance(task, done)
