"""Judges of generated answers: they compare text with the expected text, without a model."""

from train.evaluate.last_number import last_number
from train.evaluate.tasks.task import Item


def exact(item: Item, answer: str) -> float:
    """1 if the answer equals the target, apart from surrounding blanks."""
    return float(answer.strip() == item.targets[0].strip())


def contains(item: Item, answer: str) -> float:
    """1 if the target occurs in the answer."""
    return float(item.targets[0].strip() in answer)


def number(item: Item, answer: str) -> float:
    """1 if the last number of the answer equals the last of the target; thousands separators are ignored."""
    found, wanted = last_number(answer), last_number(item.targets[0])
    return float(found is not None and found == wanted)


def every(item: Item, answer: str) -> float:
    """Share of the target's lines that occur in the answer, ignoring case: RULER's `string_match_all` (arXiv 2404.06654)."""
    wanted = [line.strip() for line in item.targets[0].splitlines() if line.strip()]
    return sum(line.lower() in answer.lower() for line in wanted) / len(wanted)


JUDGES = {"exact": exact, "contains": contains, "number": number, "all": every}
"""The judges by the names of `TaskConfig.verifier`."""
