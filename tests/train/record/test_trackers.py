"""A tracker's follower: every point once over any sequence of kills and resumes, and no tracker that delays or ends a run."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from tracked_run import evaluation_line, lines_of, loss_of, step_line

from launch.time_spent import RunningGoodput, goodput, time_spent, totals
from recipes.schema.run_folder import METRICS, Line, read_metrics
from recipes.schema.telemetry import TelemetryConfig
from train.record.metrics import JsonLines
from train.record.trackers.build import follow, trackers
from train.record.trackers.follower import STATE, Follower
from train.record.trackers.mlflow_run import _allowed
from train.record.trackers.rows import Row, Rows
from train.record.trackers.tracker import TrackedRun


class Store:
    """A store that keeps all rows it is sent, doubled ones too, by run. It dies after `lives` rows of a start."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.lives = 10**9

    def open(self, run: TrackedRun) -> "StoredRun":
        return StoredRun(self, self.rows.setdefault(run.key, []))


class StoredRun:
    """A run in a `Store`."""

    def __init__(self, store: Store, rows: list[Row]) -> None:
        self._store, self._rows = store, rows
        self.last_step = max((row.step for row in rows), default=-1)

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._store.lives == 0:
                raise ConnectionError("killed")
            self._store.lives -= 1
            self._rows.append(row)

    def close(self) -> None:
        pass


def start(folder: Path, make: Callable[[TrackedRun], StoredRun], *, first: int, last: int, lr: float = 0.1) -> None:
    """A start of a run. A store that dies stands for a process that is killed: it had no time to send the rest."""
    recipe = {"optim": {"lr": lr}}
    follower = Follower("Store", make, folder=folder, first_step=first, recipe=recipe, data="d")
    record = JsonLines(folder / METRICS)
    for lines in lines_of(first, last, lr):
        record.write(lines)
        with suppress(ConnectionError):
            follower.write(lines)
    record.close()
    with suppress(ConnectionError):
        follower.close()


@pytest.mark.parametrize("seed", range(12))
def test_each_point_is_sent_once_over_kills_resumes_and_rewinds(seed: int, tmp_path: Path) -> None:
    draw, store, last = random.Random(seed), Store(), 0
    for _ in range(6):
        first = draw.randrange(0, last + 1, 4) if last else 0  # a checkpoint that exists
        last = max(last, first + draw.randrange(1, 20))
        store.lives = draw.choice([0, draw.randrange(20), 10**9])
        start(tmp_path, store.open, first=first, last=last)
    store.lives = 10**9
    start(tmp_path, store.open, first=last // 4 * 4, last=last + 1)
    (rows,) = store.rows.values()
    wanted = {line["step"]: line["loss"] for line in read_metrics(tmp_path / METRICS) if line["kind"] == "step"}
    steps = [row.step for row in rows]
    assert steps == sorted(set(steps)) and steps == list(range(0, last + 2))
    assert {row.step: row.scalars["train/loss"] for row in rows if row.step} == wanted
    scores = [row.step for row in rows if "heldout_bits_per_byte/a(b)" in row.scalars]
    assert scores == list(range(0, last + 2, 8))


def test_a_changed_recipe_that_goes_back_is_a_new_run(tmp_path: Path) -> None:
    store = Store()
    start(tmp_path, store.open, first=0, last=12)
    start(tmp_path, store.open, first=12, last=16, lr=0.2)  # from the last step on: the same run
    assert len(store.rows) == 1
    store.lives = 3
    start(tmp_path, store.open, first=8, last=20, lr=0.3)  # killed after three rows of the new run
    store.lives = 10**9
    start(tmp_path, store.open, first=8, last=20, lr=0.3)
    first, second = store.rows.values()
    assert [row.step for row in first] == list(range(0, 17))
    wanted = {line["step"]: line["loss"] for line in read_metrics(tmp_path / METRICS) if line["kind"] == "step"}
    assert {row.step: row.scalars["train/loss"] for row in second if row.step} == wanted
    assert [row.step for row in second] == list(range(0, 21))


def test_a_run_that_goes_back_after_a_spike_is_a_new_run_without_the_undone_steps(tmp_path: Path) -> None:
    store, record = Store(), JsonLines(tmp_path / METRICS)
    follower = Follower("Store", store.open, folder=tmp_path, first_step=0, recipe={}, data="d")
    back = [{"kind": "rollback", "step": 11, "to_step": 8, "documents": [], "time": 5.5}]
    for lines in (*lines_of(0, 10, 0.1), back, *lines_of(8, 14, 0.2)):
        record.write(lines)
        follower.write(lines)
    record.close()
    follower.close()
    first, second = store.rows.values()
    assert [row.step for row in first] == list(range(0, 10)), "step 10 was not complete yet"
    assert [row.step for row in second] == list(range(0, 15))
    wanted = {step: loss_of(step, 0.1 if step <= 8 else 0.2) for step in range(1, 15)}
    assert {row.step: row.scalars["train/loss"] for row in second if row.step} == wanted


def test_a_copy_of_a_run_folder_does_not_write_into_the_run_of_the_original(tmp_path: Path) -> None:
    store = Store()
    for name in ("one", "two"):
        follower = Follower(
            "Store", store.open, folder=tmp_path, first_step=0, recipe={"run": {"name": name}}, data="d"
        )
        follower.write([step_line(1, 0.1)])
        follower.close()
    assert len(store.rows) == 2


def test_a_history_that_takes_longer_than_the_limit_is_sent_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.record.trackers.follower._ROWS_AT_ONCE", 1)

    class Slow(StoredRun):
        def send(self, rows: Sequence[Row]) -> None:
            time.sleep(0.05)
            super().send(rows)

    store = Store()
    follower = Follower(
        "Store", lambda run: Slow(store, []), folder=tmp_path, first_step=0, recipe={}, data="", hang_s=0.2
    )
    follower.write([step_line(step, 0.1) for step in range(1, 10)])
    time.sleep(0.3)
    follower.write([step_line(10, 0.1)])
    follower.close()


def test_a_tracker_that_is_switched_on_late_gets_the_whole_history(tmp_path: Path) -> None:
    record = JsonLines(tmp_path / METRICS)
    for lines in lines_of(0, 12, 0.1):
        record.write(lines)
    record.close()
    store = Store()
    start(tmp_path, store.open, first=12, last=13)
    (rows,) = store.rows.values()
    assert [row.step for row in rows] == list(range(0, 14))


def test_a_damaged_state_or_record_costs_no_run(tmp_path: Path) -> None:
    store = Store()
    start(tmp_path, store.open, first=0, last=8)
    (tmp_path / STATE / "store.json").write_text('{"identity": "../../x", "part": "1", "recipe": 3')
    with (tmp_path / METRICS).open("a") as stream:
        stream.write(
            '{"kind": "step", "step": 3, "seconds": {}}\n{"kind": "tasks", "step": 3, "tasks": 5}\n{"kind": "st'
        )
    start(tmp_path, store.open, first=8, last=12)
    assert [row.step for row in list(store.rows.values())[-1]] == list(range(0, 13))


def test_a_tracker_that_hangs_delays_no_step_and_is_switched_off(tmp_path: Path) -> None:
    for hangs_at in ("open", "send", "close"):
        free = threading.Event()

        class Hanging(StoredRun):
            def send(self, rows: Sequence[Row]) -> None:
                assert hangs_at != "send" or free.wait(20)  # noqa: B023

            def close(self) -> None:
                assert hangs_at != "close" or free.wait(20)  # noqa: B023

        def opened(run: TrackedRun) -> StoredRun:
            assert hangs_at != "open" or free.wait(20)  # noqa: B023
            return Hanging(Store(), [])

        follower = Follower(
            "Store", opened, folder=tmp_path / hangs_at, first_step=0, recipe={}, data="", hang_s=0.05, close_s=0.05
        )
        before = time.monotonic()
        follower.write([step_line(1, 0.1)])
        follower.write([step_line(2, 0.1)])
        assert time.monotonic() - before < 0.04
        if hangs_at != "close":
            time.sleep(0.1)
            with pytest.raises(TimeoutError, match=r"has not answered for 0\.05 s\. The next start"):
                follower.write([step_line(3, 0.1)])
        with pytest.raises(TimeoutError, match="did not take the last points within"):
            follower.close()
        free.set()


def test_rows_wait_for_all_lines_of_their_step_and_for_the_step_itself() -> None:
    rows = Rows(last_sent=-1, first_step=0)
    rollouts = {"kind": "rollouts", "step": 3, "reward_mean": 0.5, "verifiers": {}, "time": 1e9}
    rows.add([evaluation_line(0, 0.1), rollouts])  # answers are drawn before the steps before are written
    assert rows.complete() == []
    rows.add([step_line(1, 0.1), step_line(2, 0.1)])
    assert [row.step for row in rows.complete()] == [0, 1]
    rows.add([evaluation_line(2, 0.1)])
    assert [sorted(row.scalars)[0] for row in rows.complete(is_end=True)] == ["heldout_bits_per_byte/a(b)"]
    rows.add([step_line(3, 0.1)])
    (last,) = rows.complete(is_end=True)
    assert last.scalars["rollouts/reward_mean"] == 0.5 and last.scalars["train/loss"] == loss_of(3, 0.1)


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    given = {"mlflow": "sqlite:///x.db", "trackio": True, "wandb": "online"}[name]
    ((title, package, make),) = trackers(TelemetryConfig(**{name: given}))  # type: ignore[arg-type]
    with pytest.raises(
        Exception, match=rf"package {name} is not installed\. Install it: pip install 'stratum-pretrain\[{name}\]'"
    ):
        follow(title, package, make, folder=tmp_path, first_step=0, recipe={}, data="")


def test_running_goodput_is_the_goodput_of_the_whole_record() -> None:
    draw, now, lines, step = random.Random(0), 1e9, list[Line](), 0
    for _ in range(8):
        lines.append({"kind": "machine", "time": now})
        step = draw.randrange(step + 1)
        for _ in range(draw.randrange(1, 12)):
            step += 1
            parts = {
                "data": draw.random(),
                "forward": draw.random(),
                "staging": draw.random(),
                "optimizer": draw.random(),
            }
            now += sum(parts.values()) + draw.random()
            lines.append({"kind": "step", "step": step, "seconds": parts, "time": now})
            if draw.random() < 0.2:
                now += 1.5
                lines.append({"kind": "phase", "name": "saving", "seconds": 1.0, "time": now})
        now += 5
    running = RunningGoodput()
    for line in lines:
        running.add(line)
    assert running.value == pytest.approx(goodput(totals(time_spent(lines))), abs=1e-6)


def test_names_of_metrics_are_made_ones_that_mlflow_takes() -> None:
    assert _allowed("train/loss") == "train/loss"
    changed = [_allowed(name) for name in ("a(b)", "a[b]", "../x", "/x", "a//b", "ä", "x" * 300, "..")]
    assert len(set(changed)) == len(changed) and all(name[0] not in "/." and len(name) < 250 for name in changed)
