"""Fields of the sections that tools other than the trainer read, written on the command line as `+generate.*`, `+cache.*`."""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, Fraction, NonNegativeFloat, PositiveInt, Seed


@dataclass(frozen=True)
class GenerateConfig:
    """Fields of `+generate.*` on the command line."""

    prompt: str = "\n"
    """Text to continue."""
    tokens: PositiveInt = 200
    """Tokens to write at most."""
    temperature: NonNegativeFloat = 0.8
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.95
    """Only the likeliest tokens that hold this share of the probability."""
    seed: Seed = 0
    """Seed of the picks: the same seed and checkpoint give the same text."""
    checkpoint: str | None = None
    """A checkpoint folder; null takes the newest of the run."""


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Fields of `+cache.*` on the command line."""

    values: Literal["float16", "float32"] = "float32"
    """Format of the kept log-probabilities."""
    block_rows: PositiveInt = 64
    """Rows written as one file."""
    student: str | None = None
    """A checkpoint or run: measure with it what keeping fewer tokens loses."""
