"""Prompts for reinforcement learning: chats that the model answers, each with a verifier of its answers.

    {"messages": [...], "verifier": {"kind": "number"}, "target": "7"} --prompt_of--> one line of JSON --> Prompt
    PromptSet.at(position) --> Prompt, rendered with the generation prompt: token ids

`prompt` (text) may take the place of `messages`: it becomes a message of the user. `tools` are the functions that the answer may
call. All other fields of a record, and those of a mapping `facts`, are the facts that the verifier gets. The prompt at a position
is a pure function of the seed and the position: each pass over the records has an order of its own.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.chat.record import check_order, checked_messages
from data.chat.template import ChatError, open_template, template_source
from data.order.permutation import RowOrder
from data.sources.files import find_files, plain_suffix
from data.sources.records import Part, read_part
from data.system.closing import Closing
from data.tokenizer import Tokenizer
from recipes.schema.credentials import without_credentials
from recipes.schema.data import DataConfig, SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable

FIELD = "objective.grpo.prompts"
_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
_OWN = ("messages", "prompt", "tools", "verifier", "facts")
_ANSWER = {"role": "assistant", "content": "answer"}


@dataclass(frozen=True)
class Prompt:
    """A chat up to where the model answers, and what its verifier needs."""

    messages: list[dict[str, Any]]
    tools: Any
    verifier: dict[str, Any] | None
    """A mapping such as {"kind": "number"}; `train.align.verify` reads it. None: the record has none."""
    facts: dict[str, Any]
    place: str
    """File and line, for messages."""

    @property
    def text(self) -> str:
        """The last message, as verifiers and people see the prompt."""
        return str(self.messages[-1]["content"])


def prompt_of(record: Any) -> str:
    """The prompt in a record as a line of JSON. ValueError says what is wrong with it."""
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(record).__name__}, not a record of a prompt")
    if ("messages" in record) == ("prompt" in record):
        raise ValueError(
            f"needs either messages or a text under 'prompt' (it has: {', '.join(map(str, record)) or 'nothing'})"
        )
    messages = record.get("messages")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise ValueError("has no text under 'prompt'")
        messages = [{"role": "user", "content": record["prompt"]}]
    checked = checked_messages(messages)
    if checked[-1]["role"] == "assistant":
        raise ValueError("ends with an answer: a prompt ends where the model answers")
    check_order([*checked, _ANSWER])
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("has tools that are not a list of objects")
    verifier, facts = record.get("verifier"), record.get("facts", {})
    if verifier is not None and not isinstance(verifier, dict):
        raise ValueError('has no mapping under \'verifier\', such as {"kind": "number"}')
    if not isinstance(facts, dict):
        raise ValueError("has facts that are not a mapping")
    others = {str(name): value for name, value in record.items() if name not in _OWN}
    if twice := sorted(others.keys() & facts.keys()):
        raise ValueError(f"has {twice[0]!r} both as a field and among its facts")
    plain = {"messages": checked, "tools": tools or None, "verifier": verifier, "facts": others | facts}
    try:
        return json.dumps(plain, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def read_prompts(paths: Sequence[str]) -> tuple[list[Prompt], str]:
    """(all prompts, digest of their content), in the order of the files. DataError names file and line of a bad record."""
    prompts, digest = [], hashlib.sha256()
    for name, number, line in _lines(paths):
        plain = json.loads(line)
        digest.update(line.encode() + b"\n")
        prompts.append(Prompt(**plain, place=f"{without_credentials(name)} line {number}"))
    if not prompts:
        raise DataError(f"{FIELD}={', '.join(map(without_credentials, paths))}: no prompts there.")
    return prompts, digest.hexdigest()


def _lines(paths: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """(file, line number, prompt) of every record."""
    for path in paths:
        source = SourceConfig(path=path, kind="chat")
        for file in find_files(FIELD, path):
            if plain_suffix(file.name) not in _SUFFIXES:
                raise DataError(
                    f"{without_credentials(file.name)} ({FIELD}) is not jsonl. Name files that end in .jsonl."
                )
            part = Part(file=file.name, kind="jsonl", size=file.size, file_size=file.size)
            for record in read_part(FIELD, source, part, extract=prompt_of):
                if record.problem is not None:
                    place = f"{without_credentials(file.name)} line {record.number + 1} ({FIELD})"
                    raise DataError(f"{place} {printable(record.problem, most=400)}. Correct or remove it.")
                if record.text:
                    yield file.name, record.number + 1, record.text


class PromptSet(Closing):
    """Prompts in the order in which a run draws them, as token ids. Use it as a context manager: it has a process."""

    def __init__(
        self,
        config: DataConfig,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        *,
        answer: str,
        most_tokens: int,
        checks: bool = False,
    ) -> None:
        """answer: the option with the length of answers, for messages. most_tokens: of a prompt. checks: render all
        prompts now, so that the first bad one is reported now. DataError."""
        self.tokenizer = tokenizer
        self.prompts, self._digest = read_prompts(paths)
        self._config, self._answer, self._most_tokens = config, answer, most_tokens
        self._order = RowOrder(len(self.prompts), key=config.seed)
        self._template = open_template(config.chat.template, tokenizer)
        self._ids: dict[int, list[int]] = {}
        if checks:
            for index in range(len(self.prompts)):
                self.ids(index)

    def close(self) -> None:
        """End the process that renders the template."""
        self._template.close()

    @property
    def manifest_hash(self) -> str:
        """Identity of the prompts, of how they are rendered, and of the tokenizer: what positions refer to."""
        template = template_source(self._config.chat.template)
        parts = [self._digest, template, self.tokenizer.fingerprint]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return self.tokenizer.vocab_size

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset({self.tokenizer.eod}) | self._template.stop_ids

    def index_at(self, position: int) -> int:
        """Number of the record at a position of the run."""
        passes, place = divmod(position, len(self.prompts))
        return int(self._order.rows_at(_one(place), _one(passes))[0])

    def at(self, position: int) -> Prompt:
        """The prompt at a position of the run."""
        return self.prompts[self.index_at(position)]

    def ids(self, index: int) -> list[int]:
        """Token ids of a record's prompt, up to where the model answers. DataError names file and line."""
        if index not in self._ids:
            prompt = self.prompts[index]
            try:
                ids = self._template.ids(prompt.messages, tools=prompt.tools, has_date=False)
            except ChatError as error:
                raise DataError(f"{prompt.place}: {error}.") from error
            if len(ids) > self._most_tokens:
                raise DataError(
                    f"{prompt.place}: the prompt has {len(ids):,} tokens, and with {self._answer} only "
                    f"{max(0, self._most_tokens):,} fit into data.row_tokens={self._config.row_tokens:,}. Use shorter answers or "
                    f"longer rows, or remove the prompt."
                )
            self._ids[index] = ids
        return self._ids[index]


def _one(number: int) -> np.ndarray:
    return np.array([number], dtype=np.int64)
