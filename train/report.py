"""`python -m train.report runs/NAME`: a picture and a page about a run, made from its metrics.jsonl.

metrics.jsonl, recipe.yaml --> loss.png (loss, held-out bits per byte, learning rate), summary.md
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.errors import StratumError
from train.telemetry import METRICS, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """A run's metrics, sorted out."""

    steps: dict[int, dict[str, Any]]
    """The last line of each step."""
    evaluations: dict[int, dict[str, float]]
    resumes: list[int]
    repeated: dict[int, list[float]]
    """Losses of steps that were run more than once, in order."""
    events: list[dict[str, Any]]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. StratumError where it holds no metrics."""
    path = folder / METRICS
    if not path.exists():
        raise StratumError(f"{folder} holds no {METRICS}, so it is not a run folder. Give one, e.g. runs/smoke.")
    lines = read_metrics(path)
    losses: dict[int, list[float]] = {}
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["kind"] == "step":
            losses.setdefault(line["step"], []).append(line["loss"])
            steps[line["step"]] = line
    return RunRecord(
        steps=dict(sorted(steps.items())),
        evaluations={line["step"]: line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"},
        resumes=[line["step"] for line in lines if line["kind"] == "resume"],
        repeated={step: values for step, values in losses.items() if len(values) > 1},
        events=[line for line in lines if line["kind"] not in ("step", "evaluation")],
    )


def write_report(folder: Path, *, sample: str | None = None) -> None:
    """Write loss.png and summary.md into a run folder; an earlier sample in summary.md is replaced by `sample`."""
    record = read_run(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    if record.steps:
        draw(record, folder / "loss.png", title=folder.name)
    (folder / "summary.md").write_text(summary(record, recipe, name=folder.name, sample=sample))


def draw(record: RunRecord, path: Path, *, title: str) -> None:
    """The loss curve with resumes marked, held-out bits per byte by source, and the learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = list(record.steps)
    losses = [record.steps[s]["loss"] for s in steps]
    rates = [record.steps[s]["learning_rate"] for s in steps]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    left.plot(steps, losses, color="#9ecae1", linewidth=1, label="each step")
    left.plot(steps, _smooth(losses), color="#08519c", linewidth=2, label="running mean")
    for index, step in enumerate(record.resumes):
        left.axvline(step, color="#d94801", linestyle="--", linewidth=1.2, label="resumed" if index == 0 else None)
    left.set(xlabel="step", ylabel="training loss, nats per token", title=title)
    left.grid(alpha=0.3)
    below = left.twinx()
    below.plot(steps, rates, color="#969696", linewidth=1)
    below.set_ylim(0, 4 * max(rates))
    below.set_yticks([0, max(rates)])
    below.set_yticklabels(["0", f"lr {max(rates):.1e}"], color="#737373", fontsize=8)
    left.legend(loc="upper right", frameon=False)
    for name in next(iter(record.evaluations.values()), {}):
        points = sorted((step, scores[name]) for step, scores in record.evaluations.items() if name in scores)
        right.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        right.annotate(f"{points[-1][1]:.2f}", points[-1], textcoords="offset points", xytext=(0, 6), ha="center")
    right.set(xlabel="step", ylabel="held-out bits per byte", ylim=(0, None))
    right.grid(alpha=0.3)
    if record.evaluations:
        right.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def summary(record: RunRecord, recipe: dict[str, Any], *, name: str, sample: str | None) -> str:
    """The page about a run, Markdown."""
    start = next((e for e in record.events if e["kind"] in ("start", "resume")), {})
    last = record.steps[max(record.steps)] if record.steps else None
    lines = [f"# Run `{name}`", ""]
    if last is None:
        return "\n".join([*lines, "No step was finished yet.", ""])
    speeds = [line["tokens_per_s"] for line in record.steps.values()]
    lines += [
        "| | |",
        "|---|---|",
        f"| model | `{recipe['model']['pattern']}`, hidden {recipe['model']['hidden']}, "
        f"{start.get('parameters', 0):,} parameters |",
        f"| precision | {recipe['precision']['params']} |",
        f"| layout | {start.get('layout', '?')} on {start.get('device', '?')} |",
        f"| steps | {last['step']:,} of {recipe['run']['steps']:,} |",
        f"| tokens | {last['tokens']:,} |",
        f"| training loss | {_first(record):.4f} -> {last['loss']:.4f} nats per token |",
        f"| speed | {statistics.median(speeds):,.0f} tokens/s (median) |",
    ]
    if "mfu" in last:
        share = statistics.median(line["mfu"] for line in record.steps.values() if "mfu" in line)
        lines.append(f"| model FLOPs utilisation | {100 * share:.1f} % of the measured or published peak (median) |")
    lines += [
        f"| peak memory | {last['memory_bytes'] / 2**30:.2f} GiB per process |",
        f"| machine | {platform.machine()}, Python {platform.python_version()} |",
        "",
        "![loss](loss.png)",
        "",
        "## Held-out bits per byte",
        "",
        "| source | first | last |",
        "|---|---|---|",
    ]
    if record.evaluations:
        first, final = (record.evaluations[pick(record.evaluations)] for pick in (min, max))
        lines += [f"| {source} | {first[source]:.3f} | {final[source]:.3f} |" for source in final if source in first]
    lines += ["", "## Where a step's time goes", "", "| part | median ms | share |", "|---|---|---|"]
    parts = {part for line in record.steps.values() for part in line["seconds"]}
    medians = {
        part: statistics.median(line["seconds"].get(part, 0.0) for line in record.steps.values()) for part in parts
    }
    whole = sum(medians.values())
    for part, value in sorted(medians.items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {1000 * value:.1f} | {100 * value / whole:.1f} % |")
    lines += ["", "## Resumes", ""]
    if not record.resumes:
        lines.append("None: the run went through in one piece.")
    for step in record.resumes:
        lines.append(f"- resumed after step {step}")
    if record.repeated:
        same = sum(len(set(values)) == 1 for values in record.repeated.values())
        lines += ["", f"{same} of {len(record.repeated)} steps that were run again gave the same loss to the last bit."]
    if sample:
        lines += ["", "## Sample", "", "```", sample.rstrip(), "```"]
    lines += ["", "Files: `recipe.yaml` (resolved), `metrics.jsonl`, `tensorboard/`, `checkpoints/`.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.report`."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Picture and summary of a run.")
    parser.add_argument("folder", type=Path, help="run folder, e.g. runs/smoke")
    parser.add_argument("--sample", type=Path, help="text file with a sample to show in the summary")
    parsed = parser.parse_args(arguments)
    try:
        write_report(parsed.folder, sample=parsed.sample.read_text() if parsed.sample else None)
    except StratumError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"wrote {parsed.folder}/summary.md and {parsed.folder}/loss.png\n")
    return 0


def _first(record: RunRecord) -> float:
    return record.steps[min(record.steps)]["loss"]


def _smooth(values: list[float]) -> list[float]:
    """Mean over the last twentieth of the run up to each point (at most 50 steps)."""
    window = max(1, min(50, len(values) // 20))
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    sys.exit(main())
