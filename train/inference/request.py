"""Input (`Request`) and output (`Event`) of the inference engine.

    Request --InferenceEngine.add--> id;   InferenceEngine.step --> [Event(id, token, log-probability, finish), ...]

The engine handles token ids only: callers handle text, stop strings and chat templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why a request ended: a stop token; its `max_new_tokens`; `cancel`; logits that are not finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled from the model's distribution. The draws depend only on the seed and on the number of
    the token in its request, not on other requests of the batch."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0


@dataclass(frozen=True)
class Thinking:
    """A budget for the tokens between two markers (Nemotron Nano 2, arXiv 2508.14444, section 3.4): after `budget` thinking
    tokens, the end marker is written after the next line break, at the latest after `budget + grace` tokens."""

    budget: int
    start: tuple[int, ...]
    """Ids of the marker that starts thinking, such as `<think>`. A prompt that ends between the markers starts in thinking."""
    end: tuple[int, ...]
    """Ids of the marker that ends it, such as `</think>`."""
    newlines: frozenset[int]
    """Ids of the tokens that end a line."""
    grace: int = 500


@dataclass(frozen=True)
class Request:
    """One text to continue, or to score."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    """Largest number of tokens to generate; 0 only scores the prompt (`score_from`)."""
    sampling: Sampling = Sampling()
    stop: frozenset[int] = frozenset()
    """Ids that end the request. The stop token is part of the output."""
    top_logprobs: int = 0
    """How many of the most likely tokens are reported with each token."""
    score_from: int | None = None
    """Report the log-probabilities of the prompt's tokens from this index on (at least 1), in separate events before those
    of generated tokens."""
    thinking: Thinking | None = None
    draft_tokens: int | None = None
    """Guesses of the engine's drafter at a time at most; 0: none; None: as many as the engine makes."""
    priority: int = 0
    """Higher priorities are served first. If memory is short, the running request of the lowest priority waits again."""


@dataclass(frozen=True)
class Token:
    """One token with the model's log-probability for it, at temperature 1."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the most likely tokens, most likely first."""
    is_likeliest: bool = False
    """Whether greedy decoding would take this token."""
    is_forced: bool = False
    """Whether the thinking budget chose the token instead of sampling."""
    is_guessed: bool = False
    """Whether a drafter had guessed the token."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a request: a token, scores of its prompt, or its end."""

    request: int
    token: Token | None = None
    """A generated token; None if the event only ends the request or scores its prompt."""
    finish: Finish | None = None
    """Set in the last event of a request."""
    scores: tuple[Token, ...] = ()
    """Scored tokens of the prompt, in order, from `score_from` on. A long prompt is scored by several events."""
    guesses: int | None = None
    """Number of guesses that were checked in the token's step; set on the first token that a step gives, otherwise None."""
    message: str = ""
    """The reason, if `finish` is `error`."""
