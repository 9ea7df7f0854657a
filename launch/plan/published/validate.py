"""`stratum validate ROWS.csv`: the planner's predictions next to published throughput, row by row, then a summary.

    row --rows.py--> in scope: Setting --cost/time.py--> predicted, error        out of scope: the reason

Rows of configurations that the constants were fitted on are marked `fit`; all other rows in scope are tests.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from launch.plan.cost.time import step_time
from launch.plan.published.memory import published_memory
from launch.plan.published.rows import PUBLISHED, PUBLISHED_LATER, OutOfScope, Published, published, read_rows
from launch.plan.published.software import Row

FIT_EVERY = 3
"""Fitting uses every third of the distinct configurations of each source, in file order, starting with the first."""


@dataclass(frozen=True)
class Line:
    """One row and its prediction."""

    row: Row
    found: Published | None
    reason: str
    """Why it is out of scope; "" if it is in scope."""
    is_fit: bool
    tokens_per_s: float
    """Predicted, per GPU; 0 if out of scope."""
    memory_gib: float | None

    @property
    def error(self) -> float:
        """Predicted step time / published step time - 1."""
        assert self.found is not None
        return self.found.tokens_per_s / self.tokens_per_s - 1

    @property
    def memory_error(self) -> float | None:
        """The same for peak memory, if both figures exist."""
        published_gib = self.found.memory_gib if self.found is not None else None
        return self.memory_gib / published_gib - 1 if self.memory_gib and published_gib else None


@dataclass(frozen=True)
class Score:
    """Accuracy of the predictions of some lines."""

    rows: int
    median: float
    within_15: float
    bias: float

    @staticmethod
    def of(lines: Sequence[Line]) -> "Score":
        errors = [line.error for line in lines]
        return Score(
            rows=len(errors),
            median=statistics.median(map(abs, errors)),
            within_15=sum(abs(error) < 0.15 for error in errors) / len(errors),
            bias=statistics.median(errors),
        )


def assess(row: Row) -> Line:
    """Predict one row, or give the reason why it cannot be predicted. Never raises because of the row's content."""
    try:
        found = published(row)
        seconds = step_time(found.setting).seconds
    except OutOfScope as reason:
        return Line(row, None, str(reason), False, 0.0, None)
    except Exception as error:  # a row with unexpected content must not hide the others
        return Line(row, None, f"cannot be read: {type(error).__name__}: {error}", False, 0.0, None)
    predicted = found.tokens_per_s * found.step_s / seconds
    memory = published_memory(found) if found.memory_gib else None
    return Line(row, found, "", configuration(row, found) in fit_configurations(), predicted, memory)


def publisher(row: Row) -> str:
    """The publisher of a row, in one or two words; `unknown` if the row has no source."""
    source = row.get("src", "").strip()
    if "maxtext" in source or "paxml" in source:
        return "NVIDIA, JAX"
    if source.startswith("glennklockwood.com"):
        return "Meta (arXiv 2407.21783)"
    if source.startswith("NVIDIA dgxc"):
        return "NVIDIA dgxc-benchmarking"
    return re.split(r"[ /]", source)[0] if source else "unknown"


def configuration(row: Row, found: Published) -> tuple[str, ...]:
    """The key of a row's configuration: everything except the release and the measurement."""
    setting = found.setting
    return (
        row.get("src", ""),
        row["model"],
        setting.device.name,
        str(setting.low),
        setting.layout.describe(),
        str(setting.sequence),
        row.get("recompute", ""),
        row.get("extra", ""),
    )


@cache
def fit_configurations() -> frozenset[tuple[str, ...]]:
    """Configurations of the shipped files that the constants were fitted on."""
    order: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for row in (row for file in (PUBLISHED, PUBLISHED_LATER) for row in read_rows(file)):
        try:
            key = configuration(row, published(row))
        except OutOfScope:
            continue
        if key not in order[row.get("src", "")]:
            order[row.get("src", "")].append(key)
    return frozenset(key for keys in order.values() for key in keys[::FIT_EVERY])


def rank_correlations(lines: Sequence[Line], *, least: int = 4) -> dict[str, tuple[float, int]]:
    """Spearman's rho of predicted and published tokens/s for each model, and its number of configurations (at least `least`)."""
    groups: dict[str, dict[tuple[str, ...], tuple[float, float]]] = defaultdict(dict)
    for line in lines:
        if line.found is not None:
            model = line.found.setting.model
            name = line.row["model"].split("(")[0].strip().lower().replace("_", " ")
            key = configuration(line.row, line.found)
            groups[f"{name} {model.hidden}x{len(model.pattern)}"].setdefault(
                key, (line.tokens_per_s, line.found.tokens_per_s)
            )
    return {
        name: (_spearman(list(pairs.values())), len(pairs))
        for name, pairs in sorted(groups.items())
        if len(pairs) >= least
    }


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """The summary as plain data."""
    known = [line for line in lines if line.found is not None]
    tests = [line for line in known if not line.is_fit]
    memory = [abs(line.memory_error) for line in known if line.memory_error is not None]
    ranks = rank_correlations(lines)
    found: dict[str, Any] = {"rows": len(lines), "in_scope": len(known), "test_rows": len(tests), "out_of_scope": {}}
    for name, some in (("test", tests), ("fit", [line for line in known if line.is_fit]), ("all", known)):
        if some:
            score = Score.of(some)
            found[f"{name}_median_step_time_error"] = score.median
            found[f"{name}_within_15_percent"] = score.within_15
    if ranks:
        found["rank_correlation_median"] = statistics.median(rho for rho, _ in ranks.values())
        total = sum(count for _, count in ranks.values())
        found["rank_correlation_mean"] = sum(rho * count for rho, count in ranks.values()) / total
        found["rank_correlations"] = {name: rho for name, (rho, _) in ranks.items()}
    if memory:
        found["memory_rows"] = len(memory)
        found["memory_median_error"] = statistics.median(memory)
    found["out_of_scope"] = dict(Counter(line.reason for line in lines if line.found is None).most_common())
    return found


def table(lines: Sequence[Line]) -> str:
    """Errors by source, generation and format, as Markdown."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line.found is not None:
            setting = line.found.setting
            groups[f"{publisher(line.row)} | {setting.device.generation} | {setting.low or 'bf16'}"].append(line)
    text = "| source | GPU | products | rows fitted | rows tested | median error of tests | bias of tests |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for name, some in sorted(groups.items()):
        tests = [line for line in some if not line.is_fit]
        score = Score.of(tests) if tests else None
        measured = f"{score.median:.1%} | {score.bias:+.1%}" if score else " | "
        text += f"| {name} | {len(some) - len(tests)} | {len(tests)} | {measured} |\n"
    return text


def report(lines: Sequence[Line]) -> str:
    """The summary as text."""
    found = summary(lines)
    text = f"{found['rows']} rows, {found['in_scope']} in scope ({found['test_rows']} test, "
    text += f"{found['in_scope'] - found['test_rows']} fitted), {found['rows'] - found['in_scope']} out:\n"
    text += "".join(f"  {count:4} {reason}\n" for reason, count in found["out_of_scope"].items())
    if not found["in_scope"]:
        return text
    for name, label in (("test", "test rows"), ("fit", "fitted rows"), ("all", "all rows in scope")):
        if f"{name}_median_step_time_error" in found:
            text += f"median step-time error, {label}: {found[f'{name}_median_step_time_error']:.1%}"
            text += f"  (within 15 %: {found[f'{name}_within_15_percent']:.0%})\n"
    if "rank_correlation_median" in found:
        text += f"rank correlation within a model's layouts: median {found['rank_correlation_median']:.3f}, mean weighted by "
        text += f"layouts {found['rank_correlation_mean']:.3f} ({len(found['rank_correlations'])} models of 4 or more layouts)\n"
    if "memory_rows" in found:
        text += f"median memory error: {found['memory_median_error']:.1%} ({found['memory_rows']} rows)\n"
    return text


HEAD = (
    f"{'line':>4} {'model':26} {'GPUs':>14} {'format':6} {'layout':24} {'predicted':>10} {'published':>10} {'error':>7}  "
    f"{'memory':>20}  scope\n"
)


def line_text(number: int, line: Line) -> str:
    row = line.row
    gpus = f"{row['n_gpu'].split(' ')[0]} {row['gpu']}"[:14]
    head = f"{number:4} {row['model'][:26]:26} {gpus:>14} "
    if line.found is None:
        return f"{head}{'':61}  {'':22}out: {line.reason}\n"
    setting = line.found.setting
    layout = setting.layout.describe() + (" FSDP" if setting.software.shards == "parameters" else "")
    memory = ""
    if line.memory_error is not None:
        memory = f"{line.memory_gib:.1f}/{line.found.memory_gib:.1f} {line.memory_error:+.0%}"
    assumed = f" (assumed: {', '.join(line.found.assumed)})" if line.found.assumed else ""
    return (
        f"{head}{setting.low or setting.high:6} {layout:24} {line.tokens_per_s:10,.0f} {line.found.tokens_per_s:10,.0f} "
        f"{line.error:+7.1%}  {memory:>20}  in{', fit' if line.is_fit else ''}{assumed}\n"
    )


def line_json(line: Line) -> dict[str, Any]:
    if line.found is None:
        return {"model": line.row["model"], "in_scope": False, "reason": line.reason}
    return {
        "model": line.row["model"],
        "in_scope": True,
        "is_fit": line.is_fit,
        "assumed": list(line.found.assumed),
        "predicted_tokens_per_s_per_gpu": line.tokens_per_s,
        "published_tokens_per_s_per_gpu": line.found.tokens_per_s,
        "step_time_error": line.error,
        "predicted_memory_gib": line.memory_gib,
        "published_memory_gib": line.found.memory_gib,
    }


def _spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation; ties get the mean rank. 0 if one side is constant."""
    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) + 1) / 2
    top = sum((a - mean) * (b - mean) for a, b in zip(left, right, strict=True))
    below = (sum((a - mean) ** 2 for a in left) * sum((b - mean) ** 2 for b in right)) ** 0.5
    return top / below if below else 0.0


def _ranks(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [(ordered.index(value) + len(ordered) - ordered[::-1].index(value) + 1) / 2 for value in values]
