"""Options of the tools: each field is one option of a command (`stratum generate --top-k 40`), with the text under it as help.

The shared options of every command that reads a recipe are in `recipes.schema.options`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from recipes.schema.fields import Count, PositiveFraction, PositiveInt, Range, Seed, TemperatureOrZero


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `stratum generate`."""

    prompt: str = "\n"
    """Text to continue."""
    prompts: str | None = None
    """A file of texts to continue together, one a line; in a .jsonl file a JSON string or an object with "prompt". The
    output is then a JSON object for each text."""
    n: PositiveInt = 1
    """Texts for each prompt; their seeds count up from --seed. More than one: JSON."""
    logprobs: Count | None = None
    """Also the log-probabilities of tokens, and of this many of the likeliest in each place. As JSON."""
    batch: PositiveInt = 16
    """Texts that are generated at the same time at most."""
    tokens: PositiveInt = 200
    """Tokens to write at most."""
    temperature: TemperatureOrZero = 0.8
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: PositiveFraction = 0.95
    """Only the likeliest tokens that hold this share of the probability."""
    seed: Seed = 0
    """Seed of the random choices: the same seed and checkpoint give the same text."""
    checkpoint: str | None = None
    """A checkpoint folder; the newest of the run if not given."""


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Options of `stratum teacher-cache`."""

    values: Literal["float16", "float32"] = "float32"
    """Format of the cached log-probabilities."""
    block_rows: PositiveInt = 64
    """Rows written as one file."""
    student: str | None = None
    """A checkpoint or run: measure with it what keeping fewer tokens loses."""


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `stratum prepare`."""

    task: str | None = None
    """Do one part of an array job: K/N, plan or merge (see below). Without it, everything that is not done yet."""


@dataclass(frozen=True)
class InspectConfig:
    """Options of `stratum inspect`."""

    samples: Annotated[int, Range(ge=0, le=1000)] = 2
    """Documents of each source whose beginning is shown."""
    chars: Annotated[int, Range(ge=0, le=100_000)] = 240
    """Characters shown of each."""
    picture: str | None = None
    """File of the histogram; lengths.png in the data's folder if not given."""
    verify: bool = False
    """First read every file and compare it with its checksum."""


@dataclass(frozen=True)
class TraceConfig:
    """Options of `stratum trace`."""

    step: PositiveInt | None = None
    """Show what this step saw."""
    rows: PositiveInt | None = None
    """Only the first of its rows; all if not given."""
    file: str | None = None
    """Show when documents of this file were seen: its name, or the end of it."""
    record: Count | None = None
    """Only this record of the file: line or row, from 0."""
    source: str | None = None
    """Show when a document of this source was seen; with --document."""
    document: Count | None = None
    """Number of the document in the source's training stream, from 0."""
    chars: Count = 200
    """Characters of text shown of each document; 0 for none."""
    json: bool = False
    """One JSON object a line instead of text."""
