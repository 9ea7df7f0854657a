"""Types of recipe fields: plain types with a range that the recipe reader checks.

For code and type checkers, a field `hidden: PositiveInt` is an `int`. The range is `typing.Annotated` metadata, and one
place checks it, `recipes.schema.typed`.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Bounds of a number. `ge`/`le` include the bound, `gt`/`lt` exclude it; None: no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admits(self, value: float) -> bool:
        """Whether `value` is within all bounds. NaN never is."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and value == value
        )

    def __str__(self) -> str:
        bounds = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(
            f"{sign} {bound if isinstance(bound, int) else f'{bound:g}'}" for sign, bound in bounds if bound is not None
        )


@dataclass(frozen=True)
class LengthRange(Range):
    """A whole number of steps or tokens, or a fraction of the run, which is below 1."""

    def admits(self, value: float) -> bool:
        return value >= 0 if isinstance(value, int) else 0 <= value < 1

    def __str__(self) -> str:
        return ">= 0: a whole number, or a fraction below 1"


@dataclass(frozen=True)
class TemperatureRange(Range):
    """0, or from 0.01 to 100. Logits divided by a smaller temperature could overflow fp32."""

    def admits(self, value: float) -> bool:
        return value == 0 or 0.01 <= value <= 100

    def __str__(self) -> str:
        return "0, or from 0.01 to 100"


PositiveInt = Annotated[int, Range(ge=1)]
Count = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
HalfFraction = Annotated[float, Range(ge=0, lt=0.5)]
PositiveFraction = Annotated[float, Range(gt=0, le=1)]
Temperature = Annotated[float, Range(ge=0.01, le=100)]
"""Temperature of distillation. Logits divided by a smaller one could overflow fp32."""
TemperatureOrZero = Annotated[float, TemperatureRange()]
OpenFraction = Annotated[float, Range(ge=0, lt=1)]
Port = Annotated[int, Range(ge=0, lt=2**16)]
Seed = Annotated[int, Range(ge=0, lt=2**63)]
"""A seed that numpy, torch on a CPU and torch on a GPU all accept."""
Length = Annotated[int | float, LengthRange()]
SoftCap = Annotated[float, Range(gt=0, le=70)]
ShortTime = Annotated[float, Range(gt=0, le=86_400)]
"""Seconds, at most a day: the system's calls refuse times that are too long."""
ProcessGib = Annotated[float, Range(gt=0, le=2**20)]
"""Memory of one process in GiB, at most a pebibyte: the system refuses larger limits."""
ExpertCount = Annotated[int, Range(ge=1, le=2**16)]
AdapterRank = Annotated[int, Range(ge=0, le=4096)]
Depths = Annotated[int, Range(ge=0, le=16)]
GroupSize = Annotated[int, Range(ge=2)]
ZeroOrOne = Annotated[int, Range(ge=0, le=1)]
WindowSteps = Annotated[int, Range(ge=4, le=10_000)]
