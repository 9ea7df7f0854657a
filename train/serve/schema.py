"""The request bodies of OpenAI's API that this server supports (https://platform.openai.com/docs/api-reference).

An unsupported field is refused by name, not ignored: otherwise a client that requests a tool or a penalty would believe that the
answer used it. Fields that only label a call (`user`, `metadata`, `store`) have no effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Numbers and flags are strict: "4" and true are not numbers, 1 is not a flag.
Temperature = Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)]
Probability = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Logprobs = Annotated[int, Field(strict=True, ge=0, le=20)]
Flag = Annotated[bool, Field(strict=True)]
Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]
_FAIL_FAST = Field(fail_fast=True)
"""Only the first error of a list is wanted: a list may have a million wrong entries."""
_MOST_ENTRIES = 10_000
"""Prompts, messages, or parts of a message: to check a million of them would stop other clients for a second."""
_ENTRIES = Field(max_length=_MOST_ENTRIES, fail_fast=True)
Ids = Annotated[list[Count], _FAIL_FAST]
_MOST_FIELDS = 100
"""Of one object. A body may have a million unknown ones, and each would become an error message."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"an object here has {len(value):,} fields, more than the {_MOST_FIELDS} that are read")
        return value


class StreamOptions(_Body):
    include_usage: Flag = False


class _Call(_Body):
    """Fields of both kinds of call."""

    model: str
    temperature: Temperature = 1.0
    top_p: Probability = 1.0
    top_k: Count = 0
    """Not part of OpenAI's API: only the k most likely tokens; 0: all."""
    n: Annotated[int, Field(strict=True, ge=1, le=128)] = 1
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63 - 128)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    thinking_budget: Count | None = None
    """Not part of OpenAI's API: number of thinking tokens after which the end marker is written."""
    draft_tokens: Count | None = None
    """Not part of OpenAI's API: largest number of guesses at a time, of a server with --speculate; 0: none."""
    ignore_eos: Flag = False
    """Not part of OpenAI's API: do not stop at the end-of-text token."""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Flag | None = None
    # These are accepted only with values that have no effect:
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionCall(_Call):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], _ENTRIES] | Annotated[list[Ids], _ENTRIES]
    max_tokens: Count | None = 16
    echo: Flag = False
    logprobs: Logprobs | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    suffix: None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Annotated[str, Field(pattern="^[a-z_]{1,20}$")]
    content: str | Annotated[list[TextPart], _ENTRIES]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Body):
    type: Literal["text"]


class ChatCall(_Call):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_ENTRIES, fail_fast=True)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: Flag = False
    top_logprobs: Logprobs | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
