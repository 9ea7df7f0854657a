"""Curves of a report: what a run recorded, thinned to what a screen can show.

    values of n steps --thin--> at most 2,000 points: means, and the lowest and highest value of each group of steps

Numbers keep six digits. NaN and infinity become null, which a chart shows as a gap.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.schema.run_folder import Line, as_number
from train.report.summary import RunRecord, smooth
from train.report.titles import title_of_metric, title_of_part

MOST_POINTS = 2000


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Ends of the band around the line: of the values behind each point, or a 95 % interval."""
    is_faint: bool = False
    has_points: bool = False

    def as_json(self) -> dict[str, Any]:
        """What the page draws."""
        band = {"low": _numbers(self.low), "high": _numbers(self.high)} if self.low and self.high else {}
        return {
            "label": self.label,
            "steps": list(self.steps),
            "values": _numbers(self.values),
            "faint": self.is_faint,
            "points": self.has_points,
            **band,
        }


@dataclass(frozen=True)
class Chart:
    """One chart, with a curve or more of each run."""

    title: str
    unit: str
    curves: list[list[Curve]]
    """By run, in the order of the command."""
    is_log: bool = False
    """Whether the chart can be switched to a logarithmic scale."""
    from_zero: bool = False

    def as_json(self) -> dict[str, Any]:
        """What the page draws."""
        return {
            "title": self.title,
            "unit": self.unit,
            "log": self.is_log,
            "zero": self.from_zero,
            "runs": [[curve.as_json() for curve in curves] for curves in self.curves],
        }


def thin(label: str, steps: Sequence[int], values: Sequence[float], *, most: int = MOST_POINTS) -> Curve:
    """A curve of at most `most` points. With more values, a point is the mean of a group, and its band the group's range."""
    if len(steps) <= most:
        return Curve(label, steps, values)
    size = math.ceil(len(steps) / most)
    ends, means, low, high = [], [], [], []
    for start in range(0, len(steps), size):
        group = [value for value in values[start : start + size] if math.isfinite(value)]
        ends.append(steps[min(start + size, len(steps)) - 1])
        means.append(math.fsum(group) / len(group) if group else math.nan)
        low.append(min(group, default=math.nan))
        high.append(max(group, default=math.nan))
    return Curve(label, ends, means, low, high)


def charts_of(records: Sequence[RunRecord]) -> dict[str, list[Chart]]:
    """Charts by section of the page; a chart without any value is left out."""
    # A policy's loss is no cross-entropy: it is near 0, of any sign, and does not fall as the policy learns.
    is_policy = any(line["kind"] == "rollouts" for record in records for line in record.events)
    losses = [_loss(record) for record in records]
    sections = {
        "Training": [
            Chart("Policy loss", "", losses) if is_policy else Chart("Training loss", "nats", losses, is_log=True),
            Chart(
                "Held-out text", "bits per byte", [_by_name(record.evaluations, "") for record in records], is_log=True
            ),
            Chart("Gradient norm", "", [_field(record, "grad_norm") for record in records], is_log=True),
            Chart(
                "Learning rate",
                "",
                [_field(record, "learning_rate") for record in records],
                is_log=True,
                from_zero=True,
            ),
            *_parts(records),
        ],
        "Experts": _experts(records),
        "Rollouts": _rollouts(records),
        "Tasks": [*_tasks(records)],
        "Speed": [
            Chart("Speed", "tokens/s", [_field(record, "tokens_per_s") for record in records], from_zero=True),
            Chart(
                "Model FLOPs utilisation", "%", [_field(record, "mfu", times=100) for record in records], from_zero=True
            ),
            Chart("A step by part", "ms", [_times(record) for record in records], from_zero=True),
            Chart(
                "Peak memory of the first process",
                "GiB",
                [_field(record, "memory_bytes", times=2**-30) for record in records],
                from_zero=True,
            ),
        ],
    }
    return {
        name: shown for name, charts in sections.items() if (shown := [chart for chart in charts if any(chart.curves)])
    }


def progress_of(record: RunRecord) -> dict[str, Any]:
    """What converts a step to tokens and to hours of training: {steps, tokens, hours}, thinned."""
    steps = list(record.steps)
    hours, total = [], 0.0
    for line in record.steps.values():
        total += as_number(line["step_s"]) / 3600
        hours.append(total)
    size = max(1, math.ceil(len(steps) / MOST_POINTS))
    places = sorted({*range(0, len(steps), size), max(0, len(steps) - 1)}) if steps else []
    return {
        "steps": [steps[place] for place in places],
        "tokens": [record.steps[steps[place]]["tokens"] for place in places],
        "hours": _numbers(hours[place] for place in places),
    }


def _loss(record: RunRecord) -> list[Curve]:
    steps, values = _column(record, "loss")
    if not steps:
        return []
    every, mean = thin("each step", steps, values), thin("running mean", steps, smooth(values))
    return [Curve(every.label, every.steps, every.values, every.low, every.high, is_faint=True), mean]


def _field(record: RunRecord, name: str, *, times: float = 1.0) -> list[Curve]:
    steps, values = _column(record, name)
    return [thin("", steps, [times * value for value in values])] if steps else []


def _column(record: RunRecord, name: str) -> tuple[list[int], list[float]]:
    found = [(step, as_number(line[name])) for step, line in record.steps.items() if name in line]
    return [step for step, _ in found], [value for _, value in found]


def _times(record: RunRecord) -> list[Curve]:
    names = dict.fromkeys(part for line in record.steps.values() for part in line["seconds"])
    steps = list(record.steps)
    return [
        thin(
            name.replace("_", " "),
            steps,
            smooth([1000 * as_number(line["seconds"].get(name, 0.0)) for line in record.steps.values()]),
        )
        for name in names
    ]


def _by_name(scores: Mapping[int, Mapping[str, float]], prefix: str) -> list[Curve]:
    names = dict.fromkeys(name for values in scores.values() for name in values)
    curves = []
    for name in names:
        steps = [step for step in sorted(scores) if name in scores[step]]
        curves.append(Curve(prefix + name, steps, [as_number(scores[step][name]) for step in steps], has_points=True))
    return curves


def _parts(records: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each part of the loss that the objective reports."""
    names = dict.fromkeys(
        name for record in records for line in record.steps.values() for name in line.get("loss_parts", ())
    )
    charts = []
    for name in names:
        title = title_of_part(name)
        curves = []
        for record in records:
            found = [
                (step, line["loss_parts"]) for step, line in record.steps.items() if name in line.get("loss_parts", ())
            ]
            steps, values = [step for step, _ in found], [title.times * as_number(parts[name]) for _, parts in found]
            curves.append([thin("", steps, smooth(values))] if steps else [])
        charts.append(Chart(title.text, title.unit, curves))
    return charts


def _experts(records: Sequence[RunRecord]) -> list[Chart]:
    """What the routers of expert layers did. A curve is the mean over layers, its band the range of the layers."""
    readings = [record.experts() for record in records]

    def chart(title: str, unit: str, *names: str, times: float = 1.0, from_zero: bool = False) -> Chart:
        curves = [
            [_over_layers(name, lines, times=times, is_named=len(names) > 1) for name in names] if lines else []
            for lines in readings
        ]
        return Chart(title, unit, curves, from_zero=from_zero)

    return [
        chart("Load of the busiest expert", "times the mean", "load_max", from_zero=True),
        chart("Load of the least busy expert", "times the mean", "load_min", from_zero=True),
        chart("Entropy of the load", "share of the largest", "entropy"),
        chart("Dropped choices", "%", "dropped", times=100, from_zero=True),
        chart("Bias of the router", "", "bias_min", "bias_max"),
    ]


def _over_layers(name: str, lines: Sequence[Line], *, times: float, is_named: bool) -> Curve:
    layers = [[times * as_number(layer[name]) for layer in line["layers"]] for line in lines]
    size = math.ceil(len(lines) / MOST_POINTS)  # a point is a group of readings, as in `thin`
    groups = [[v for found in layers[at : at + size] for v in found] for at in range(0, len(lines), size)]
    steps = [lines[min(at + size, len(lines)) - 1]["step"] for at in range(0, len(lines), size)]
    means = [math.fsum(group) / len(group) for group in groups]
    label = name.removeprefix("bias_") if is_named else ""
    return Curve(label, steps, means, [min(group) for group in groups], [max(group) for group in groups])


def _rollouts(records: Sequence[RunRecord]) -> list[Chart]:
    """What reinforcement learning drew: events `rollouts` of `train.align.policy_stream`."""
    batches = [
        [line for line in record.events if line["kind"] == "rollouts" and type(line.get("step")) is int]
        for record in records
    ]

    def chart(title: str, unit: str, *paths: str, times: float = 1.0, is_log: bool = False) -> Chart:
        return Chart(title, unit, [_paths(lines, paths, times=times) for lines in batches], is_log=is_log)

    kinds = sorted({kind for lines in batches for line in lines for kind in _mapping(line, "verifiers")})
    return [
        Chart("Reward of a batch's answers, mean and deviation", "", [_reward(lines) for lines in batches]),
        Chart("Answers with the full reward, by kind of verifier", "%", [_passed(lines, kinds) for lines in batches]),
        Chart(
            "Answers without a reward because a verifier failed",
            "answers of a batch",
            [_failed(lines, kinds) for lines in batches],
        ),
        chart("Length of answers", "tokens", "answer_tokens_mean", "answer_tokens_max"),
        chart("Entropy of the policy", "nats per token", "entropy"),
        chart("Answers that ended by themselves", "%", "ended", times=100),
        chart("Prompts whose answers differ in reward", "%", "informative", times=100),
        chart(
            "Log-probability of a token, sampler and trainer apart",
            "nats",
            "log_prob_gap.max",
            "log_prob_gap.mean",
            is_log=True,
        ),
        chart("Time of a batch", "s", "generation_s", "judging_s", "log_probs_s"),
    ]


_LABELS = {
    "answer_tokens_mean": "mean", "answer_tokens_max": "longest", "max": "largest", "mean": "mean",
    "generation_s": "generation", "judging_s": "judging", "log_probs_s": "log-probabilities",
}  # fmt: skip
"""Curves of charts with several, by recorded name."""


def _paths(lines: Sequence[Line], paths: Sequence[str], *, times: float) -> list[Curve]:
    """A curve for each field, or field of a field."""
    curves = []
    for path in paths:
        group, _, name = path.rpartition(".")
        found = [(line["step"], _mapping(line, group) if group else line) for line in lines]
        points = [(step, times * as_number(fields[name])) for step, fields in found if name in fields]
        if points:
            label = _LABELS.get(name, name) if len(paths) > 1 else ""
            curves.append(thin(label, [step for step, _ in points], [value for _, value in points]))
    return curves


def _reward(lines: Sequence[Line]) -> list[Curve]:
    """The mean reward, with a standard deviation on either side."""
    means, deviations = ([as_number(line.get(name)) for line in lines] for name in ("reward_mean", "reward_std"))
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    return [Curve("", [line["step"] for line in lines], means, low, high)] if lines else []


def _passed(lines: Sequence[Line], kinds: Sequence[str]) -> list[Curve]:
    curves = []
    for kind in kinds:
        found = [(line["step"], _mapping(_mapping(line, "verifiers"), kind)) for line in lines]
        points = [
            (step, 100 * as_number(one.get("passed")) / answers)
            for step, one in found
            if (answers := as_number(one.get("answers"))) > 0
        ]
        if points:
            curves.append(thin(kind, [step for step, _ in points], [share for _, share in points]))
    return curves


def _failed(lines: Sequence[Line], kinds: Sequence[str]) -> list[Curve]:
    """Curves of the verifiers that failed at all."""
    curves = []
    for kind in kinds:
        failures = [_mapping(_mapping(_mapping(line, "verifiers"), kind), "failures") for line in lines]
        counts = [sum(map(as_number, one.values())) for one in failures]
        if any(counts):
            curves.append(thin(kind, [line["step"] for line in lines], counts))
    return curves


def _mapping(line: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that should be a mapping; the record may be damaged."""
    found = line.get(name)
    return found if isinstance(found, dict) else {}


def _tasks(records: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each metric of the tasks, with 95 % intervals."""
    scored = [record.tasks() for record in records]
    metrics = dict.fromkeys(
        metric
        for scores in scored
        for tasks in scores.values()
        for entry in tasks.values()
        for metric in entry["metrics"]
    )
    charts = []
    for metric in metrics:
        title = title_of_metric(metric)
        curves = [_scores(scores, metric, times=title.times) for scores in scored]
        charts.append(Chart(title.text, title.unit, curves))
    return charts


def _scores(scores: Mapping[int, Mapping[str, Any]], metric: str, *, times: float) -> list[Curve]:
    curves = []
    for task in dict.fromkeys(task for tasks in scores.values() for task in tasks):
        found = [
            (step, entry)
            for step in sorted(scores)
            if isinstance(entry := scores[step].get(task, {}).get("metrics", {}).get(metric), dict)
        ]
        if found:
            value, low, high = (
                [times * as_number(entry.get(end)) for _, entry in found] for end in ("value", "low", "high")
            )
            curves.append(Curve(task, [step for step, _ in found], value, low, high, has_points=True))
    return curves


def _numbers(values: Iterable[float] | None) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values or ()]
