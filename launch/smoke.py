"""`make smoke`: the whole story on one machine, in a few minutes, with proof at the end.

    prepare data -> train -> kill -9 half-way -> resume -> compare losses bit for bit -> sample -> report

Every step is the command a user would type, run as a process of its own; this module only starts, kills and compares.
Standard library and rich; imports no torch.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.system.console import open_console
from launch.children import stratum
from recipes.schema.options import STRATUM
from recipes.schema.run_folder import METRICS, Line, read_metrics

PROMPT = "ROMEO."
KILL_AFTER = 6
"""Steps past a checkpoint at which the kill comes: these are run again, and must repeat."""
TARGET_BITS_PER_BYTE = 2.4


@dataclass
class Story:
    """One telling: the run's name, what it takes, and how long each part took."""

    name: str
    recipe: str
    overrides: list[str]
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    def command(self, command: str, *extra: str) -> list[str]:
        return stratum(command, "-cn", self.recipe, f"run.name={self.name}", *self.overrides, *extra)

    def say(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold")


class StoryFailed(Exception):
    """A part of the story did not come out as it must."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell the story. -> 0 if every part came out right."""
    parser = argparse.ArgumentParser(prog="make smoke", description=__doc__.splitlines()[0])
    parser.add_argument("-cn", "--recipe", default="smoke", help="recipe to use (default: smoke)")
    parser.add_argument(
        "--name", default="smoke", help="run name; a number is added if the run exists (default: smoke)"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")
    parsed = parser.parse_args(arguments)
    story = Story(_free_name(parsed.name), parsed.recipe, parsed.overrides, open_console(stderr=True))
    started = time.perf_counter()
    try:
        _tell(story)
    except StoryFailed as failure:
        story.console.print(f"\nThe story went wrong: {failure}", style="bold red")
        return 1
    except KeyboardInterrupt:
        story.console.print(f"\nStopped. What was trained lies in {story.folder}.")
        return 130
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in story.seconds.items())
    story.say(f"Done in {time.perf_counter() - started:.0f} s ({parts}).")
    story.console.print(
        f"Look at {story.folder}/loss.png and {story.folder}/summary.md; metrics in metrics.jsonl and tensorboard/.\n"
        f'More text: {STRATUM} generate {story.folder} --prompt "HAMLET."',
        highlight=False,
    )
    return 0


def _tell(story: Story) -> None:
    story.say("1. Preparing data: plays of Shakespeare and the Python standard library")
    _run(story, "prepare", story.command("prepare"))

    story.say(f"2. Training into {story.folder}; half-way this process will kill it with SIGKILL")
    killed_at = _train_and_kill(story)

    story.say(f"3. Killed after step {killed_at}. The same command again resumes from the newest checkpoint")
    _run(story, "train again", story.command("train"))

    story.say("4. Steps that were run before and after the kill")
    _compare(story)

    story.say("5. A sample")
    text = _run(story, "sample", story.command("generate", "--prompt", PROMPT), capture=True)
    story.console.print(text)
    sample = story.folder / "sample.txt"
    sample.write_text(text)
    _run(story, "report", stratum("report", str(story.folder), "--sample", str(sample)))
    _check_outcome(story)


def _train_and_kill(story: Story) -> int:
    """Start training, wait until it is a few steps past a checkpoint near its middle, kill it. -> last step seen."""
    started = time.perf_counter()
    child = subprocess.Popen(story.command("train"), start_new_session=True)
    kill_at: int | None = None
    try:
        while True:
            status = child.poll()
            if status is not None:
                raise StoryFailed(f"training ended by itself with status {status} before it could be killed")
            lines = _lines(story)
            steps = [line["step"] for line in lines if line["kind"] == "step"]
            if kill_at is None:
                half = _total_steps(story) / 2
                saves = [line["step"] for line in lines if line["kind"] == "save" and line["step"] >= half]
                kill_at = saves[0] + KILL_AFTER if saves else None
            if kill_at is not None and steps and steps[-1] >= kill_at:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                break
            time.sleep(0.05)
    finally:
        if child.poll() is None:  # Ctrl-C here: let the trainer save and stop
            os.killpg(child.pid, signal.SIGINT)
            child.wait()
    story.seconds["train"] = time.perf_counter() - started
    return max(line["step"] for line in _lines(story) if line["kind"] == "step")


def _total_steps(story: Story) -> int:
    for line in _lines(story):
        if line["kind"] == "start":
            return int(line["total_steps"])
    return 1 << 30


def _compare(story: Story) -> None:
    losses: dict[int, list[float]] = {}
    for line in _lines(story):
        if line["kind"] == "step":
            losses.setdefault(line["step"], []).append(line["loss"])
    twice = {step: values for step, values in losses.items() if len(values) > 1}
    if not twice:
        raise StoryFailed("no step was run twice, so the resume proves nothing")
    table = Table("step", "loss before the kill", "loss after the resume", "same bits")
    for step, values in sorted(twice.items()):
        table.add_row(str(step), repr(values[0]), repr(values[-1]), "yes" if values[0] == values[-1] else "NO")
    story.console.print(table)
    different = [step for step, values in twice.items() if len(set(values)) > 1]
    if different:
        raise StoryFailed(f"the losses of steps {different} changed by the resume")


def _check_outcome(story: Story) -> None:
    expected = ("recipe.yaml", "metrics.jsonl", "loss.png", "summary.md", "tensorboard", "checkpoints/latest")
    missing = [name for name in expected if not (story.folder / name).exists()]
    if missing:
        raise StoryFailed(f"{story.folder} lacks {', '.join(missing)}")
    scores = [line["bits_per_byte"] for line in _lines(story) if line["kind"] == "evaluation"]
    first, last = (sum(map(float, s.values())) / len(s) for s in (scores[0], scores[-1]))
    story.say(f"Held-out bits per byte, mean over sources: {first:.2f} at the random start, {last:.2f} now")
    if last >= TARGET_BITS_PER_BYTE:
        raise StoryFailed(f"{last:.2f} bits per byte is not below {TARGET_BITS_PER_BYTE}")


def _run(story: Story, part: str, command: list[str], *, capture: bool = False) -> str:
    """Run one command to its end, its output shown (or returned). Ctrl-C reaches it too, and it ends in its own way."""
    started = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    story.seconds[part] = time.perf_counter() - started
    if result.returncode:
        raise StoryFailed(f"`{' '.join(command[1:])}` ended with status {result.returncode}")
    return result.stdout or ""


def _free_name(name: str) -> str:
    """`name`, or with a number behind it if such a run exists: nobody's run is touched."""
    taken, number = name, 2
    while (Path("runs") / taken).exists():
        taken, number = f"{name}-{number}", number + 1
    return taken


def _lines(story: Story) -> list[Line]:
    """What the run has recorded so far."""
    path = story.folder / METRICS
    return read_metrics(path) if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
