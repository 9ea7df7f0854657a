"""What a verifier is, and which kinds there are: a mapping such as {"kind": "number"} becomes a function from answers to rewards.

The mappings come from recipes and data. They name no code, except the kind `function`, which needs a permission of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.schema.errors import DataError
from recipes.schema.foreign import printable
from recipes.schema.suggestions import did_you_mean
from train.align.verify.answers import exact, last_number_equals, open_math, open_reasoning, target_number
from train.align.verify.constraints import check_constraints, open_constraints
from train.align.verify.formats import check_names, open_tags
from train.align.verify.sample import Sample
from train.align.verify.user_function import open_function


@dataclass(frozen=True)
class Verifier:
    """A function from a sample to its reward, and the range of its rewards."""

    kind: str
    reward: Callable[[Sample], Any]
    low: float = 0.0
    high: float = 1.0


_KINDS: dict[str, Callable[..., Callable[[Sample], Any]]] = {
    "exact": lambda: exact,
    "number": lambda: last_number_equals,
    "math": open_math,
    "reasoning": open_reasoning,
    "constraints": open_constraints,
    "tags": open_tags,
    "function": open_function,
}
_FIELDS = {"reasoning": ("generator",), "tags": ("names",), "function": ("name",)}
"""Fields of a kind besides `kind`, `low` and `high`; all must be given."""


def parse_verifier(plain: Mapping[str, Any]) -> Verifier:
    """The verifier of a mapping. DataError says what is wrong; BackendError if a package is missing.

    A function of the user's is imported here: call this only in the worker.
    """
    kind = check_verifier(plain)
    limits = {key: float(plain[key]) for key in ("low", "high") if key in plain}
    fields = {key: plain[key] for key in _FIELDS.get(kind, ())}
    return Verifier(kind, _KINDS[kind](**fields), **limits)


_FACTS: dict[str, Callable[[Sample], Any]] = {
    "exact": lambda sample: sample.fact("target"),
    "number": target_number,
    "math": lambda sample: sample.fact("target"),
    "reasoning": lambda sample: sample.fact("entry", dict),
    "constraints": check_constraints,
}
"""By kind of verifier: a check of the facts that it needs. A user's function has its own."""


def check_facts(kind: str, sample: Sample) -> None:
    """Check what a verifier needs to know about an answer, without opening it. DataError says what is wrong."""
    if kind in _FACTS:
        _FACTS[kind](sample)


def check_verifier(plain: Mapping[str, Any]) -> str:
    """Check a mapping without opening the verifier. -> its kind. DataError says what is wrong."""
    kind = plain.get("kind")
    if kind not in _KINDS:
        shown = printable(str(kind), most=100)
        hint = did_you_mean(str(kind), _KINDS, otherwise=f"Use one of: {', '.join(_KINDS)}.")
        raise DataError(f"kind={shown!r} is not a verifier. {hint}")
    needed = _FIELDS.get(kind, ())
    if missing := [key for key in needed if key not in plain]:
        raise DataError(f"the verifier {kind} needs {', '.join(missing)}.")
    if unknown := [printable(str(key), most=100) for key in plain if key not in (*needed, "kind", "low", "high")]:
        takes = ", ".join((*needed, "low", "high"))
        raise DataError(f"the verifier {kind} has no field {', '.join(unknown)}. It takes {takes}.")
    if kind == "tags":
        check_names(plain["names"])
    low, high = plain.get("low", 0.0), plain.get("high", 1.0)
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in (low, high)) or not low < high:
        raise DataError(f"the verifier {kind} has low={low} and high={high}: low must be a number below high.")
    return str(kind)
