"""`stratum report`: what a run did, as a page to look at, a picture and a summary; or several runs side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.schema.errors import RecipeError, StratumError
from recipes.schema.foreign import read_bounded_text
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser, run_or_path


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum report`."""
    parser = CommandParser(
        "report",
        about="Write what a run did: report.html (one page to look at, without network access), summary.md and loss.png in its "
        "folder. Of several runs: one page that compares them. Works while they train.",
        examples="""
stratum report runs/smoke
stratum report smoke                               the same: `smoke` is looked up in runs/
stratum report runs/a runs/b --out compared.html   side by side, differences of their recipes first
""",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder (runs/smoke), or its name (smoke)")
    parser.add_argument("--sample", type=Path, metavar="FILE", help="text file with a sample to show in the summary")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the page (default: report.html in the run's folder)"
    )
    parsed = parser.parse_args(arguments)
    from train.report.files import PAGE, write_files, write_page  # imports numpy, too slow for --help

    try:
        folders = [run_or_path(name) for name in parsed.runs]
        if parsed.sample and (len(folders) > 1 or parsed.out):
            raise RecipeError("--sample is for summary.md in the folder of one run. Leave it out, or leave out --out.")
        if len(folders) > 1 and parsed.out is None:
            raise RecipeError(
                f"{len(folders)} runs have no folder in common. Name a file for the page: --out compared.html"
            )
        if parsed.out is not None and parsed.out.is_dir():
            raise RecipeError(f"--out {parsed.out} is a folder. Name a file, e.g. --out {parsed.out / PAGE}")
        if parsed.out is None:
            written = write_files(folders[0], sample=read_bounded_text(parsed.sample) if parsed.sample else None)
        else:
            write_page(folders, parsed.out)
            written = [parsed.out]
    except (StratumError, OSError, ValueError) as error:
        return complain(error)
    sys.stdout.write(f"wrote {', '.join(map(str, written))}\n")
    return 0
