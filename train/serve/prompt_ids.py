"""From prompts and chats to token ids, without delaying other clients.

    text --too long for the context?--> a thread: [chat template], tokenizer --> ids

Encoding a text of some MB takes seconds. So the number of its bytes is checked first, and a thread encodes it: the libraries
of tokenizers release the interpreter lock, and a chat template runs in a process of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.chat.template import ChatTemplate
from data.tokenizer import Tokenizer
from train.serve.refusal import ServerRefusal

_LONG_BYTES = 1 << 16
"""Longer texts are encoded one at a time, so that shorter ones always find a thread."""


class PromptEncoder:
    """Encodes prompts in threads. For one event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        context_tokens: int,
        *,
        placeholders: Sequence[str] = (),
    ) -> None:
        """placeholders: special tokens that stand for media in training. The server reads text only, so prompts have none."""
        self._tokenizer, self._template, self._context_tokens = tokenizer, template, context_tokens
        self._placeholders = placeholders
        self._most_bytes = context_tokens * tokenizer.most_bytes_per_token
        self._long = asyncio.Lock()

    async def prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The ids of prompts that are texts or ids. ServerRefusal if one is too long, DataError if one cannot be encoded."""
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_bytes([prompt], "the prompt", param="prompt")
            else:
                self._check_tokens(prompt, param="prompt")
            for name in self._placeholders:
                if name in prompt if isinstance(prompt, str) else self._tokenizer.special.get(name) in prompt:
                    text = (
                        f"the prompt contains {name!r}, which stands for media. This server reads text only: remove it."
                    )
                    raise ServerRefusal(400, text, param="prompt")
        return [await self._prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def _prompt(self, text: str) -> list[int]:
        ids = await self._in_thread(len(text), lambda: self._tokenizer.prompt(text))
        self._check_tokens(ids, param="prompt")
        return ids

    async def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a chat. ServerRefusal if it is too long or there is no template, ChatError if the template refuses it."""
        template = self._template
        if template is None:
            raise ServerRefusal(
                400,
                "this model has no chat template. Start the server with --chat-template FILE (Jinja) or --chat-template plain, "
                "or use /v1/completions.",
            )
        texts = [message["content"] for message in messages]
        self._check_bytes(texts, "the chat", param="messages")

        def encode() -> list[int]:
            # As `template.ids`, with a check in the middle: a template may make a text longer.
            template.refuse_special(messages)
            text = template.render(messages, add_generation_prompt=True, date=time.time()).text
            self._check_bytes([text], "the chat", param="messages")
            return template.encode(text, ()).ids.tolist()

        ids = await self._in_thread(sum(map(len, texts)), encode)
        self._check_tokens(ids, param="messages")
        return ids

    async def _in_thread(self, size: int, encode: Callable[[], list[int]]) -> list[int]:
        async with self._long if size > _LONG_BYTES else contextlib.nullcontext():
            return await asyncio.to_thread(encode)

    def _check_bytes(self, texts: Sequence[str], what: str, *, param: str) -> None:
        size = sum(len(text.encode()) for text in texts)
        if size > self._most_bytes:
            raise ServerRefusal(
                400,
                f"{what} has {size:,} bytes. A text of {self._context_tokens:,} tokens, the longest here, has at most "
                f"{self._most_bytes:,}. Shorten the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def _check_tokens(self, ids: Sequence[int], *, param: str) -> None:
        if len(ids) > self._context_tokens:
            raise too_long(len(ids), self._context_tokens, param=param)


def too_long(tokens: int, context_tokens: int, *, param: str) -> ServerRefusal:
    """The refusal of a prompt that leaves no room for an answer."""
    return ServerRefusal(
        400,
        f"the prompt has {tokens:,} tokens; prompt and answer together have at most {context_tokens:,} here. "
        f"Shorten the {param}.",
        param=param,
        code="context_length_exceeded",
    )
