"""Text and picture about the tasks that were scored during a run, made from the task lines of its metrics.jsonl.

lines of kind "tasks" --> tasks.png (each score over the steps, with its interval), a section of summary.md
"""

from pathlib import Path
from typing import Any

from recipes.schema.foreign import in_markdown
from recipes.schema.run_folder import as_number

Scores = dict[int, dict[str, dict[str, Any]]]
"""By step, by task: what `train.evaluate.training_tasks` recorded."""

_COLORS = ("#2b6cb0", "#2f9e44", "#9c36b5", "#e67700", "#0b7285", "#c2255c")


def draw_tasks(scores: Scores, path: Path, *, title: str) -> None:
    """Left: shares of right answers. Right: bits per byte. The bands are 95 % intervals."""
    import matplotlib  # slow to import, and only needed for pictures

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, (task, metric) in enumerate(_curves(scores)):
        axes = right if metric == "bits_per_byte" else left
        points = [(step, _metric(scores[step], task, metric)) for step in sorted(scores)]
        steps = [step for step, found in points if found]
        values, low, high = (
            [as_number(found[end]) for _, found in points if found] for end in ("value", "low", "high")
        )
        color = _COLORS[index % len(_COLORS)]
        axes.plot(steps, values, color=color, marker="o", markersize=4, label=f"{task}: {metric} {values[-1]:.3f}")
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    left.set(title=f"{title}: right answers", xlabel="step", ylim=(-0.02, 1.02))
    right.set(title="Bits per byte", xlabel="step")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best", fontsize=8, frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


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
            f"{low:.3f} to {high:.3f} |"
        )
    return lines


def _curves(scores: Scores) -> list[tuple[str, str]]:
    """(task, metric) of everything that was scored."""
    pairs = (
        (task, metric)
        for step in sorted(scores)
        for task, entry in scores[step].items()
        for metric in entry.get("metrics", {})
    )
    return list(dict.fromkeys(pairs))


def _metric(tasks: dict[str, dict[str, Any]], task: str, metric: str) -> dict[str, Any]:
    found = tasks.get(task, {}).get("metrics", {}).get(metric, {})
    return found if isinstance(found, dict) else {}
