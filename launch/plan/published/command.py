"""`stratum validate`: the planner's predictions next to published throughput."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.system.figure import check_kind
from launch.plan.published.picture import draw
from launch.plan.published.rows import PUBLISHED, read_rows
from launch.plan.published.validate import HEAD, assess, line_json, line_text, report, summary, table
from recipes.schema.errors import RecipeError
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser

_EXAMPLES = """
stratum validate                                    the rows shipped with this project
stratum validate rows.csv                           your own rows, with the same columns
stratum validate --picture scatter.png              predicted against published
stratum validate --table                            the table of docs/plan.md
"""
_NOTES = """
A row is in scope if its model is in a table of public shapes (dense, hybrid or with experts), its GPU is known, and its layout is
complete. Rows with LoRA, row-wise FP8 or TPUs are out of scope. docs/plan.md gives the FLOP convention of each
publisher, the constants, and the rows they were fitted on.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum validate`. -> exit status."""
    parser = CommandParser(
        "validate",
        about="Compare predictions of the planner with published throughput, row by row, and summarise the errors.",
        examples=_EXAMPLES,
        notes=_NOTES,
    )
    parser.add_argument(
        "rows", nargs="?", type=Path, default=PUBLISHED, metavar="ROWS.csv", help="(default: the shipped rows)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: rows and summary")
    parser.add_argument("--table", action="store_true", help="only the table by source, as Markdown")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw predicted against published (.png, .svg, .pdf)"
    )
    own = parser.parse_args(list(arguments))
    try:
        if own.picture is not None:
            check_kind(own.picture)
        lines = [assess(row) for row in read_rows(own.rows)]
    except RecipeError as error:
        return complain(error)
    except OSError as error:
        return complain(f"{own.rows}: {error.strerror}. Name a file with the columns of {PUBLISHED.name}.")
    except (ValueError, csv.Error) as error:
        return complain(f"{own.rows}: {error}")
    if own.json:
        sys.stdout.write(json.dumps({"rows": [line_json(line) for line in lines], "summary": summary(lines)}) + "\n")
    elif own.table:
        sys.stdout.write(table(lines))
    else:
        sys.stdout.write(HEAD + "".join(line_text(number, line) for number, line in enumerate(lines, start=2)))
        sys.stdout.write("\n" + report(lines))
    if own.picture is not None:
        draw([line for line in lines if line.found is not None], own.picture)
    return 0
