"""What a report shows of one run besides its curves: progress, where the time went, data drawn, quantisation, events.

run folder, metrics.jsonl --> plain values that JSON can contain
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.order.blend import blend_of
from data.prepared import identity_of, source_rows
from data.store.manifest import MANIFEST, read_manifest
from launch.lease import LeaseError, current_owner
from launch.plan.cost.device import find_device
from launch.plan.planner import make_plan
from launch.starts import starts_of
from launch.time_spent import Stretch, goodput, time_spent, totals
from recipes.schema import units
from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable, printable_lines, read_bounded, read_json
from recipes.schema.manifest import read_manifest as read_checkpoint_manifest
from recipes.schema.profile import TABLE
from recipes.schema.read import recipe_from_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import CHECKPOINTS, METRICS, Line, as_number, read_metrics, steps_in
from train.report.precision import operand_order
from train.report.summary import RunRecord, facts, read_run, recipe_of

MOST_COLUMNS = 240
"""Columns of the time line."""
MOST_MEASUREMENTS = 60
"""Measurements of quantised operands that are shown."""
MOST_EVENTS = 500
MOST_SAMPLES = 40
"""Samples that are shown: a quarter from the beginning of the run, the others from its end."""
MOST_SAMPLED_STEPS = 60
"""Steps whose continuations of `evaluate.sample_prompts` are shown, evenly spread, the last among them."""
MOST_TEXTS = 32
MOST_TEXT = 4000
"""Texts of a step that are shown, and characters of each."""
MOST_TRACES = 4
_TOLD_ELSEWHERE = {
    "experts",
    "precision",
    "tasks",
    "rollouts",
    "rollout_samples",
    "samples",
    "save_requested",
    "save_staged",
    "unreduced_step",
}


@dataclass(frozen=True)
class ReportedRun:
    """One run of a report."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    lines: list[Line]
    record: RunRecord


def read_reported(folder: Path) -> ReportedRun:
    """A run's files. StratumError if the folder has no metrics or no readable recipe."""
    return ReportedRun(
        folder.resolve().name, folder, recipe_of(folder), read_metrics(folder / METRICS), read_run(folder)
    )


def describe(run: ReportedRun) -> dict[str, Any]:
    """Everything that the page shows of one run, without its curves."""
    record = run.record
    stretches = time_spent(run.lines, starts_of(run.folder))
    seconds = totals(stretches)
    return {
        "name": printable(run.name),
        "state": _state(run),
        "facts": {name: printable(text) for name, text in (facts(record, run.recipe) if record.steps else {}).items()},
        "tiles": _tiles(record, seconds),
        "planned": _planned(run),
        "seconds": {printable(name): round(value, 3) for name, value in seconds.items()},
        "timeline": _timeline(stretches, run.lines),
        "data": _data(run),
        "precision": _precision(record),
        "profile": _profile(run.folder),
        "samples": _samples(run),
        "continued": _continued(run.lines),
        "events": _events(run.lines),
        "recipe": recipe_yaml(run.recipe),
    }


def _state(run: ReportedRun) -> str:
    """In a word or two, from the run's lease and its last step; Slurm is not asked."""
    try:
        owner = current_owner(run.folder, may_ask_slurm=False)
    except LeaseError:
        owner = None
    if owner is not None and owner[1] == "alive":
        return "training"
    last = max(run.record.steps, default=0)
    return "finished" if last >= run.recipe["run"]["steps"] else "not training"


def _tiles(record: RunRecord, seconds: dict[str, float]) -> dict[str, str]:
    """The figures that one looks at first."""
    if not record.steps:
        return {}
    last = list(record.steps.values())[-1]
    tiles = {"step": f"{last['step']:,}", "tokens": f"{last['tokens']:,}", "loss": f"{last['loss']:.4f}"}
    if record.evaluations:
        scores = [score for score in record.evaluations[max(record.evaluations)].values() if math.isfinite(score)]
        if scores:
            tiles["held-out bits per byte, mean"] = f"{sum(scores) / len(scores):.4f}"
    tiles["tokens/s"] = f"{last['tokens_per_s']:,.0f}"
    whole = sum(seconds.values())
    if whole:
        tiles["wall time"] = units.span(whole)
        tiles["goodput"] = f"{100 * goodput(seconds):.1f} %"
    return tiles


def _planned(run: ReportedRun) -> list[list[str]]:
    """Rows (what, planned, measured), for a run on GPUs that the planner knows; else none."""
    record, device = run.record, find_device(str(run.record.machine.get("device", "")))
    layout = next((e.get("world") for e in reversed(record.events) if e["kind"] in ("start", "resume")), None)
    if device is None or type(layout) is not int or not record.steps:
        return []
    try:
        plan = make_plan(recipe_from_mapping(run.recipe), world=layout, device=device)
    except StratumError:
        return []
    steps = sorted(as_number(line["step_s"]) for line in record.steps.values())
    memory = max(as_number(line["memory_bytes"]) for line in record.steps.values())
    return [
        ["seconds a step", f"{plan.time.seconds:.3f}", f"{steps[len(steps) // 2]:.3f} (median)"],
        ["memory of the fullest GPU", units.gib(plan.fullest.total), f"{units.gib(memory)} in the first process"],
    ]


def _timeline(stretches: Sequence[Stretch], lines: Sequence[Line]) -> dict[str, Any]:
    """Shares of each kind of time in equal columns of the wall time, and the moments of saves and resumes."""
    if not stretches:
        return {}
    start, end = stretches[0].start, stretches[-1].end
    columns = min(MOST_COLUMNS, max(1, int(end - start)))
    width = (end - start) / columns
    shares: dict[str, list[float]] = {stretch.kind: [0.0] * columns for stretch in stretches}
    for stretch in stretches:
        first = min(columns - 1, int((stretch.start - start) / width))
        last = min(columns - 1, int((stretch.end - start) / width))
        for column in range(first, last + 1):
            begin = start + column * width
            shares[stretch.kind][column] += max(
                0.0, min(stretch.end, begin + width) - max(stretch.start, begin)
            ) / width  # fmt: skip
    marks = [
        [round((as_number(line["time"]) - start) / (end - start), 5), line["kind"], line["step"]]
        for line in lines
        if line["kind"] in ("save", "resume")
        and type(line.get("step")) is int
        and start <= as_number(line.get("time")) <= end
    ]
    return {
        "start": units.moment(start),
        "seconds": end - start,
        "shares": {printable(kind): [round(share, 4) for share in found] for kind, found in shares.items()},
        "marks": marks[-MOST_EVENTS:],
    }


def _data(run: ReportedRun) -> dict[str, Any]:
    """Rows of each source that were drawn so far, wanted and real shares and epochs; a note if the data is not here."""
    try:
        recipe = recipe_from_mapping(run.recipe)
        folder = Path(recipe.data.folder)
        if not (folder / MANIFEST).is_file():
            return {"note": f"The prepared data is not in {printable(str(folder))}."}
        manifest = read_manifest(folder)
        rows = source_rows(recipe.data, manifest)
        blend = blend_of(recipe.data, rows)
        if _hash_of(run.folder) not in (None, identity_of(manifest, blend)):
            return {"note": f"{printable(str(folder))} is not the data that this run was trained on."}
        drawn, now = _shares(recipe, blend.epochs(_position(run, recipe)), rows), _wanted(recipe, blend, run)
    except (StratumError, OSError, KeyError, ValueError) as error:
        return {"note": printable(str(error))}
    return {
        "rows": [
            [printable(source.name), f"{100 * wanted:.2f} %", f"{100 * share:.2f} %", f"{count:,}", f"{epochs:.3f}"]
            for source, wanted, (share, count, epochs) in zip(blend.sources, now, drawn, strict=True)
        ]
    }


def _position(run: ReportedRun, recipe: Recipe) -> int:
    return max(run.record.steps, default=0) * recipe.run.global_rows


def _wanted(recipe: Recipe, blend: Any, run: ReportedRun) -> list[float]:
    """Share of each source that the recipe asks for up to now."""
    position = _position(run, recipe)
    if not position:
        return [float(share) for share in blend.curriculum.segments[0].shares]
    segment = [segment for segment in blend.curriculum.segments if segment.start < position][-1]
    return [float(owed / position) for owed in segment.owed_at(position)]


def _shares(recipe: Recipe, epochs: Any, rows: Sequence[int]) -> list[tuple[float, int, float]]:
    counts = [round(float(epoch) * count) for epoch, count in zip(epochs, rows, strict=True)]
    whole = max(1, sum(counts))
    return [(count / whole, count, float(epoch)) for count, epoch in zip(counts, epochs, strict=True)]


def _hash_of(folder: Path) -> str | None:
    """Identity of the data in the newest checkpoint's manifest; None without one."""
    found = steps_in(folder / CHECKPOINTS)
    return read_checkpoint_manifest(found[-1]).data_hash if found else None


def _precision(record: RunRecord) -> dict[str, Any]:
    """Signal over quantisation noise of every operand at measured steps: rows are operands of layers, columns are steps."""
    measured = record.precision()
    if not measured:
        return {}
    size = math.ceil(len(measured) / MOST_MEASUREMENTS)
    shown = measured[::-1][::size][::-1]
    readings = sorted((r for line in shown for r in line["readings"]), key=lambda r: (r["layer"], operand_order(r)))
    names = dict.fromkeys((r["layer"], r["linear"], r["operand"]) for r in readings)
    table: dict[tuple[Any, ...], list[float | None]] = {name: [None] * len(shown) for name in names}
    for column, line in enumerate(shown):
        for r in line["readings"]:
            number = as_number(r["snr_db"])
            table[r["layer"], r["linear"], r["operand"]][column] = round(number, 2) if math.isfinite(number) else None
    floors = [as_number(r["floor_db"]) for r in shown[-1]["readings"]]
    return {
        "steps": [line["step"] for line in shown],
        "scaling": printable(shown[-1]["scaling"]),
        "floor": min(floors),
        "rows": [
            [f"{layer} {printable(linear)}", printable(operand.replace("_", " ")), values]
            for (layer, linear, operand), values in table.items()
        ],
    }


def _profile(folder: Path) -> list[list[str]]:
    """Rows (trace, operation, calls, ms, share) of the traces' longest operations, of at most four traces."""
    rows = []
    for path in sorted((folder / "profile").glob(f"*/*{TABLE}"))[-MOST_TRACES:]:
        try:
            found = read_json(path, most_bytes=1 << 20)
        except (OSError, ValueError):
            continue  # damaged, or not a file
        trace = printable(f"{path.parent.name}/{path.name.removesuffix(TABLE)}.json.gz")
        for one in found if isinstance(found, list) else ():
            if isinstance(one, dict):
                calls, seconds, share = (as_number(one.get(key)) for key in ("calls", "seconds", "share"))
                name = printable(str(one.get("name")), most=120)
                rows.append([trace, name, f"{calls:,.0f}", f"{1000 * seconds:,.1f}", f"{100 * share:.1f} %"])
    return rows


def _samples(run: ReportedRun) -> list[dict[str, Any]]:
    """Texts that the model wrote: sample.txt, and the first and the newest answers that reinforcement learning sampled."""
    found = []
    try:
        text = read_bounded(run.folder / "sample.txt").decode(errors="replace")
        found.append({"title": "sample.txt", "text": printable_lines(text.rstrip())})
    except OSError:
        pass
    for line in run.lines:
        if line["kind"] == "rollout_samples" and isinstance(line.get("samples"), list):
            for sample in line["samples"]:
                if isinstance(sample, dict):
                    parts = (f"{key}: {value}" for key, value in sample.items())
                    found.append({"title": f"step {line.get('step')}", "text": printable_lines("\n".join(parts))})
    first = MOST_SAMPLES // 4
    return found if len(found) <= MOST_SAMPLES else found[:first] + found[first - MOST_SAMPLES :]


def _continued(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """What the model wrote after each prompt of `evaluate.sample_prompts`, by step; of a repeated step, the last time."""
    last = {
        line["step"]: line["samples"]
        for line in lines
        if line["kind"] == "samples" and type(line.get("step")) is int and isinstance(line.get("samples"), list)
    }
    steps = sorted(last)
    size = max(1, math.ceil(len(steps) / MOST_SAMPLED_STEPS))
    return [
        {
            "step": step,
            "texts": [
                [printable_lines(str(sample.get(part, ""))[:MOST_TEXT]) for part in ("prompt", "text")]
                for sample in last[step][:MOST_TEXTS]
                if isinstance(sample, dict)
            ],
        }
        for step in steps[::-1][::size][::-1]
    ]


def _in_words(value: Any) -> str:
    """Fields of an event for a reader: numbers with four digits, without quotes."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_in_words(inner)})" if isinstance(inner, dict) else f"{key} {_in_words(inner)}"
            for key, inner in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _events(lines: Sequence[Line]) -> list[list[str]]:
    """(time, kind, step, text) of everything that happened besides steps, evaluations and phases; the newest last."""
    found = []
    for line in lines:
        if line["kind"] in ("step", "evaluation", "phase", "machine") or line["kind"] in _TOLD_ELSEWHERE:
            continue
        time = as_number(line.get("time"))
        rest = {key: value for key, value in line.items() if key not in ("kind", "time", "step", "at")}
        text = line["text"] if isinstance(line.get("text"), str) else _in_words(rest)
        found.append(
            [
                units.moment(time) if 0 < time < 1e11 else "",
                printable(line["kind"].replace("_", " ")),
                f"{line['step']:,}" if type(line.get("step")) is int else "",
                printable_lines(text[:2000]),
            ]
        )
    return found[-MOST_EVENTS:]
