"""A start of a run without a model, for tests of trackers: it writes metrics.jsonl and follows it with one tracker.

    python tests/tracked_run.py FOLDER '{"first": 8, "last": 21, "kill": true, "lr": 0.1, "telemetry": {"trackio": true}}'

The loss of a step depends on the step and on `lr`, which stands for the recipe. kill: SIGKILL to itself after the last step.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from recipes.schema.run_folder import METRICS, Line
from recipes.schema.telemetry import TelemetryConfig
from train.record.metrics import JsonLines
from train.record.trackers.build import follow, trackers

INTERVAL, EVALUATE_EVERY = 4, 8


def loss_of(step: int, lr: float) -> float:
    """The loss that a start with this recipe records."""
    return 8.0 - lr * step


def step_line(step: int, lr: float) -> Line:
    """A line as the trainer writes it."""
    numbers = {"loss": loss_of(step, lr), "grad_norm": 1.0, "learning_rate": lr, "tokens": 64 * step}
    speed = {"step_s": 0.01, "tokens_per_s": 6400.0, "seconds": {"data": 0.002, "forward": 0.008}, "time": time.time()}
    return {"kind": "step", "step": step, **numbers, **speed}


def evaluation_line(step: int, lr: float) -> Line:
    return {"kind": "evaluation", "step": step, "bits_per_byte": {"a(b)": loss_of(step, lr) / 2}, "time": time.time()}


def lines_of(first: int, last: int, lr: float) -> list[list[Line]]:
    """What a start from step `first` to step `last` writes, in the pieces in which it does."""
    pieces = [[evaluation_line(0, lr)]] if first == 0 else []
    for start in range(first, last, INTERVAL):
        steps = range(start + 1, min(start + INTERVAL, last) + 1)
        pieces.append([step_line(step, lr) for step in steps])
        pieces += [[evaluation_line(step, lr)] for step in steps if step % EVALUATE_EVERY == 0]
    return pieces


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    first, last, lr = asked["first"], asked["last"], asked.get("lr", 0.1)
    recipe = {"optim": {"lr": lr}, "run": {"name": folder.name}}
    followers = [
        follow(name, package, make, folder=folder, first_step=first, recipe=recipe, data="data")
        for name, package, make in trackers(TelemetryConfig(**asked["telemetry"]))
    ]
    record = JsonLines(folder / METRICS)
    for lines in lines_of(first, last, lr):
        record.write(lines)
        for follower in followers:
            with suppress(Exception) if asked.get("reports_failure") else nullcontext():
                follower.write(lines)
        time.sleep(asked.get("pause_s", 0.0))
    if asked.get("kill"):
        time.sleep(asked.get("before_kill_s", 0.0))
        os.kill(os.getpid(), signal.SIGKILL)
    for follower in followers:
        try:
            follower.close()
        except Exception as error:
            if not asked.get("reports_failure"):
                raise
            sys.stdout.write(f"FAILED {error}\n")


if __name__ == "__main__":
    main()
