"""Verifiers in their process: rewards, ranges, permission, and every way in which a user's function can fail."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.schema.errors import BackendError, DataError, RecipeError
from train.align.verify.judge import Judge, Limits
from train.align.verify.sample import Sample

FUNCTIONS = """
import math, os, signal, subprocess, sys, time

def reward(prompt, answer, facts):
    print("printed text does not disturb the results")
    match answer:
        case "good":
            return 0.25 * len(prompt) * facts["weight"]
        case "true":
            return True
        case "raise":
            raise ValueError("no such answer")
        case "exit":
            sys.exit(3)
        case "hang":
            child = subprocess.Popen(["sleep", "600"])
            open("child", "w").write(str(child.pid))
            time.sleep(600)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            return math.nan
        case "infinite":
            return math.inf
        case "high":
            return 7
        case "text":
            return "1.0"
        case "nothing":
            return None
        case "memory":
            return float(len(bytearray(1 << 32)))
        case "huge":
            return 10 ** 400
"""
FUNCTION = {"kind": "function", "name": "mine:reward"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


def test_whatever_a_function_does_is_counted_and_named(folder: Path) -> None:
    expected = [
        ("good", 0.5, ""), ("true", 1.0, ""), ("raise", None, "raised ValueError: no such answer"),
        ("nan", None, "gave nan"), ("infinite", None, "gave inf"), ("high", None, "gave 7, outside 0 to 1"),
        ("text", None, "gave str, not a number"), ("nothing", None, "gave NoneType, not a number"),
        ("huge", None, "raised OverflowError"), ("memory", None, "raised MemoryError"), ("die", None, "ended"),
        ("hang", None, "timed out after 0.7 s"), ("exit", None, "ended"), ("good", 0.5, ""),
    ]  # fmt: skip
    limits = Limits(seconds=0.7, memory_bytes=2 << 30)
    with Judge(FUNCTION, run_code=True, limits=limits) as judge:
        found = judge.rewards([Sample("ab", answer, {"weight": 1}) for answer, *_ in expected])
        for (answer, value, failure), reward in zip(expected, found, strict=True):
            assert reward.value == value and failure in reward.failure, (answer, reward)
        assert judge.failures == {"raised": 3, "not a number": 4, "out of range": 1, "ended": 2, "timed out": 1}
    child = int((folder / "child").read_text())
    for _ in range(50):  # the process that the function started ends too
        if not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.02)
    else:
        pytest.fail("a process of the verifier is left")


def test_answers_that_hang_share_one_limit_and_the_others_are_named(folder: Path) -> None:
    """Each one waited for its own limit: a batch of hanging answers took answers x seconds."""
    answers = ["hang", "hang", "hang", "good"]
    with Judge(FUNCTION, run_code=True, limits=Limits(seconds=0.3)) as judge:
        found = judge.rewards([Sample("ab", answer, {"weight": 1}) for answer in answers], lost_seconds=0.2)
        assert [one.what for one in found] == ["timed out", "not judged", "not judged", "not judged"]
        assert judge.failures == {"timed out": 1, "not judged": 3}
        (again,) = judge.rewards([Sample("ab", "good", {"weight": 1})], lost_seconds=0.2)  # the next batch
        assert again.value == 0.5


def test_a_function_needs_permission_and_must_exist(folder: Path) -> None:
    with pytest.raises(RecipeError, match="mine:reward is code of your own"):
        Judge(FUNCTION)
    for name, message in (
        ("mine:nobody", "cannot be imported: AttributeError"),
        ("nobody:reward", "cannot be imported: ModuleNotFoundError"),
        ("mine", "is not module:function"),
        ("mine:FACTS", "cannot be imported"),
    ):
        with pytest.raises(DataError, match=message):
            Judge(FUNCTION | {"name": name}, run_code=True)


def test_built_in_verifiers_by_hand() -> None:
    cases: list[tuple[dict[str, Any], list[tuple[str, dict[str, Any], float]]]] = [
        ({"kind": "exact"}, [(" 7\n", {"target": "7"}, 1), ("07", {"target": "7"}, 0)]),
        (
            {"kind": "number"},
            [("so 1,000.", {"target": 1000}, 1), ("3 or 4", {"target": "3"}, 0), ("none", {"target": "3"}, 0)],
        ),
        (
            {"kind": "tags", "names": ["think", "answer"]},
            [
                (" <think>a</think>\n<answer>b</answer>", {}, 1), ("<answer>b</answer><think>a</think>", {}, 0),
                ("<think>a</think><answer>b</answer>c", {}, 0), ("<think>a</think><answer>b", {}, 0),
                ("<think>a</think><think>a</think><answer>b</answer>", {}, 0),
            ],
        ),
        ({"kind": "constraints"}, [("a b", {"constraints": [{"kind": "no_commas"}]}, 1)]),
    ]  # fmt: skip
    for verifier, samples in cases:
        with Judge(verifier) as judge:
            found = judge.rewards([Sample("", answer, facts) for answer, facts, _ in samples])
            assert [reward.value for reward in found] == [value for *_, value in samples], verifier
            missing = judge.rewards([Sample("", "x" * 200_000)])[0]
            assert verifier["kind"] == "tags" or "raised DataError: the record's" in missing.failure


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ({"kind": "exakt"}, "Did you mean exact?"),
        ({}, "Use one of: exact, number, math"),
        ({"kind": "tags"}, "the verifier tags needs names"),
        ({"kind": "exact", "name": "os:system"}, "the verifier exact has no field name"),
        ({"kind": "exact", "low": 1, "high": 1}, "low must be a number below high"),
        ({"kind": "tags", "names": ["a b"]}, "is not a list of tag names"),
    ],
)
def test_a_wrong_verifier_is_refused(verifier: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        Judge(verifier)
    assert message in str(raised.value)


def test_no_room_for_a_process_is_a_failure_of_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a traceback on one rank, while the others wait for it; and no descriptor stays open."""

    def no_memory(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with Judge({"kind": "exact"}) as judge:
        judge.close()  # as after a time-out
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr("train.align.verify.judge.subprocess.Popen", no_memory)
        (reward,) = judge.rewards([Sample("", "a", {"target": "a"})])
        assert reward.what == "did not start" and "Cannot allocate memory" in reward.failure
        with pytest.raises(BackendError, match="verifier exact did not start: Cannot allocate memory"):
            Judge({"kind": "exact"})
        assert len(os.listdir("/proc/self/fd")) == before
