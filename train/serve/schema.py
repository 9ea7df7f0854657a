"""The request bodies of OpenAI's API that this server supports (https://platform.openai.com/docs/api-reference).

An unsupported field is refused by name, not ignored: otherwise a client that requests a tool or a penalty would believe that the
answer used it. Fields that only label a call (`user`, `metadata`, `store`) have no effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=0)]
Id = Annotated[int, Field(ge=0, strict=True)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]
Nothing = Literal[None, 0]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool = False


class _Call(_Body):
    """Fields of both kinds of call."""

    model: str
    temperature: Temperature = 1.0
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Not part of OpenAI's API: only the k most likely tokens; 0: all."""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63 - 128)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    """Not part of OpenAI's API: number of thinking tokens after which the end marker is written."""
    draft_tokens: Annotated[int, Field(ge=0)] | None = None
    """Not part of OpenAI's API: largest number of guesses at a time, of a server with --speculate; 0: none."""
    ignore_eos: bool = False
    """Not part of OpenAI's API: do not stop at the end-of-text token."""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # These are accepted only with values that have no effect:
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionCall(_Call):
    """POST /v1/completions."""

    prompt: str | list[Id] | list[str] | list[list[Id]]
    max_tokens: Tokens | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[None, 1] = None
    suffix: None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Annotated[str, Field(pattern="^[a-z_]{1,20}$")]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Body):
    type: Literal["text"]


class ChatCall(_Call):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
