"""`make precision-gap`: train the same small hybrid with every precision, and a small Gemma 2 with some, and compare losses.

    each precision: stratum train -cn precision_gap precision=... --> runs/gap_NAME (resumes where it stopped)
    all of them --> docs/pictures/precision_gap.png and a table for docs/fp8.md

Everything but the precision is the same: weights, rows, order, schedule. Runs that are finished are not run again, one that
was killed continues, so the whole comparison can be left alone and started over. About 8 minutes a run on two cores.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "bf16": ["precision=bf16"],
    "fp32": ["precision=fp32"],
    "fp8_current": ["precision=fp8_current"],
    "fp8_blockwise": ["precision=fp8_blockwise"],
    "fp8_delayed": ["precision=fp8_delayed"],
    "mxfp8": ["precision=mxfp8"],
    "nvfp4": ["precision=nvfp4"],
    "nemotron3_super": ["precision=nemotron3_super"],
    "nvfp4_then_bf16": ["precision=nvfp4", "precision.switch_at_tokens=838860", "precision.scaling_after=none"],
    "unscaled": ["precision=fp8_current", "precision.scaling=unscaled"],
    "bf16_other_seed": ["precision=bf16", "run.seed=4321"],
    "gemma_bf16": ["model=gemma2_tiny", "precision=bf16"],
    "gemma_fp8_current": ["model=gemma2_tiny", "precision=fp8_current"],
    "gemma_fp8_blockwise": ["model=gemma2_tiny", "precision=fp8_blockwise"],
}
"""Name -> overrides. `unscaled` is meant to fail; `bf16_other_seed` shows what chance alone does. Each run is compared with
the bf16 run of its family."""
LAST_STEPS = 64
"""Steps over which the final training loss is averaged."""


def main() -> int:
    """Run what is missing, then compare. -> 0 if the FP8 recipes are within half a percent of bf16, and `unscaled` is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.precision_gap", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS), help="runs to do (default: all)")
    parser.add_argument("--compare", action="store_true", help="train nothing, compare what is there")
    parser.add_argument("overrides", nargs="*", help="further overrides for every run")
    options = parser.parse_args()
    if not options.compare:
        subprocess.run([sys.executable, "-m", "train.stratum", "prepare", "-cn", "precision_gap"], cwd=ROOT, check=True)
        for name in options.only:
            command = [sys.executable, "-m", "train", "-cn", "precision_gap", f"run.name=gap_{name}"]
            subprocess.run([*command, *RUNS[name], *options.overrides], cwd=ROOT, check=True)
    return compare()


def losses_of(name: str) -> tuple[dict[int, float], dict[int, float]]:
    """Training loss by step, and mean held-out bits per byte by step."""
    losses, heldout = {}, {}
    path = ROOT / "runs" / f"gap_{name}" / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["kind"] == "step":
            losses[line["step"]] = line["loss"]
        elif line["kind"] == "evaluation":
            heldout[line["step"]] = sum(line["bits_per_byte"].values()) / len(line["bits_per_byte"])
    return losses, heldout


def compare() -> int:
    """Draw the picture, print the table."""
    found = {name: value for name in RUNS if (value := losses_of(name))[0]}
    if not found:
        raise SystemExit("there are no runs/gap_* to compare. Train them: make precision-gap")

    def base_of(name: str) -> str:
        return "gemma_bf16" if name.startswith("gemma") else "bf16"

    # Runs that ended where the bf16 run of their family did.
    last = {name: max(losses) for name, (losses, _) in found.items()}
    found = {name: value for name, value in found.items() if last[name] == last.get(base_of(name))}

    def final(name: str) -> float:
        losses = found[name][0]
        return math.fsum(losses[step] for step in range(last[name] - LAST_STEPS + 1, last[name] + 1)) / LAST_STEPS

    table = Table("precision", "steps", "training loss, nats", "gap to bf16", "held-out bits per byte", "gap to bf16")
    gaps = {}
    for name, (_, heldout) in found.items():
        gaps[name] = final(name) / final(base_of(name)) - 1
        bits = heldout[last[name]] / found[base_of(name)][1][last[name]] - 1
        table.add_row(
            name,
            str(last[name]),
            f"{final(name):.4f}",
            f"{gaps[name]:+.2%}",
            f"{heldout[last[name]]:.4f}",
            f"{bits:+.2%}",
        )
    Console(width=120).print(table)
    if "bf16" in found:
        _draw({name: losses for name, (losses, _) in found.items() if base_of(name) == "bf16"})
    judged = [name for name in gaps if "fp8" in name]
    bad = [name for name in judged if gaps[name] > 0.005]
    if "unscaled" in gaps and gaps["unscaled"] <= 0.005:
        bad.append("unscaled (should have failed)")
    print("Outside half a percent: " + (", ".join(bad) or "none"))
    return 1 if bad else 0


def _draw(found: dict[str, dict[int, float]]) -> None:
    """The hybrids' losses by step, and their gaps to bf16."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[1, 1.3])
    for name, losses in found.items():
        steps = sorted(losses)
        window = 16
        smooth = [sum(losses[s] for s in steps[i - window : i]) / window for i in range(window, len(steps) + 1)]
        base = [found["bf16"][s] for s in steps]
        smooth_base = [sum(base[i - window : i]) / window for i in range(window, len(steps) + 1)]
        at = [steps[i - 1] for i in range(window, len(steps) + 1)]
        above.plot(at, smooth, label=name, linewidth=1)
        relative = [100 * (a / b - 1) for a, b in zip(smooth, smooth_base, strict=True)]
        below.plot(at, relative, label=name, linewidth=1)
    above.set_ylabel("training loss, nats (mean of 16 steps)")
    below.set_ylabel("gap to bf16, % (mean of 16 steps)")
    below.set_xlabel("step (2,048 tokens each)")
    below.axhspan(-0.5, 0.5, color="0.92", zorder=0)
    below.set_ylim(-1.5, 3)
    above.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    picture = ROOT / "docs" / "pictures" / "precision_gap.png"
    figure.savefig(picture, dpi=130)
    print(f"Picture: {picture.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
