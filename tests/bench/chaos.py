"""Chaos runs: faults at random times over a real `stratum launch local` run, which must end as if nothing had happened.

    python -m tests.bench.chaos --seed 3 [--seed 4 ...] [--steps 400] [--ranks 2] [--faults 7]
    python -m tests.bench.chaos --goodput [--setting 0] [--seconds 90] [--steps 8000]

    seed --plan--> faults, each at a time --> run with memory copies on a small file system --> checks

    kill      SIGKILL to one rank                          hang   SIGSTOP to one rank, for ever
    slow      one rank stops and continues for seconds     warm   SIGKILL to the process that forks the ranks
    corrupt   a byte of a memory copy and of the newest checkpoint changes, and one rank is killed
    full      the file system of the run's folder is full for seconds
    data      a byte of a data shard changes, and one rank is killed: the run must stop; then the shard is repaired

Checks: the run ends; its weights, moments, random states and losses are bit for bit those of an undisturbed run; the booked time
is the wall time; no process, memory copy or unfinished file is left. Needs Linux and root (or user namespaces).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from killed_runs import contents_at, recipe_in
from mounts import mount_in_memory

from launch.children import stratum
from launch.plan.cost.goodput import Failures, Saving, expected_goodput, simulate_at
from launch.starts import starts_of
from launch.time_spent import LOST, TRAINING, goodput, time_spent, totals
from recipes.schema.errors import StratumError
from recipes.schema.memory_copies import MemoryCopiesConfig
from recipes.schema.read import recipe_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, last_metrics, read_metrics

KINDS = ("kill", "hang", "slow", "warm", "corrupt", "full", "data")
STOP = "stop"
"""Not drawn: the launcher gets SIGTERM, and the run ends before its last step."""
TIMEOUT_S = 4.0
"""launch.timeout_s of these runs: how long ranks wait for one that hangs."""
_MOST_S = 400.0
_SMALL = "48m"
"""Size of the run's file system."""


@dataclass(frozen=True)
class Fault:
    """One fault. Times in seconds; `at_s` counts from the fault before (the first: from the first recorded step)."""

    kind: str
    at_s: float
    rank: int
    for_s: float
    """How long a rank is slow, or the disk is full."""


def plan(seed: int, *, faults: int, ranks: int, mean_s: float = 3.0, kinds: tuple[str, ...] = KINDS) -> list[Fault]:
    """Faults at random times, with exponential gaps of `mean_s` on average. The first kinds are drawn without repetition."""
    draw = random.Random(seed)
    order = [kind for _ in range(-(-faults // len(kinds))) for kind in draw.sample(kinds, len(kinds))][:faults]
    return [Fault(kind, draw.expovariate(1 / mean_s), draw.randrange(ranks), draw.uniform(0.5, 3.0)) for kind in order]


@dataclass(frozen=True)
class Story:
    """What happened in a chaos run."""

    wall_s: float
    """From the first start of the command to its last end."""
    spent: dict[str, float]
    """Seconds by kind, as booked by the run's record."""
    attempts: int
    faults: list[str]


class ChaosRun:
    """A run of the command under faults."""

    def __init__(self, folder: Path, recipe: Recipe, *, ranks: int) -> None:
        """folder: for the recipe, output and run."""
        self.folder, self.recipe, self.ranks = folder, recipe, ranks
        self.run = Path(recipe.run.folder) / recipe.run.name
        self.memory = Path(recipe.run.memory_copies.folder)
        self.log = folder / f"{recipe.run.name}.output"
        self._seen: set[int] = set()
        self._told: list[str] = []
        (folder / f"{recipe.run.name}.yaml").write_text(recipe_yaml(recipe_mapping(recipe)))

    def to_end(self, faults: list[Fault], *, draw: random.Random, may_be_left: bool = False) -> Story:
        """Run it under `faults`, and again after each error that a person must mend. AssertionError if it does not end well, or,
        without may_be_left, before all faults."""
        started, waiting = time.time(), list(faults)
        repairs: list[tuple[Path, int, int]] = []
        for _ in range(1 + len(faults)):
            status = self._once(waiting, repairs, draw=draw)
            if status == 0 or (status == 128 + signal.SIGTERM and faults[-1].kind == STOP):
                break
            assert status == StratumError.status and repairs, f"status {status}\n{self.last_words()}"
            for path, at, byte in repairs:
                _put_byte(path, at, byte)
            repairs.clear()
        wall = time.time() - started
        assert status in (0, 128 + signal.SIGTERM), self.last_words()
        assert may_be_left or not waiting, f"the run ended before {len(waiting)} of {len(faults)} faults: more --steps"
        spent = totals(time_spent(read_metrics(self.run / METRICS), starts_of(self.run)))
        return Story(wall, spent, len(list((self.run / "logs").glob("local-*"))), self._told)

    def _once(self, waiting: list[Fault], repairs: list[tuple[Path, int, int]], *, draw: random.Random) -> int:
        """Start the command once. Faults that have happened leave `waiting`. -> its exit status."""
        words = ["--config-dir", str(self.folder), "-cn", self.recipe.run.name, "--nproc", str(self.ranks)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as output:
            child = subprocess.Popen(
                stratum("launch", "local", *words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        begin = time.monotonic()
        try:
            self._until(lambda: bool(self._steps()), child, begin)
            while waiting:
                due = time.monotonic() + waiting[0].at_s
                self._until(lambda due=due: time.monotonic() >= due, child, begin)
                if child.poll() is not None:
                    break
                if self._inject(waiting[0], child, repairs, draw=draw):
                    waiting.pop(0)
            self._until(lambda: False, child, begin)
        finally:
            if child.poll() is None:
                child.kill()
        return child.wait()

    def _until(self, condition: "object", child: subprocess.Popen[bytes], begin: float) -> None:
        """Wait for a condition, or the command's end."""
        assert callable(condition)
        while child.poll() is None and not condition():
            assert time.monotonic() - begin < _MOST_S, f"no end after {_MOST_S:g} s\n{self.last_words()}"
            self._seen.update(descendants(child.pid))
            time.sleep(0.02)

    def _steps(self) -> list[int]:
        return [line["step"] for line in last_metrics(self.run / METRICS) if line["kind"] == "step"]

    def _inject(
        self, fault: Fault, child: subprocess.Popen[bytes], repairs: list[tuple[Path, int, int]], *, draw: random.Random
    ) -> bool:
        """Do it. -> False if there is nothing yet that it could hit."""
        forkers = children(child.pid)
        ranks = [pid for forker in forkers for pid in children(forker)] or forkers
        if not ranks:
            return False
        pid = sorted(ranks)[fault.rank % len(ranks)]
        last = max(self._steps(), default=0)
        what = f"{fault.kind} of process {pid} near step {last}"
        with contextlib.suppress(ProcessLookupError):
            match fault.kind:
                case "kill":
                    os.kill(pid, signal.SIGKILL)
                case _ if fault.kind == STOP:
                    os.kill(child.pid, signal.SIGTERM)
                case "hang":
                    os.kill(pid, signal.SIGSTOP)
                case "warm":
                    os.kill(forkers[0], signal.SIGKILL)
                case "slow":
                    end = time.monotonic() + fault.for_s
                    while time.monotonic() < end:
                        os.kill(pid, signal.SIGSTOP)
                        time.sleep(0.06)
                        os.kill(pid, signal.SIGCONT)
                        time.sleep(0.04)
                case "full":
                    with full_disk(self.run.parent):
                        time.sleep(fault.for_s)
                case "corrupt":
                    changed = [path for path in (self._newest_shard(), self._newest_copy(draw)) if path is not None]
                    for path in changed:
                        at = draw.randrange(path.stat().st_size // 2, path.stat().st_size)
                        _put_byte(path, at, _byte(path, at) ^ (1 << draw.randrange(8)))
                    what += f" ({', '.join(path.name for path in changed)})"
                    os.kill(pid, signal.SIGKILL)
                case "data":
                    path = draw.choice(sorted(Path(self.recipe.data.folder).glob("*.train-*.bin")))
                    at = draw.randrange(path.stat().st_size)
                    repairs.append((path, at, _byte(path, at)))
                    _put_byte(path, at, _byte(path, at) ^ (1 << draw.randrange(8)))
                    os.kill(pid, signal.SIGKILL)
        self._told.append(what)
        return True

    def _newest_shard(self) -> Path | None:
        """The largest file of the newest checkpoint."""
        for folder in sorted((self.run / "checkpoints").glob("step_*"), reverse=True):
            if files := [path for path in folder.glob("*.safetensors")]:
                return max(files, key=lambda path: path.stat().st_size)
        return None

    def _newest_copy(self, draw: random.Random) -> Path | None:
        found = [path for path in self.memory.glob("stratum-*/*/rank_*") if path.suffix in (".0", ".1")]
        newest = sorted(found, key=lambda path: path.stat().st_mtime)[-self.ranks :]
        return draw.choice(newest) if newest else None

    def left_behind(self) -> list[str]:
        """Processes, memory and files that should be gone."""
        processes = [f"process {pid}" for pid in self._seen if Path(f"/proc/{pid}").exists()]
        memory = [str(path) for path in self.memory.rglob("*") if path.is_file()]
        unfinished = [str(path) for path in self.run.rglob("*") if path.name.startswith(".")]
        return [*processes, *memory, *unfinished]

    def last_words(self) -> str:
        """The end of the command's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


def children(pid: int) -> list[int]:
    """Children of a process, zombies left out."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        found = [int(word) for word in text.split()]
        return [one for one in found if ") Z " not in Path(f"/proc/{one}/stat").read_text()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system without a free block while the context is open."""
    ballast = folder / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while stream.write(bytes(1 << 16)):
                pass
        yield
    finally:
        ballast.unlink(missing_ok=True)


def _byte(path: Path, at: int) -> int:
    with path.open("rb") as stream:
        stream.seek(at)
        return stream.read(1)[0]


def _put_byte(path: Path, at: int, value: int) -> None:
    with path.open("rb+") as stream:
        stream.seek(at)
        stream.write(bytes([value]))


def recipes(folder: Path, memory: Path, disk: Path, *, steps: int) -> tuple[Recipe, Recipe]:
    """(an undisturbed run, one with memory copies for chaos)."""
    base = recipe_in(folder, steps_=steps)
    calm = replace(
        base, run=replace(base.run, name="calm", threads=1), checkpoint=replace(base.checkpoint, every_steps=0)
    )
    copies = MemoryCopiesConfig(every_steps=1, folder=str(memory))
    chaos = replace(
        calm,
        run=replace(calm.run, name="chaos", folder=str(disk), memory_copies=copies),
        checkpoint=replace(
            base.checkpoint, every_steps=20, keep_last=2, on_failure="continue", retries=1, retry_wait_s=0.2
        ),
        launch=replace(base.launch, timeout_s=TIMEOUT_S, backoff_s=0.5, restarts=6),
    )
    return calm, chaos


@dataclass(frozen=True)
class Setting:
    """One run under kills: how often it saves and fails."""

    name: str
    copy_steps: int
    save_steps: int
    mean_s: float
    ranks: int = 2


SETTINGS = (
    Setting("copies every step, a kill every 6 s", 1, 0, 6.0),
    Setting("copies every step, a kill every 12 s", 1, 0, 12.0),
    Setting("copies every 30 steps, a kill every 8 s", 30, 0, 8.0),
    Setting("checkpoint every 10 steps, a kill every 6 s", 0, 10, 6.0),
    Setting("checkpoint every 40 steps, a kill every 12 s", 0, 40, 12.0),
    Setting("checkpoint every 80 steps, a kill every 8 s", 0, 80, 8.0),
    Setting("one rank, copies every step, a kill every 5 s", 1, 0, 5.0, ranks=1),
    Setting("one rank, checkpoint every 100 steps, a kill every 8 s", 0, 100, 8.0, ranks=1),
)
MOST_POINTS = 5.0
"""Largest difference of measured and simulated goodput, in points."""


@dataclass(frozen=True)
class Measured:
    """Times of a run from its first step to its last: what the simulator needs, and goodput and lost work."""

    failures: Failures
    saving: Saving
    times: list[float]
    """When failures began, and the window's end, in seconds since the first step began."""
    end_s: float
    goodput: float
    lost: float
    """Share of the time that was lost work."""


def measured(run: Path, *, every_steps: int) -> Measured:
    """From the record of a run that saves (or copies) every `every_steps`."""
    lines, starts = read_metrics(run / METRICS), starts_of(run)
    steps = [line for line in lines if line["kind"] == "step"]
    first, last = steps[0]["time"] - sum(steps[0]["seconds"].values()), steps[-1]["time"]
    stretches = [replace(one, start=max(one.start, first), end=min(one.end, last)) for one in time_spent(lines, starts)]
    spent = totals([one for one in stretches if one.end > one.start])
    # A run that is killed before its first copy or save starts again from nothing: its record begins then.
    ends = [line for line in starts if line["kind"] == "attempt_end" and first < line.get("failed", 0.0) < last]
    failed = [line["failed"] for line in ends]
    down, whole = [], 0.0
    for end, until in zip(ends, [*failed[1:], last], strict=True):
        begin = end["failed"]  # rank 0 may write a line later: the last of this attempt
        back = next((line["time"] - line["step_s"] for line in steps if line["time"] > end["time"]), until)
        whole += min(back, until) - begin
        if back < until:
            down.append(back - begin)
    window, trained = last - first, spent[TRAINING]
    step_s, count = trained / len({line["step"] for line in steps}), len({line["step"] for line in steps}) / every_steps
    stalled = window - trained - spent.get(LOST, 0.0) - whole
    written = [line["seconds"] for line in lines if line["kind"] == "save"] or [step_s]
    return Measured(
        Failures(window / max(1, len(failed)), sum(down) / max(1, len(down)), 0.0),
        Saving(every_steps * step_s, max(0.0, stalled) / count, sum(written) / len(written)),
        [one - first for one in failed],
        window,
        trained / window,
        spent.get(LOST, 0.0) / window,
    )


def compare_goodput(folder: Path, memory: Path, *, steps: int, number: int | None, seconds: float) -> bool:
    """Print measured and predicted goodput of each setting, as a Markdown table. -> whether all are within MOST_POINTS.

    The simulator gets the times of the failures and the mean duration of a step, of a restart and of a save from the run itself,
    not how much work was lost: few failures at random times are far from their expectation. seconds: how long failures happen in
    each run; it ends a mean time between failures later, or at `steps`.
    """
    print(
        "| setting | kills | restart, s | lost work | measured | simulated at these times | expected at random times |\n"
        "|---|---|---|---|---|---|---|"
    )
    base, _ = recipes(folder, memory, folder, steps=steps)
    farthest = 0.0
    for at, one in enumerate(SETTINGS):
        if number not in (None, at):
            continue
        recipe = replace(
            base,
            run=replace(
                base.run,
                name=f"setting{at}",
                memory_copies=MemoryCopiesConfig(every_steps=one.copy_steps, folder=str(memory)),
            ),
            checkpoint=replace(base.checkpoint, every_steps=one.save_steps),
            launch=replace(base.launch, backoff_s=0.1, restarts=100),
        )
        run = ChaosRun(folder, recipe, ranks=one.ranks)
        faults = plan(50 + at, faults=200, ranks=one.ranks, mean_s=one.mean_s, kinds=("kill",))
        times = list(accumulate(fault.at_s for fault in faults))
        faults = [*faults[: bisect(times, seconds)], Fault(STOP, one.mean_s, 0, 0.0)]
        run.to_end(faults, draw=random.Random(50 + at), may_be_left=True)
        found = measured(run.run, every_steps=one.copy_steps or one.save_steps)
        simulated = simulate_at(found.times, found.failures, found.saving, end_s=found.end_s).goodput
        print(
            f"| {one.name} | {len(found.times)} | {found.failures.restart_s:.1f} | {found.lost:.1%} | {found.goodput:.1%} | "
            f"{simulated:.1%} | {expected_goodput(found.failures, found.saving):.1%} |",
            flush=True,
        )
        farthest = max(farthest, 100 * abs(found.goodput - simulated))
    print(f"\nThe largest difference is {farthest:.1f} points.")
    return farthest <= MOST_POINTS


def losses_of(run: Path) -> dict[int, float]:
    """Loss of each step; of a repeated one the last."""
    return {line["step"]: line["loss"] for line in read_metrics(run / METRICS) if line["kind"] == "step"}


def check(run: ChaosRun, calm: ChaosRun, story: Story) -> None:
    """AssertionError unless the run ended like the undisturbed one, and all of its time is booked."""
    end = f"checkpoints/step_{run.recipe.run.steps:08d}"
    assert contents_at(run.run / end) == contents_at(calm.run / end), "weights, moments and random states"
    assert losses_of(run.run) == losses_of(calm.run)
    booked = sum(story.spent.values())
    assert abs(booked - story.wall_s) < 0.5 + 0.01 * story.wall_s, f"{booked:.1f} s of {story.wall_s:.1f} s are booked"
    deadline = time.monotonic() + 5
    while (left := run.left_behind()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, left


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `timeout` sends it: end the run and unmount
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--faults", type=int, default=7)
    parser.add_argument("--mean-s", type=float, default=3.0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--keep", type=Path, help="copy the runs' output here")
    parser.add_argument("--goodput", action="store_true", help="compare measured with predicted goodput instead")
    parser.add_argument("--setting", type=int, help="with --goodput: only this one")
    parser.add_argument("--seconds", type=float, default=90.0, help="with --goodput: how long each run has failures")
    own = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        memory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        if own.goodput:
            return (
                0
                if compare_goodput(folder, Path(memory), steps=own.steps, number=own.setting, seconds=own.seconds)
                else 1
            )
        calm_recipe, chaos_recipe = recipes(folder, Path(memory), folder / "disk", steps=own.steps)
        calm = ChaosRun(folder, calm_recipe, ranks=own.ranks)
        calm.to_end([], draw=random.Random(0))
        (folder / "disk").mkdir()
        mount_in_memory(folder / "disk", size=_SMALL)
        stack.callback(subprocess.run, ["umount", str(folder / "disk")], check=False)
        for seed in own.seed or [0]:
            faults = plan(
                seed, faults=own.faults, ranks=own.ranks, mean_s=own.mean_s, kinds=tuple(own.kinds.split(","))
            )
            recipe = replace(chaos_recipe, run=replace(chaos_recipe.run, name=f"chaos{seed}"))
            run = ChaosRun(folder, recipe, ranks=own.ranks)
            try:
                story = run.to_end(faults, draw=random.Random(seed))
                check(run, calm, story)
            finally:
                if own.keep is not None:
                    own.keep.mkdir(parents=True, exist_ok=True)
                    subprocess.run(["cp", "-r", str(run.log), str(own.keep)], check=False)
                    subprocess.run(["cp", "-r", str(run.run), str(own.keep)], check=False)
            result = {
                "seed": seed, "wall_s": round(story.wall_s, 1), "attempts": story.attempts, "faults": story.faults,
                "goodput": round(goodput(story.spent), 4), "spent": {k: round(v, 2) for k, v in story.spent.items()},
            }  # fmt: skip
            print(json.dumps(result), flush=True)
            subprocess.run(["rm", "-rf", str(run.run)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
