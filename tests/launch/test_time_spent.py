"""Every second of a run's life has one kind: sums by hand, and for any record, kills and clocks included."""

import math
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.time_spent import Stretch, goodput, time_spent, totals


def step(number: int, time: float, *, data: float = 0.0, work: float = 1.0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "time": time, "seconds": {"data": data, "forward_backward": work}}


def test_kinds_of_time_by_hand() -> None:
    """Steps of a second from 1,000: two, an evaluation of 3 s, one that is killed before a save, 10 s down, and it again."""
    lines: list[dict[str, Any]] = [
        {"kind": "machine", "time": 1000.0},
        step(1, 1002.0, data=0.5),  # 0.5 s before it, 0.5 s for its rows, 1 s of work
        step(2, 1003.0),
        {"kind": "phase", "name": "evaluating", "seconds": 3.0, "time": 1006.0},
        step(3, 1007.0),
        {"kind": "machine", "time": 1017.0},
        {"kind": "resume", "step": 2, "time": 1018.0},
        step(3, 1019.5),
        {"kind": "phase", "name": "saving", "seconds": 0.25, "time": 1019.75},
    ]
    assert totals(time_spent(lines)) == {
        "stopped": 10.0,
        "training": 3.0,
        "evaluating": 3.0,
        "other work": 0.5 + 1.5,
        "lost work": 1.0,
        "waiting for data": 0.5,
        "saving": 0.25,
    }
    assert goodput(totals(time_spent(lines))) == 3.0 / 19.75
    assert time_spent([]) == [] and goodput({}) == 0.0
    assert time_spent(lines)[0] == Stretch(1000.0, 1000.5, "other work")


def test_kinds_of_time_with_the_launchers_record_by_hand() -> None:
    """Started at 100; a step of 1 s is killed after 0.5 s, the next attempt waits 4 s in a queue, the third ends well."""
    starts: list[dict[str, Any]] = [
        {"kind": "submission", "time": 100.0},
        {"kind": "attempt", "time": 103.0},  # after 3 s of the queue
        {"kind": "attempt_end", "time": 116.0, "status": 137, "failed": 114.0},
        {"kind": "attempt", "time": 120.0},
        {"kind": "attempt_end", "time": 121.0, "status": 1, "failed": 120.5},  # before the trainer could write anything
        {"kind": "attempt", "time": 121.0},
        {"kind": "attempt_end", "time": 131.0, "status": 0},
    ]
    parts = {"data": 0.25, "forward_backward": 0.5, "staging": 0.25, "optimizer": 0.5}
    lines = [
        {"kind": "machine", "time": 110.0, "started_s": 6.0, "load_s": 2.0},
        {"kind": "start", "step": 0, "time": 111.0},
        {"kind": "step", "step": 1, "time": 112.5, "seconds": parts},
        step(2, 113.5),
        {"kind": "machine", "time": 127.0, "started_s": 5.0, "load_s": 1.0},
        {"kind": "resume", "step": 1, "time": 127.5},
        step(2, 128.5),
        {"kind": "phase", "name": "saving", "seconds": 2.0, "time": 130.5},
    ]  # fmt: skip
    assert totals(time_spent(lines, starts)) == {
        "starting": 5.0 + 1.0 + 5.0,
        "queue or back-off": 3.0 + 4.0,
        "loading": 2.0 + 1.0,
        "training": 1.0 + 1.0,
        "other work": 1.0 + 0.5 + 0.5,
        "detecting a failure": 2.0,
        "saving": 2.0,
        "lost work": 1.0 + 0.5,
        "waiting for data": 0.25,
        "waiting for copies": 0.25,
    }


moments = st.floats(min_value=1.0, max_value=1e6)
seconds = st.one_of(st.floats(min_value=0, max_value=100), st.sampled_from([math.nan, math.inf, -1.0, "x", None]))
any_line = st.one_of(
    st.builds(lambda time: {"kind": "machine", "time": time}, moments),
    st.builds(lambda n, time, d, w: step(n, time, data=d, work=w), st.integers(0, 5), moments, seconds, seconds),
    st.builds(
        lambda name, s, time: {"kind": "phase", "name": name, "seconds": s, "time": time}, st.text(), seconds, moments
    ),
    st.builds(lambda time: {"kind": "unreduced_step", "step": 3, "time": time, "seconds": None}, moments),
    st.just({"kind": "step", "step": 1}),
)


any_start = st.one_of(
    st.builds(
        lambda kind, time: {"kind": kind, "time": time}, st.sampled_from(["launch", "submission", "attempt"]), moments
    ),
    st.builds(lambda time, failed: {"kind": "attempt_end", "time": time, "failed": failed}, moments, moments | seconds),
)


@given(st.lists(any_line, max_size=30), st.lists(any_start, max_size=8))
def test_all_time_is_counted_once(lines: list[dict[str, Any]], starts: list[dict[str, Any]]) -> None:
    stretches = time_spent(lines, starts)
    times = [line["time"] for line in lines + starts if "time" in line]
    for before, after in pairwise(stretches):
        assert before.end == after.start and before.kind != after.kind
    whole = max(times) - min(times) if times else 0.0
    assert math.isclose(sum(totals(stretches).values()), whole, rel_tol=1e-9, abs_tol=1e-6)
