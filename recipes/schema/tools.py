"""Options of the tools: each field is one option of a command (`stratum generate --top-k 40`), with the text under it as help.

The shared options of every command that reads a recipe are in `recipes.schema.options`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from recipes.schema.fields import (
    Count,
    Fraction,
    Port,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Seed,
    TemperatureOrZero,
)


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
    """A checkpoint folder, or a folder of `stratum hf export --quantize`; the newest checkpoint of the run if not given."""


@dataclass(frozen=True)
class EvaluateToolConfig:
    """Options of `stratum evaluate`."""

    tasks: str | None = None
    """Tasks, separated by commas: names (needle-4k, human-eval, reasoning/chain_sum) and task files (mine.yaml)."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, separated by commas; with --harness-folder. Needs the extra `evaluate`."""
    harness_folder: str | None = None
    """Folder with the harness's task files (YAML). Without it, the tasks that come with the harness, whose data is online."""
    items: PositiveInt | None = None
    """Ask at most so many items of each task."""
    row_tokens: PositiveInt | None = None
    """Longest row that is scored; the recipe's data.row_tokens if not given. Long-context tasks take what they need."""
    batch_rows: PositiveInt = 8
    """Rows that are scored at once. Changes the memory, not the scores."""
    seed: Seed = 0
    """Seed of tasks that are made: long contexts and reasoning."""
    out: str | None = None
    """Folder of results.json; evaluations/step_N in the run's folder if not given."""
    resume: bool = False
    """Leave out tasks that are finished in results.json with the same items and settings."""
    run_code: bool = False
    """Allow tasks that run code which the model wrote (human-eval). It runs without network, in a temporary folder."""
    contamination: str | None = None
    """Instead of a model, look for the tasks' texts in this folder of prepared data, and name the documents."""
    tokenizer: str | None = None
    """The tokenizer's file, if the recipe's prepared data is not here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""


@dataclass(frozen=True)
class ServeConfig:
    """Options of `stratum serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: Port = 8000
    """Port to listen on; 0: a free one, which the first line of output names."""
    name: str | None = None
    """Name of the model in the API; the run's name if not given."""
    checkpoint: str | None = None
    """A checkpoint folder; the newest of the run if not given."""
    rows: PositiveInt = 16
    """Requests that run at once; more wait."""
    queue: Count = 64
    """Requests that may wait; more are refused with status 429."""
    context_tokens: PositiveInt = 4096
    """Tokens of the longest text, prompt and answer together."""
    memory_gib: PositiveFloat | None = None
    """GiB of keys, values and states; enough for `rows` texts of `context_tokens` if not given."""
    step_tokens: PositiveInt = 512
    """Tokens read at once at most: how long a new prompt delays the other requests."""
    prefix_blocks: Count = 256
    """Blocks of 128 tokens of prompts that are stored for later prompts which begin the same; 0: none."""
    body_mib: PositiveFloat = 4
    """MiB of the largest body of a call."""
    key_file: str | None = None
    """A file with a key that clients must send as bearer token."""
    chat_template: str | None = None
    """A Jinja file for chat completions, or `plain` for a model that was not trained on chats."""
    think_start: str | None = None
    """The marker that starts thinking, such as <think>; calls may then give `thinking_budget`."""
    think_end: str | None = None
    """The marker that ends it, such as </think>."""
    drain_s: Count = 60
    """After SIGTERM: seconds for open requests to end."""


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


@dataclass(frozen=True)
class MergeConfig:
    """Options of `stratum merge`."""

    out: str | None = None
    """Folder of the new run."""
    alpha: str | None = None
    """Of two models: share of the second, (1 - alpha) FIRST + alpha SECOND. Several, separated by commas, are a sweep: each is
    scored with --evaluate, and the best becomes the new run."""
    window: str | None = None
    """Of one run: average its checkpoints from one step to another, FROM:TO, both included; either may be left out."""
    weights: str = "equal"
    """Of a window: equal; linear, cosine or minus_sqrt, which emulate this decay of the learning rate; or numbers separated
    by commas, which must sum to 1."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end of the emulated decay, as a fraction of that at its start."""
    evaluate: str | None = None
    """How a sweep is scored: `heldout` (bits per byte of the recipe's held-out data) or tasks of `stratum evaluate`, whose mean
    score counts."""
    rows: PositiveInt = 64
    """Held-out rows of each source."""
    items: PositiveInt | None = None
    """Ask at most so many items of each task."""
    seed: Seed = 0
    """Seed of tasks that are made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is evaluated."""
