"""Text and picture about the tasks that were scored during a run, made from the task lines of its metrics.jsonl.

lines of kind "tasks" --> tasks.png (each score over the steps, with its interval), a section of summary.md
"""

from pathlib import Path
from typing import Any

from data.system.figure import SERIES, canvas
from recipes.schema.foreign import in_markdown
from recipes.schema.run_folder import as_number
from train.report.precision import in_picture

Scores = dict[int, dict[str, dict[str, Any]]]
"""By step, by task: what `train.evaluate.training_tasks` recorded."""


def is_scores(line: dict[str, Any]) -> bool:
    """Whether a line has the fields of scored tasks: it may be damaged or written by someone else."""
    tasks = line.get("tasks")
    return (
        type(line.get("step")) is int
        and isinstance(tasks, dict)
        and all(isinstance(entry, dict) and isinstance(entry.get("metrics"), dict) for entry in tasks.values())
    )


def draw_tasks(scores: Scores, path: Path, *, title: str) -> None:
    """Left: shares of right answers. Right: bits per byte and losses. The bands are 95 % intervals. The report shows the tokens
    per pass, which have another unit."""
    with canvas(path, size=(11, 4.2)) as figure:
        left, right = figure.subplots(1, 2)
        for index, (task, metric) in enumerate(one for one in _curves(scores) if one[1] != "tokens_per_pass"):
            axes = right if metric in ("bits_per_byte", "loss") else left
            points = [(step, _metric(scores[step], task, metric)) for step in sorted(scores)]
            steps = [step for step, found in points if found]
            values, low, high = (
                [as_number(found.get(end)) for _, found in points if found] for end in ("value", "low", "high")
            )
            color = SERIES[index % len(SERIES)]
            axes.plot(
                steps,
                values,
                color=color,
                marker="o",
                markersize=4,
                label=in_picture(f"{task}: {metric} {values[-1]:.3f}"),
            )
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        left.set(title=f"{title}: right answers", xlabel="step", ylim=(-0.02, 1.02))
        is_loss = any(metric == "loss" for _, metric in _curves(scores))
        right.set(title="Loss of pairs, nats" if is_loss else "Bits per byte", xlabel="step")
        for axes in (left, right):
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="best", fontsize=8)


def tasks_section(scores: Scores) -> list[str]:
    """Every metric at the first and the last step it was scored at."""
    lines = [
        "", "## Tasks", "", "![scores of tasks over the steps](tasks.png)", "",
        "| task | metric | items | first (step) | last (step) | 95 % interval |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for task, metric in _curves(scores):
        steps = [step for step in sorted(scores) if _metric(scores[step], task, metric)]
        first, last = (_metric(scores[step], task, metric) for step in (steps[0], steps[-1]))
        low, high = as_number(last.get("low")), as_number(last.get("high"))
        lines.append(
            f"| {in_markdown(task)} | {in_markdown(metric)} | {as_number(scores[steps[-1]][task].get('items')):g} | "
            f"{as_number(first.get('value')):.3f} ({steps[0]}) | {as_number(last.get('value')):.3f} ({steps[-1]}) | "
            f"{f'{low:.3f} to {high:.3f}' if low == low else ''} |"
        )
    return lines


def _curves(scores: Scores) -> list[tuple[str, str]]:
    """(task, metric) of everything that was scored."""
    pairs = (
        (task, metric)
        for step in sorted(scores)
        for task, entry in scores[step].items()
        for metric in entry["metrics"]
        if _metric(scores[step], task, metric)
    )
    return list(dict.fromkeys(pairs))


def _metric(tasks: dict[str, dict[str, Any]], task: str, metric: str) -> dict[str, Any]:
    found = tasks.get(task, {}).get("metrics", {}).get(metric, {})
    return found if isinstance(found, dict) else {}
