"""`python -m tests.bench.compress_curves`: what pruning and distillation are worth, run by run, at equal tokens.

    tiny_teacher --score, cut once--> 45 % and 25 % of it --+--> distilled | trained on next tokens     few tokens, more tokens
                                      the same from scratch +--> distilled | trained on next tokens
    a Gemma 2 student from scratch -------------------------+--> distilled | trained on next tokens
    all of them --> docs/pictures/compress_curves.png and the tables of docs/compress.md

Two runs that are compared differ in the loss alone: the same first weights, the same rows in the same order, the same
schedule; a seed is another order of rows (and other first weights where they are drawn). A learning rate for each loss is
chosen first, among the same three, on a seed that is not used again. Runs that are finished are not run again, one that was
killed continues. About 90 minutes on one core; the teacher comes first (`stratum train -cn tiny_teacher`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
TEACHER = Path("runs/tiny_teacher")
FOLDER = Path("runs/compress_curves")
TOKENS_PER_STEP = 2048
SHAPES = {
    "half": ["compress.layers=8", "compress.hidden=192", "compress.ffn=512", "compress.mamba_heads=6"],
    "quarter": ["compress.layers=8", "compress.hidden=128", "compress.ffn=256", "compress.mamba_heads=4"],
}
"""What is cut: 45 % and 25 % of the teacher's parameters stay."""
KINDS = ("distill", "next_token")
RATES = (0.001, 0.002, 0.004)
"""Learning rates tried for a pruned student."""
SCRATCH_RATE = 0.003
"""The teacher's own."""
SHORT, LONG = 100, 400
"""Steps of a retraining: 0.20M and 0.82M tokens, 4 % and 17 % of the teacher's (Minitron: below 3 %)."""
SEEDS = (1, 2, 3)
RATE_SEED = 9
GEMMA_STEPS = 500


@dataclass(frozen=True)
class Run:
    """One training run."""

    shape: str
    """`half`, `quarter` (of the teacher), or `gemma`."""
    start: str
    """`pruned` or `scratch`."""
    kind: str
    """The loss: `distill` or `next_token`."""
    steps: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Its run folder."""
        return f"{self.shape}_{self.start}_{self.kind}_{self.steps}_seed{self.seed}_lr{self.rate:g}"

    def command(self) -> list[str]:
        """What trains it."""
        every = min(100, self.steps // 2)
        words = [
            f"run.folder={FOLDER}", f"run.name={self.name}", f"run.steps={self.steps}", f"run.seed={self.seed}",
            f"data.seed={self.seed}", f"optim.lr={self.rate}", "schedule.warmup=10", f"schedule.decay={self.steps * 3 // 10}",
            f"objective.kind={self.kind}", f"objective.teacher={TEACHER}", f"evaluate.every_steps={every}", "run.threads=1",
        ]  # fmt: skip
        if self.shape == "gemma":
            return ["-m", "train", "-cn", "tiny_gemma2_distill", *words]
        cut = FOLDER / "cut" / self.shape
        if self.start == "pruned":
            words.append(f"run.start_from={cut}")
        return ["-m", "train", f"--config-dir={cut}", "-cn", "tiny_compress", f"model={self.shape}", *words]

    def curve(self) -> list[tuple[float, float]]:
        """(tokens, held-out bits per byte, mean of the sources), evaluation by evaluation; empty before the first."""
        return [(tokens, statistics.mean(bits.values())) for tokens, bits in evaluations(FOLDER / self.name)]

    def result(self) -> float | None:
        """Bits per byte at its end; None while it runs."""
        curve = self.curve()
        return curve[-1][1] if curve and curve[-1][0] == self.steps * TOKENS_PER_STEP else None


def main() -> int:
    """Run what is missing, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw-only", action="store_true", help="picture and tables of what there is; run nothing")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/pictures/compress_curves.png")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if not arguments.draw_only:
        _cut()
        for run in plan():
            if run.result() is None:
                print(f"--- {run.name}", flush=True)
                _python(run.command())
    draw(arguments.to)
    show(Console(highlight=False, width=120))
    return 0


def plan() -> Iterator[Run]:
    """All runs, those that say most first. Later ones are chosen by what earlier ones gave."""
    yield from rate_runs()
    rates = {kind: best_rate(kind) for kind in KINDS}
    for seed in SEEDS:
        yield from (Run(shape, "pruned", kind, SHORT, seed, rates[kind]) for shape in SHAPES for kind in KINDS)
    yield from (Run("gemma", "scratch", kind, GEMMA_STEPS, SEEDS[0], SCRATCH_RATE) for kind in KINDS)
    yield from (Run(shape, "scratch", "next_token", LONG, SEEDS[0], SCRATCH_RATE) for shape in SHAPES)
    yield from (Run(shape, "pruned", kind, LONG, SEEDS[0], rates[kind]) for shape in reversed(SHAPES) for kind in KINDS)
    yield from (Run("gemma", "scratch", kind, GEMMA_STEPS, SEEDS[1], SCRATCH_RATE) for kind in KINDS)
    yield from (Run(shape, "scratch", "distill", LONG, SEEDS[0], SCRATCH_RATE) for shape in SHAPES)
    for seed in SEEDS[1:]:
        yield from (Run(shape, "pruned", kind, LONG, seed, rates[kind]) for shape in SHAPES for kind in KINDS)


def rate_runs() -> list[Run]:
    """The learning rates tried: each loss with each rate, on the 25 % shape."""
    return [Run("quarter", "pruned", kind, SHORT, RATE_SEED, rate) for rate in RATES for kind in KINDS]


def best_rate(kind: str) -> float:
    """The rate that a loss ended lowest with."""
    tried = [(result, run.rate) for run in rate_runs() if run.kind == kind and (result := run.result()) is not None]
    return min(tried)[1] if tried else 0.001


def teacher_bits() -> tuple[float, dict[str, float]]:
    """(tokens, bits per byte by source) of the teacher at its end."""
    curve = evaluations(TEACHER)
    if not curve:
        raise SystemExit(
            f"{TEACHER} has no evaluations. First train it: stratum prepare -cn tiny_teacher, stratum train -cn tiny_teacher"
        )
    return curve[-1]


def evaluations(folder: Path) -> list[tuple[float, dict[str, float]]]:
    """(tokens, bits per byte by source) of a run, the last of each step."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if '"evaluation"' in line]
    last = {line["step"]: line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"}
    return [(step * TOKENS_PER_STEP, last[step]) for step in sorted(last)]


def _cut() -> None:
    """Score the teacher once, cut it down to both shapes."""
    for shape, sizes in SHAPES.items():
        out = FOLDER / "cut" / shape
        words = [
            "-cn",
            "tiny_compress",
            f"compress.folder={FOLDER}/cut",
            f"run.name={shape}",
            f"compress.parent={TEACHER}",
            "run.threads=1",
        ]
        if not (out / "scores.json").exists():
            first = FOLDER / "cut" / next(iter(SHAPES))
            if (first / "scores.json").exists():
                out.mkdir(parents=True, exist_ok=True)
                for name in ("scores.npz", "scores.json"):
                    shutil.copy(first / name, out / name)
            else:
                _python(["-m", "train.compress", "score", *words, "compress.layers=8", "compress.attention_layers=2"])
        if not list((out / "model").glob("*.yaml")):
            _python(["-m", "train.compress", "prune", *words, *sizes])


def _python(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


_COLORS = {"distill": "#2b6cb0", "next_token": "#d9480f"}
_NAMES = {"distill": "distilled", "next_token": "next token"}
_TITLES = {
    "half": "Pruned to 45 % of the teacher",
    "quarter": "Pruned to 25 %",
    "gemma": "Gemma 2, 1.05M parameters, from scratch",
}
_STYLE = {
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e4e7eb", "font.size": 9, "legend.frameon": False,
}  # fmt: skip


def draw(path: Path) -> None:
    """Held-out bits per byte against tokens: pruned students, the same from scratch, the Gemma 2 student."""
    runs = list(plan())
    _, bits = teacher_bits()
    teacher = statistics.mean(bits.values())
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
        for place, shape in zip(axes, _TITLES, strict=True):
            shown = [run for run in runs if run.shape == shape and run.seed != RATE_SEED and run.curve()]
            for run in shown:
                curve = run.curve()
                if run.start == "pruned" and run.steps == LONG and len(curve) > 1:
                    curve = curve[1:]  # its first stretch is the short runs', who look twice as often
                style: dict[str, Any] = {"color": _COLORS[run.kind], "linewidth": 1.5, "marker": ".", "markersize": 4}
                style["linestyle"] = "--" if run.start == "scratch" and shape != "gemma" else "-"
                place.plot([tokens / 1e6 for tokens, _ in curve], [value for _, value in curve], **style)
                if run.result() is not None:
                    place.plot(curve[-1][0] / 1e6, curve[-1][1], "o", color=_COLORS[run.kind], markersize=4.5)
            place.axhline(teacher, color="#7b8794", linewidth=1, linestyle=":")
            place.annotate(
                "teacher", (1.0, teacher), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
            place.set(title=_TITLES[shape], xlabel="tokens, millions", xlim=(0, None))
            tops = [run.curve()[1][1] for run in shown if len(run.curve()) > 1]
            place.set_ylim(teacher - 0.05, min(max(tops, default=0) + 0.1, teacher + 1.2))
        axes[0].set_ylabel("held-out bits per byte, mean of two sources")
        for kind in KINDS:
            axes[0].plot([], [], color=_COLORS[kind], label=f"pruned, {_NAMES[kind]}")
        for kind in KINDS:
            if not any(
                run.start == "scratch" and run.kind == kind and run.shape in SHAPES and run.curve() for run in runs
            ):
                continue
            axes[0].plot([], [], color=_COLORS[kind], linestyle="--", label=f"from scratch, {_NAMES[kind]}")
        axes[0].legend(loc="upper right", fontsize=8)
        figure.savefig(path, dpi=140)
        plt.close(figure)


def show(console: Console) -> None:
    """Tables: learning rates, then every comparison, seed by seed."""
    runs = list(plan())
    tokens, bits = teacher_bits()
    console.print(f"teacher, {tokens / 1e6:.2f}M tokens: {statistics.mean(bits.values()):.4f} ({_of(bits)})")
    rates = Table("learning rate", *(_NAMES[kind] for kind in KINDS), title=f"quarter, {SHORT} steps, seed {RATE_SEED}")
    for rate in RATES:
        tried = [Run("quarter", "pruned", kind, SHORT, RATE_SEED, rate).result() for kind in KINDS]
        rates.add_row(f"{rate:g}", *map(_number, tried))
    console.print(rates)
    table = Table("student", "tokens", "seed", *(_NAMES[kind] for kind in KINDS), "next token - distilled")
    groups = dict.fromkeys((run.shape, run.start, run.steps, run.seed) for run in runs if run.seed != RATE_SEED)
    for shape, start, steps, seed in sorted(groups, key=lambda key: (key[0], key[1], key[2], key[3])):
        pair = {
            run.kind: run.result()
            for run in runs
            if (run.shape, run.start, run.steps, run.seed) == (shape, start, steps, seed)
        }
        ours, theirs = (pair.get(kind) for kind in KINDS)
        if ours is None and theirs is None:
            continue
        gain = f"{theirs - ours:+.4f}" if ours is not None and theirs is not None else ""
        name = "Gemma 2" if shape == "gemma" else f"{shape}, {start}"
        table.add_row(name, f"{steps * TOKENS_PER_STEP / 1e6:.2f}M", str(seed), _number(ours), _number(theirs), gain)
    console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _of(bits: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in bits.items())


if __name__ == "__main__":
    sys.exit(main())
