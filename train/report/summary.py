"""`stratum report`: a picture and a summary of a run, made from its metrics.jsonl.

metrics.jsonl, recipe.yaml --> loss.png (loss, held-out bits per byte, learning rate), summary.md, for a
low-precision run precision.png (quantisation errors), for a run with tasks tasks.png
"""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.system.figure import MARK, MUTED, SERIES, canvas
from recipes.schema import units
from recipes.schema.errors import RecipeError, StratumError
from recipes.schema.foreign import in_markdown, printable, printable_lines, read_bounded
from recipes.schema.run_folder import METRICS, RECIPE, as_number, read_metrics, recipe_in
from train.report.experts import experts_section, is_reading
from train.report.precision import draw_precision, in_picture, is_measurement, precision_section
from train.report.tasks import Scores, draw_tasks, is_scores, tasks_section


@dataclass(frozen=True)
class RunRecord:
    """A run's metrics, by kind."""

    steps: dict[int, dict[str, Any]]
    """The last line of each step, by step."""
    evaluations: dict[int, dict[str, float]]
    resumes: list[int]
    repeated: dict[int, list[float]]
    """Losses of steps that were run more than once, in order."""
    repeated_norms: dict[int, list[float]]
    """Gradient norms of the same steps."""
    events: list[dict[str, Any]]
    """Lines of all other kinds, in order."""
    machine: dict[str, Any]
    """The machine of the last process; empty if it was not recorded."""
    phase_s: dict[str, float]
    """Seconds spent in each phase outside steps (saving, evaluating), all processes together."""

    def precision(self) -> list[dict[str, Any]]:
        """Measurements of quantised operands, the last of each step."""
        last = {line["step"]: line for line in self.events if line["kind"] == "precision" and is_measurement(line)}
        return [last[step] for step in sorted(last)]

    def experts(self) -> list[dict[str, Any]]:
        """Readings of the routers of expert layers."""
        return [line for line in self.events if line["kind"] == "experts" and is_reading(line)]

    def tasks(self) -> Scores:
        """Scores of tasks by step, the last of each step and task."""
        found: Scores = {}
        for line in self.events:
            if line["kind"] == "tasks" and is_scores(line):
                # A step may have several lines: of held-out rows and of `evaluate.tasks`.
                found[line["step"]] = {**found.get(line["step"], {}), **line["tasks"]}
        return found


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. StratumError if it has no metrics."""
    path = folder / METRICS
    if not path.exists():
        raise StratumError(f"{folder} has no {METRICS}, so it is not a run folder. Give one, e.g. runs/smoke.")
    lines = read_metrics(path)
    runs: dict[int, list[dict[str, Any]]] = {}
    phases: dict[str, float] = {}
    for line in lines:
        if not _NEEDED.get(line["kind"], set()) <= line.keys():
            continue
        if line["kind"] == "step":
            runs.setdefault(line["step"], []).append(_numbers_of(line))
        elif line["kind"] == "phase":
            phases[line["name"]] = phases.get(line["name"], 0.0) + as_number(line["seconds"])
    again = {step: times for step, times in runs.items() if len(times) > 1}
    machines = [line for line in lines if line["kind"] == "machine"]
    return RunRecord(
        steps={step: runs[step][-1] for step in sorted(runs)},
        evaluations={
            line["step"]: {name: as_number(score) for name, score in line["bits_per_byte"].items()}
            for line in lines
            if line["kind"] == "evaluation" and _NEEDED["evaluation"] <= line.keys()
        },
        resumes=[line["step"] for line in lines if line["kind"] == "resume" and "step" in line],
        repeated={step: [line["loss"] for line in times] for step, times in again.items()},
        repeated_norms={step: [line["grad_norm"] for line in times] for step, times in again.items()},
        events=[line for line in lines if line["kind"] not in ("step", "evaluation", "machine", "phase")],
        machine=machines[-1] if machines else {},
        phase_s=phases,
    )


_NEEDED = {
    "step": {
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "learning_rate",
        "seconds",
        "step_s",
        "tokens_per_s",
        "memory_bytes",
    },
    "evaluation": {"step", "bits_per_byte"},
    "phase": {"name", "seconds"},
}
"""Fields that a line of each kind must have; otherwise it is left out."""


def _numbers_of(line: dict[str, Any]) -> dict[str, Any]:
    """A step's line with every number as a float: NaN and infinity are stored as text or null."""
    names = ("loss", "grad_norm", "learning_rate", "step_s", "tokens_per_s", "mfu", "memory_bytes")
    seconds = {name: as_number(value) for name, value in line["seconds"].items()}
    return line | {name: as_number(line[name]) for name in names if name in line} | {"seconds": seconds}


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder. StratumError if it cannot be read or lacks what a report shows."""
    try:
        recipe = recipe_in(folder)
    except (FileNotFoundError, RecipeError) as error:
        why = error if isinstance(error, RecipeError) else f"{folder / RECIPE} cannot be read: it is missing."
        raise StratumError(f"{why} A report needs it.") from error
    for group, name, kind in (("run", "steps", int), ("model", "pattern", str), ("model", "hidden", int)):
        fields = recipe.get(group)
        if not isinstance(fields, dict) or type(fields.get(name)) is not kind:
            raise StratumError(f"{folder / RECIPE} has no {group}.{name} that is {kind.__name__}. A report needs it.")
    if not isinstance(recipe.get("precision"), dict):
        raise StratumError(f"{folder / RECIPE} has no group `precision`. A report needs it.")
    return recipe


def write_report(folder: Path, *, sample: str | None = None) -> None:
    """Write loss.png and summary.md into a run folder, replacing earlier ones. StratumError if it is not a run folder.

    sample: text shown in the summary; None takes sample.txt of the run folder, if it exists.
    """
    record, recipe = read_run(folder), recipe_of(folder)
    if sample is None and (folder / "sample.txt").exists():
        sample = read_bounded(folder / "sample.txt").decode(errors="replace")
    if record.steps:
        draw(record, folder / "loss.png", title=in_picture(folder.name), recipe=recipe)
    if measured := record.precision():
        draw_precision(measured, folder / "precision.png", title=in_picture(folder.name))
    if scored := record.tasks():
        draw_tasks(scored, folder / "tasks.png", title=in_picture(folder.name))
    (folder / "summary.md").write_text(summary(record, recipe, name=folder.name, sample=sample))


def draw(record: RunRecord, path: Path, *, title: str, recipe: dict[str, Any]) -> None:
    """Training loss, learning rate, and held-out bits per byte by source; resumes are marked."""
    steps = list(record.steps)
    losses = [record.steps[step]["loss"] for step in steps]
    with canvas(path, size=(11, 4.6)) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(4, 1))
        top = figure.add_subplot(grid[0, 0])
        below = figure.add_subplot(grid[1, 0], sharex=top)
        right = figure.add_subplot(grid[:, 1])

        top.plot(steps, losses, color="#a5c8ec", linewidth=0.9, label="each step")
        top.plot(steps, smooth(losses), color=SERIES[0], linewidth=2, label="running mean")
        top.set(title=f"{title}: {_loss(recipe)}", ylabel=f"nats per {unit_of(recipe)}" if unit_of(recipe) else "loss")
        top.tick_params(labelbottom=False)
        below.plot(steps, [record.steps[step]["learning_rate"] for step in steps], color=MUTED, linewidth=1.4)
        below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        for axes in (top, below, right):
            axes.grid(visible=True)
            for index, step in enumerate(step for step in record.resumes if step < max(steps)):
                label = "resumed" if index == 0 and axes is top else None
                axes.axvline(step, color=MARK, linestyle=(0, (4, 3)), linewidth=1.1, label=label)
        top.legend(loc="upper right")

        start = "random start" if recipe["run"].get("start_from") is None else "starting weights"
        sources = list(dict.fromkeys(name for scores in record.evaluations.values() for name in scores))
        for index, name in enumerate(sources):
            color = SERIES[index % len(SERIES)]
            points = sorted((step, scores[name]) for step, scores in record.evaluations.items() if name in scores)
            if points[0][0] == 0:
                right.axhline(points[0][1], color=color, linestyle=":", linewidth=1, alpha=0.8)
                place = (points[-1][0], points[0][1])
                note = {"color": color, "ha": "right", "va": "bottom", "fontsize": 8}
                right.annotate(start, place, textcoords="offset points", xytext=(0, 2), **note)
            label = f"{in_picture(name)}: {points[-1][1]:.2f} at step {points[-1][0]}"
            right.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=2, label=label)
        right.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
        if sources:
            finite = [s for scores in record.evaluations.values() for s in scores.values() if math.isfinite(s)]
            right.set_ylim(0, 1.1 * max(finite, default=1.0))
            right.legend(loc="lower left")


def summary(record: RunRecord, recipe: dict[str, Any], *, name: str, sample: str | None) -> str:
    """summary.md."""
    lines = [f"# Run {_code(name)}", ""]
    if not record.steps:
        return "\n".join([*lines, "No step is finished yet.", ""])
    lines += [
        *_facts(record, recipe),
        "",
        "![training loss, learning rate and held-out bits per byte](loss.png)",
        *_heldout(record),
        *(tasks_section(scored) if (scored := record.tasks()) else []),
        *(precision_section(measured) if (measured := record.precision()) else []),
        *(experts_section(readings[-1]) if (readings := record.experts()) else []),
        *_times(record),
        *_resumes(record),
    ]
    if sample:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample)), default=0))
        lines += ["", "## Sample", "", fence, printable_lines(sample.rstrip()), fence]
    files = "[recipe.yaml](recipe.yaml) (resolved), [metrics.jsonl](metrics.jsonl), [tensorboard/](tensorboard), "
    lines += ["", f"Files: {files}[checkpoints/](checkpoints).", ""]
    return "\n".join(lines)


def facts(record: RunRecord, recipe: dict[str, Any]) -> dict[str, str]:
    """Model, progress, loss, speed and machine of a run with at least one step, as plain texts by name."""
    steps = list(record.steps.values())
    last, machine = steps[-1], record.machine
    start: dict[str, Any] = next((e for e in reversed(record.events) if e["kind"] in ("start", "resume")), {})
    rows = {
        "model": f"{recipe['model']['pattern']}, hidden {recipe['model']['hidden']}, "
        f"{start.get('parameters', 0):,} parameters",
        **_origin(recipe),
        "precision": start.get("precision") or _precision(recipe["precision"]),
        "layout": f"{start.get('layout', '?')} on {start.get('device', '?')}",
        "steps": f"{last['step']:,} of {recipe['run']['steps']:,}",
        "tokens": f"{last['tokens']:,}",
        **_learned(steps),
        _loss(recipe): _loss_change([line["loss"] for line in steps], unit=unit_of(recipe)),
        "speed": f"{statistics.median(line['tokens_per_s'] for line in steps):,.0f} tokens/s (median)",
    }
    shares = [line["mfu"] for line in steps if "mfu" in line]
    if shares:
        of = "published bf16 peak" if str(start.get("device", "cpu")).startswith("cuda") else "measured fp32 peak"
        peak = f" of {as_number(machine['peak_flops']) / 1e12:.3g} TFLOP/s" if machine.get("peak_flops") else ""
        rows["model FLOPs utilisation"] = f"{100 * statistics.median(shares):.1f} % of the {of}{peak} (median)"
    rows["peak memory"] = f"{units.gib(max(line['memory_bytes'] for line in steps))} in the first process"
    if {"cpu", "device", "threads", "torch", "python"} <= machine.keys():
        where = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']}, host {machine['cpu']}"
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
        kernels = f", kernels {machine['kernels']}" if machine.get("kernels") else ""
        versions = f"torch {machine['torch']}, Python {machine['python']}"
        rows["machine"] = f"{where}, {threads} a process{kernels}; {versions}"
    return rows


def _facts(record: RunRecord, recipe: dict[str, Any]) -> list[str]:
    """The facts as a table of Markdown. Names of folders and the pattern are shown as code."""
    cells = facts(record, recipe)
    for name in ("precision", "layout", "machine"):  # they contain texts of the record; the others are numbers
        if name in cells:
            cells[name] = in_markdown(cells[name])
    for name in ("started from", "teacher"):
        if name in cells:
            cells[name] = _code(cells[name])
    cells["model"] = _code_before(cells["model"], ", ")
    return ["| | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in cells.items())]


def _code_before(text: str, separator: str) -> str:
    """Markdown: the part before the first separator as code, the rest as text."""
    first, _, rest = text.partition(separator)
    return f"{_code(first)}{separator}{in_markdown(rest)}"


def unit_of(recipe: dict[str, Any]) -> str:
    """What the training loss is a mean over, in nats; empty for GRPO, whose loss is not in nats."""
    return {"reward": "context", "dpo": "pair", "grpo": ""}.get(recipe.get("objective", {}).get("kind", ""), "token")


def _loss_change(losses: list[float], *, unit: str) -> str:
    """Mean loss of the first steps and of the last: a tenth of the run each, at most 50, because single steps are noisy."""
    count = min(50, max(1, len(losses) // 10))
    first, last = (sum(part) / count for part in (losses[:count], losses[-count:]))
    of = f" (means of the first and last {count} steps)" if count > 1 else ""
    return f"{first:.4f} -> {last:.4f}{f' nats per {unit}' if unit else ''}{of}"


def _loss(recipe: dict[str, Any]) -> str:
    """Name of the training loss. A divergence from a teacher is not a next-token loss, and it approaches 0."""
    objective = recipe.get("objective", {})
    if objective.get("kind") == "reward":
        return "training loss (Bradley-Terry)"
    if objective.get("kind") == "dpo":
        return "training loss (DPO)"
    if objective.get("kind") != "distill":
        return "training loss"
    is_mixed = objective.get("next_token_weight", 0) or objective.get("hidden_match", "none") != "none"
    divergence = "cross-entropy with" if objective.get("divergence") == "cross_entropy" else "divergence from"
    return f"training loss ({divergence} the teacher{', mixed' * bool(is_mixed)})"


def _origin(recipe: dict[str, Any]) -> dict[str, str]:
    """Rows for starting weights and teacher, if the run has them."""
    objective, start = recipe.get("objective", {}), recipe["run"].get("start_from")
    rows = {"started from": str(start)} if start else {}
    if objective.get("kind") == "distill":
        rows["teacher"] = str(objective.get("teacher_cache") or objective.get("teacher"))
    return rows


def _learned(steps: list[dict[str, Any]]) -> dict[str, str]:
    """Row for the labels that were learned, if a step recorded them: those of chats are the assistant's."""
    counted = [line for line in steps if "labels" in line]
    if not counted:
        return {}
    labels = [as_number(line["labels"]) for line in counted]
    tokens = sum(line["tokens_per_s"] * line["step_s"] for line in counted)
    share = f"{100 * sum(labels) / tokens:.1f} % of the tokens" if tokens > 0 else "of no tokens"
    return {"learned labels": f"{sum(labels):,.0f}, {share}; {min(labels):,.0f} to {max(labels):,.0f} a step"}


def _precision(precision: dict[str, Any]) -> str:
    """Number formats as text, for older records whose start line does not contain them."""
    scaling = precision.get("scaling", "none")
    text = precision["params"] if scaling == "none" else f"{precision['params']}, linear layers in {scaling}"
    if precision.get("switch_at_tokens") is not None:
        text += f", {precision['scaling_after']} from token {precision['switch_at_tokens']:,}"
    return text


def _heldout(record: RunRecord) -> list[str]:
    """First and last held-out bits per byte of every source."""
    if not record.evaluations:
        return []
    at_start, at_end = min(record.evaluations), max(record.evaluations)
    first, last = record.evaluations[at_start], record.evaluations[at_end]
    return [
        "",
        "## Held-out bits per byte",
        "",
        f"| source | step {at_start} | step {at_end} |",
        "|---|---|---|",
        *(f"| {in_markdown(name)} | {first.get(name, math.nan):.3f} | {last[name]:.3f} |" for name in last),
    ]


def _times(record: RunRecord) -> list[str]:
    """Time by part of a step, and time outside steps."""
    steps = list(record.steps.values())
    names = dict.fromkeys(part for line in steps for part in line["seconds"])
    medians = {name: statistics.median(line["seconds"].get(name, 0.0) for line in steps) for name in names}
    whole = sum(medians.values())
    lines = ["", "## Where a step's time goes", "", "| part | median ms | share |", "|---|---|---|"]
    for name, value in sorted(medians.items(), key=lambda item: -item[1]):
        lines.append(f"| {in_markdown(name)} | {1000 * value:.1f} | {100 * value / whole:.1f} % |")
    if record.phase_s:
        trained = sum(line["step_s"] for line in steps)
        spent = ", ".join(f"{in_markdown(name)} {seconds:.1f} s" for name, seconds in record.phase_s.items())
        lines += ["", f"Outside steps: {spent}; steps took {trained:.1f} s."]
    return lines


def _resumes(record: RunRecord) -> list[str]:
    """Where the run was resumed, and whether repeated steps gave the same result."""
    lines = ["", "## Resumes", ""]
    if not record.resumes and not record.repeated:
        return [*lines, "None: the run was not interrupted."]
    lines += [f"- resumed after step {step}" for step in record.resumes]
    if record.repeated:
        total = len(record.repeated)
        same = sum(
            len(set(values)) == 1 and len(set(record.repeated_norms[step])) == 1
            for step, values in record.repeated.items()
        )
        text = f"{same} of {total} steps that ran more than once gave bitwise the same loss and gradient norm."
        if same < total:
            gap = max(max(values) - min(values) for values in record.repeated.values())
            layouts = {e["layout"] for e in record.events if e["kind"] in ("start", "resume") and "layout" in e}
            text += f" Largest difference in loss: {gap:.3g} nats per token."
            if len(layouts) > 1:
                text += (
                    f" The layout changed ({in_markdown(', '.join(sorted(layouts)))}), which changes the order of sums."
                )
        lines += ["", text]
    return lines


def _code(text: str) -> str:
    """A text as code in a line or a table of Markdown; plain if it contains a backtick. No markup in it has an effect."""
    if "`" in text or "|" in text:
        return in_markdown(text)
    return f"`{printable(text, most=300)}`"


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over up to a twentieth of the run (2 to 50 steps) on either side. Non-finite values are left out."""
    half = min(50, max(2, len(values) // 20))
    sums = list(accumulate((value if math.isfinite(value) else 0.0 for value in values), initial=0.0))
    counts = list(accumulate(map(math.isfinite, values), initial=0))
    means = []
    for place in range(len(values)):
        first, last = max(0, place - half), min(len(values), place + half + 1)
        count = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / count if count else math.nan)
    return means
