"""Exact and mathematical answers: the record's fact `target` against the model's answer."""

from collections.abc import Callable
from typing import Any

from data.system.optional_package import optional_package
from recipes.schema.errors import DataError
from train.align.verify.sample import Sample
from train.evaluate.last_number import last_number


def exact(sample: Sample) -> float:
    """1 if the answer is the target, apart from blanks around it."""
    return float(sample.answer.strip() == sample.fact("target").strip())


def last_number_equals(sample: Sample) -> float:
    """1 if the answer's last number equals the target; commas between thousands are ignored."""
    return float(last_number(sample.answer) == target_number(sample))


def target_number(sample: Sample) -> float:
    """The number in the target. DataError without a number."""
    target = sample.fact("target", (str, int, float))
    wanted = last_number(str(target))
    if wanted is None:
        raise DataError(f"the target {target!r} has no number")
    return wanted


def open_math() -> Callable[[Sample], float]:
    """Mathematical equality by math-verify: 1/2 and 0.5, \\boxed{42} and 42, (x + 1)^2 and x^2 + 2x + 1.

    Its own time limits use signals of the main thread; here the worker's limit counts, so they are off.
    """
    with optional_package("math_verify", extra="align"):
        from math_verify import parse, verify  # an optional package, seconds of imports

    def judge(sample: Sample) -> float:
        target = parse(sample.fact("target"), parsing_timeout=None, raise_on_error=True)
        if not target:
            raise DataError(f"math-verify cannot read the target {sample.fact('target')!r}")
        answer = parse(sample.answer, parsing_timeout=None)
        return float(verify(target, answer, timeout_seconds=None, raise_on_error=True))

    return judge


def open_reasoning(generator: str) -> Callable[[Sample], float]:
    """The scorer of a generator of reasoning-gym (arXiv 2505.24760). The record's fact `entry` is an entry of its data set."""
    with optional_package("reasoning_gym", extra="align"):
        import reasoning_gym  # an optional package, seconds of imports
        from reasoning_gym.factory import DATASETS
    if generator not in DATASETS:
        raise DataError(f"reasoning-gym has no generator {generator!r}")
    dataset: Any = reasoning_gym.create_dataset(generator, size=1, seed=0)

    def judge(sample: Sample) -> float:
        return float(dataset.score_answer(sample.answer.strip(), sample.fact("entry", dict)))

    return judge
