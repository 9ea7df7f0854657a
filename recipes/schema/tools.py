"""Options of the tools. Each field is an option of a command (`stratum generate --top-k 40`), and the text under it is its help.

The options that all commands with a recipe share are in `recipes.schema.options`.
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
    Temperature,
    TemperatureOrZero,
)

DraftTokens = Annotated[int, Range(ge=1, le=64)]
SampleCount = Annotated[int, Range(ge=2)]


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `stratum generate`."""

    prompt: str = "\n"
    """Text to continue."""
    prompts: str | None = None
    """A file of texts to continue together, one per line; in a .jsonl file, a JSON string or an object with "prompt" per line.
    The output is one JSON object per text."""
    chat: bool = False
    """Each prompt is a user's message, and the text is the answer. In a .jsonl file a line may also have "messages"."""
    chat_template: str | None = None
    """The Jinja file or built-in template of --chat; the recipe's data.chat.template if not given."""
    n: PositiveInt = 1
    """Number of texts for each prompt. Their seeds count up from --seed. More than one are printed as JSON."""
    logprobs: Count | None = None
    """Also print log-probabilities, as JSON: of each token, and of this many most likely tokens at its place."""
    batch: PositiveInt = 16
    """Largest number of texts generated at the same time."""
    tokens: PositiveInt = 200
    """Largest number of tokens to write."""
    temperature: TemperatureOrZero = 0.8
    """Sampling temperature; 0: greedy."""
    top_k: Count = 0
    """Choose among the k most likely tokens; 0: all."""
    top_p: PositiveFraction = 0.95
    """Choose among the most likely tokens that have this share of the probability in total."""
    seed: Seed = 0
    """Seed of the random choices: the same seed and checkpoint give the same text."""
    checkpoint: str | None = None
    """A checkpoint folder, or a folder of `stratum hf export --quantize`; by default the newest checkpoint of the run."""
    speculate: str | None = None
    """Guess tokens and check several at once: `lookup` (guess from the text itself), `mtp` (by the model's own further depths,
    `model.mtp`), or the run or checkpoint of a small model with the same tokenizer. It changes the speed, not the distribution
    of texts."""
    draft_tokens: DraftTokens | None = None
    """With --speculate: largest number of guesses at a time for one text; by default 4."""


@dataclass(frozen=True)
class EvaluateToolConfig:
    """Options of `stratum evaluate`."""

    tasks: str | None = None
    """Tasks, separated by commas: names (needle-4k, human-eval, reasoning/chain_sum) and task files (mine.yaml)."""
    heldout: Count = 0
    """Of a reward model: score so many held-out rows of each source of its data (accuracy, calibration, loss)."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, separated by commas; with --harness-folder. Needs the extra `evaluate`."""
    harness_folder: str | None = None
    """Folder with the harness's task files (YAML); by default the harness's own tasks, whose data is online."""
    items: PositiveInt | None = None
    """Score at most this many items of each task."""
    row_tokens: PositiveInt | None = None
    """Tokens of the longest row to score; by default the recipe's data.row_tokens. Long-context tasks use what they need."""
    batch_rows: PositiveInt = 8
    """Rows scored at once. It changes the memory, not the scores."""
    tensor: PositiveInt = 1
    """Processes that share a copy of the model (torchrun). Requests are dealt to the copies."""
    seed: Seed = 0
    """Seed of generated tasks: long contexts and reasoning."""
    out: str | None = None
    """Folder of results.json; by default evaluations/step_N in the run's folder."""
    resume: bool = False
    """Skip tasks that results.json already has with the same items and settings."""
    run_code: bool = False
    """Allow tasks that run model-written code (human-eval). It runs without network, in a temporary folder."""
    contamination: str | None = None
    """Instead of scoring a model, search this folder of prepared data for the tasks' texts, and name the documents."""
    tokenizer: str | None = None
    """The tokenizer's file, if the recipe's prepared data is not on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""


@dataclass(frozen=True)
class ServeConfig:
    """Options of `stratum serve`."""

    host: str = "127.0.0.1"
    """Address to listen on. The default can be reached from this machine only."""
    port: Port = 8000
    """Port to listen on; 0: a free port, which the first line of output shows."""
    name: str | None = None
    """Name of the model in the API; by default the run's name."""
    checkpoint: str | None = None
    """A checkpoint folder; by default the newest of the run."""
    rows: PositiveInt = 16
    """Requests that run at the same time. Further ones wait."""
    queue: Count = 64
    """Requests that may wait. Further ones are refused with status 429."""
    context_tokens: PositiveInt = 4096
    """Tokens of the longest text, prompt and answer together."""
    memory_gib: PositiveFloat | None = None
    """GiB for keys, values and states; by default enough for `rows` texts of `context_tokens`."""
    step_tokens: PositiveInt = 512
    """Largest number of tokens read at once. More let a new prompt delay the other requests longer."""
    prefix_blocks: Count = 256
    """Blocks of 128 prompt tokens to store for later prompts that begin with them; 0: none."""
    speculate: str | None = None
    """Guess tokens and check several at once: `lookup` (guess from the text itself), `mtp` (by the model's own further depths,
    `model.mtp`), or the run or checkpoint of a small model with the same tokenizer. It changes the speed, not the distribution
    of texts. A call may set `draft_tokens`; 0 turns it
    off."""
    draft_tokens: DraftTokens | None = None
    """With --speculate: largest number of guesses at a time for one text; by default 4."""
    body_mib: PositiveFloat = 4
    """Size limit of a request's body, in MiB."""
    key_file: str | None = None
    """A file with a key that clients must send as a bearer token."""
    chat_template: str | None = None
    """A Jinja file for chat completions, or a built-in template: chatml, gemma2, nemotron_nano_v2, turns, or `plain` for a model
    that was not trained on chats."""
    think_start: str | None = None
    """The marker at which thinking starts, such as <think>. Calls may then set `thinking_budget`."""
    think_end: str | None = None
    """The marker at which thinking ends, such as </think>."""
    drain_s: Count = 60
    """Seconds after SIGTERM for open requests to end."""


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Options of `stratum teacher-cache`."""

    values: Literal["float16", "float32"] = "float32"
    """Format of the cached log-probabilities."""
    block_rows: PositiveInt = 64
    """Rows written as one file."""
    student: str | None = None
    """A checkpoint or run, to measure with it what is lost by storing fewer tokens."""


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `stratum prepare`."""

    task: str | None = None
    """Do one part of an array job: K/N, plan or merge (see below); by default, everything that is not finished."""


@dataclass(frozen=True)
class InspectConfig:
    """Options of `stratum inspect`."""

    samples: Annotated[int, Range(ge=0, le=1000)] = 2
    """Number of documents of each source whose beginning is shown."""
    chars: Annotated[int, Range(ge=0, le=100_000)] = 240
    """Number of characters shown of each."""
    picture: str | None = None
    """File of the histogram; by default lengths.png in the data's folder."""
    verify: bool = False
    """First read every file and compare it with its checksum."""


@dataclass(frozen=True)
class TraceConfig:
    """Options of `stratum trace`."""

    step: PositiveInt | None = None
    """Show the documents that this step saw."""
    rows: PositiveInt | None = None
    """Show only this many rows of it, from the first on; by default all."""
    file: str | None = None
    """Show when documents of this file were seen. Give its name, or the end of its name."""
    record: Count | None = None
    """Only this record of the file: line or row, from 0."""
    source: str | None = None
    """Show when a document of this source was seen; with --document."""
    document: Count | None = None
    """Number of the document in the source's training stream, from 0."""
    chars: Count = 200
    """Characters of text shown of each document; 0: none."""
    json: bool = False
    """Print one JSON object per line instead of text."""


@dataclass(frozen=True)
class ReplayConfig:
    """Options of `stratum replay`."""

    step: PositiveInt | None = None
    """The step to compute again, counted from 1 as in metrics.jsonl."""
    against: str | None = None
    """What to compare with: another run (its folder or name), or a file of --out. By default the step is computed twice."""
    out: str | None = None
    """File for the statistics (JSON), to compare with on another machine."""


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
    ema: bool = False
    """Of one run: write the moving average of its weights (optim.ema_decay) that its newest checkpoint has."""
    adapters: bool = False
    """Of one run: add its adapters (model.lora) to the weights, for a model without adapters that computes the same. With --ema,
    the moving average of the adapters."""
    weights: str = "equal"
    """Of a window: equal; linear, cosine or minus_sqrt, which emulate this decay of the learning rate; or numbers separated
    by commas, which must sum to 1."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end of the emulated decay, as a fraction of that at its start."""
    evaluate: str | None = None
    """How a sweep is scored: `heldout` (bits per byte of the recipe's held-out data, of reward models the loss of pairs) or tasks
    of `stratum evaluate`, whose mean score counts."""
    rows: PositiveInt = 64
    """Held-out rows of each source."""
    items: PositiveInt | None = None
    """Ask at most so many items of each task."""
    seed: Seed = 0
    """Seed of tasks that are made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is evaluated."""


@dataclass(frozen=True)
class PreferencesConfig:
    """Options of `stratum preferences`."""

    prompts: str | None = None
    """Prompts: jsonl files as `objective.grpo.prompts` takes them, each record with a verifier."""
    out: str | None = None
    """The file of preferences to write, for a source of kind preference."""
    samples: SampleCount = 8
    """Answers to each prompt: the best and the worst become a record."""
    tokens: PositiveInt = 256
    """Longest answer. Answers that are cut off belong to no record."""
    temperature: Temperature = 1.0
    """Divides the logits when answers are drawn."""
    top_p: PositiveFraction = 1.0
    """Draw only from the most likely tokens that together have this probability."""
    min_gap: PositiveFloat = 1e-6
    """Smallest difference between the rewards of the best and the worst answer; prompts below it are left out."""
    seed: Seed = 0
    """Seed of the answers: with the same seed and checkpoint, the same records."""
    batch: PositiveInt = 64
    """Answers generated at a time."""
    checkpoint: str | None = None
    """A checkpoint folder; by default the newest checkpoint of the run."""
    allow_functions: str = ""
    """Reward functions of your own that prompts may name (`module:function`), separated by commas. They run with your rights."""
