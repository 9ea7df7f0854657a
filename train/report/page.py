"""Puts a report's data into one HTML file that needs no network.

    runs --page--> page.html with uPlot (MIT, train/report/uplot), the style, the script and the data inside

The page comes from data that may be damaged or someone else's. So texts are only ever set as text, and a content security
policy lets the browser run nothing but the scripts whose digests it names, and load nothing.
"""

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from recipes.schema import units
from recipes.schema.changes import differences
from recipes.schema.foreign import printable
from train.report.curves import charts_of, progress_of
from train.report.facts import ReportedRun, describe


def page(runs: Sequence[ReportedRun]) -> str:
    """The report of a run, or of several side by side, as HTML."""
    records = [run.record for run in runs]
    data = {
        "written": units.moment(time.time()),
        "runs": [describe(run) | {"progress": progress_of(run.record)} for run in runs],
        "charts": {name: [chart.as_json() for chart in charts] for name, charts in charts_of(records).items()},
        "differences": _differences(runs),
    }
    title = ", ".join(printable(run.name, most=60) for run in runs)
    files = resources.files("train.report")
    style = (files / "uplot" / "uPlot.min.css").read_text() + (files / "page.css").read_text()
    scripts = [(files / "uplot" / "uPlot.iife.min.js").read_text(), (files / "page.js").read_text()]
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {' '.join(map(_digest, scripts))}; "
        f"base-uri 'none'; form-action 'none'"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_in_html(title)}</title>",
        f"<style>{style}</style>",
        '<body><main id="page"><noscript>This report draws itself with JavaScript.</noscript></main>',
        f'<script type="application/json" id="data">{_in_script(data)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _differences(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """Rows (field, value in each run) of every recipe field in which a run differs from the first. A source of data that not all
    runs have is one row, with its path."""
    first, others = runs[0], runs[1:]
    sources: list[dict[str, Any]] = [(run.recipe.get("data") or {}).get("sources") or {} for run in runs]
    names = {name for of_run in sources for name in of_run}
    partly = {f"data.sources.{name}": name for name in names if not all(name in of_run for of_run in sources)}
    keys: dict[str, list[Any]] = {
        key: [of_run[name].get("path") if name in of_run else "no such source" for of_run in sources]
        for key, name in partly.items()
    }
    for place, other in enumerate(others, start=1):
        for change in differences(first.recipe, other.recipe):
            if not any(change.key.startswith(f"{key}.") for key in partly):
                keys.setdefault(change.key, [change.old] * len(runs))[place] = change.new
    return [[key, *(printable(str(value), most=200) for value in values)] for key, values in sorted(keys.items())]


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _in_html(text: str) -> str:
    return "".join(f"&#{ord(c)};" if c in "&<>\"'" else c for c in text)


def _in_script(data: Any) -> str:
    """JSON that cannot end the element it is in."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
