"""A matplotlib figure that is written to a file. All pictures of `stratum plan` and `stratum validate` use it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.schema.errors import RecipeError

_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}


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
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
