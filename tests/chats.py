"""Chats, a tokenizer with the tokens of several chat templates, and templates as their authors published them."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, train_tokenizer
from recipes.schema.data import TokenizerConfig

SPECIAL = {
    "<|im_start|>": 1, "<|im_end|>": 2, "<bos>": 3, "<start_of_turn>": 4, "<end_of_turn>": 5,
    "<SPECIAL_10>": 6, "<SPECIAL_11>": 7, "<SPECIAL_12>": 8,
}  # fmt: skip
_TEXTS = [
    "user assistant model system tool question answer " * 4,
    "What is two plus three? It is five. And twice that? Ten, because 2 * 5 = 10.\n\n" * 4,
    'The quick brown fox jumps over the lazy dog: {"name": "add", "arguments": {"a": 1}} éàü 日本 🎉\n' * 4,
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""teknium/OpenHermes-2.5-Mistral-7B, tokenizer_config.json."""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
"""google/gemma-2-2b-it, tokenizer_config.json."""


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


PLAIN = [user("What is two plus three?"), assistant("It is five. 🎉")]
TURNS = [*PLAIN, user("And twice that?"), assistant("  Ten,\nbecause 2 * 5 = 10.\n")]
SYSTEM = [{"role": "system", "content": "You answer briefly. /think"}, *TURNS]


@functools.cache
def tokenizer(begin: str | None = None) -> Tokenizer:
    """A byte-level BPE of 400 tokens with the special tokens of the templates."""
    config = TokenizerConfig(vocab_size=400, special_tokens=SPECIAL, begin_of_document=begin)
    return train_tokenizer(_TEXTS, config)


@functools.cache
def tokenizer_file() -> Path:
    """Its file, for as long as the tests run."""
    folder = tempfile.mkdtemp(prefix="stratum-test-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "tokenizer.json"
    tokenizer().save(path)
    return path


def write_chats(path: Path, chats: Sequence[Sequence[dict[str, Any]]]) -> Path:
    """A jsonl file of chats."""
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path
