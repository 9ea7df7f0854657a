"""The files that a report leaves in a run's folder."""

from pathlib import Path

from data.system import disk
from train.report.facts import read_reported
from train.report.page import page
from train.report.summary import write_report

PAGE = "report.html"


def write_files(folder: Path, *, sample: str | None = None) -> list[Path]:
    """Write report.html, summary.md and the pictures of one run, replacing earlier ones. -> the first two and loss.png.

    sample: text to show in the summary; None takes sample.txt of the run folder, if it exists. Raises StratumError, OSError.
    """
    write_report(folder, sample=sample)
    write_page([folder], folder / PAGE)
    return [folder / PAGE, folder / "summary.md", folder / "loss.png"]


def write_page(folders: list[Path], out: Path) -> None:
    """Write the page about one or several runs. Raises StratumError, OSError."""
    disk.write_text(out, page([read_reported(folder) for folder in folders]))
