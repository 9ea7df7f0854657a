"""A matplotlib figure that is written to a file: the set-up and style of every picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.schema.errors import RecipeError

INK, MUTED, GRID, MARK = "#1f2933", "#7b8794", "#e4e7eb", "#d9480f"
SERIES = ("#2b6cb0", "#2f9e44", "#9c36b5", "#e67700", "#0b7285", "#c2255c")
"""Colours of lines that are compared."""
_STYLE = {
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.spines.right": False, "axes.spines.top": False,
    "axes.axisbelow": True, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "grid.color": GRID, "font.size": 9, "legend.frameon": False, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED,
}  # fmt: skip


def check_kind(path: Path) -> None:
    """Raise RecipeError if a picture of this name cannot be written."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise RecipeError(
            f"--picture {path}: this format is not supported. Use a name that ends in .png, .svg or .pdf."
        )


@contextmanager
def canvas(path: Path, *, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of `size` inches, written to `path` when the context ends. Raises RecipeError if it is not .png, .svg or .pdf."""
    import matplotlib  # slow to import, and only needed for pictures

    matplotlib.use("Agg")
    from matplotlib import pyplot

    check_kind(path)
    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=size, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)
