"""The terminal: the one place that makes rich's consoles and progress bars.

Texts are printed as they are: names and messages come from files, and rich would read brackets in them as its markup.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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

_FILE_WIDTH = 200
"""Columns of a table in a file or pipe, where nothing limits it."""


def open_console(
    *, stderr: bool = False, quiet: bool = False, wraps: bool = False, width: int | None = None
) -> Console:
    """A console without markup and highlighting. wraps: break long lines, and fit tables to the terminal's usual width in files
    too. Otherwise lines stay whole, so that they can be copied and searched."""
    console = Console(stderr=stderr, quiet=quiet, soft_wrap=not wraps, markup=False, highlight=False, width=width)
    if width is None and not wraps and not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


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
