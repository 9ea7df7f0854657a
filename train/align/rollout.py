"""Draws answers to prompts from the model that trains: its own weights, in the same process, at the layout of training.

    positions of prompts --InferenceEngine on the live model--> groups of answers with the log p of each token

The random numbers of an answer are a function of (run.seed, position of the prompt, number of the answer): neither the number of
ranks nor the other answers of a batch matter. The engine's memory is allocated for a batch and released after it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.chat.prompts import PromptSet
from recipes.schema.align import GrpoConfig
from recipes.schema.errors import NumericsError
from recipes.schema.model import ModelConfig
from train.evaluate.deal import evaluating
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Event, Request, Sampling


@dataclass(frozen=True)
class Answer:
    """An answer as tokens."""

    tokens: np.ndarray
    """int64 [tokens], with the token that ended it; at least one."""
    log_probs: np.ndarray
    """float32 [tokens]: of the model's distribution at temperature 1, as the engine reports them."""
    ended: bool
    """False: it was cut off at `max_answer_tokens`."""


def draw_answers(
    model: Any, shape: ModelConfig, prompts: PromptSet, positions: Sequence[int], *, config: GrpoConfig, seed: int
) -> list[list[Answer]]:
    """A group of answers to the prompt at each position. Collective over the tensor group.

    model: unwrapped, with weights that are up to date. Raises DataError for a prompt that cannot be rendered, NumericsError if
    logits are not finite.
    """
    if not positions:
        return []
    count, stop = config.generations_per_prompt, prompts.stop_ids
    requests = [
        Request(
            prompts.ids(prompts.index_at(position)),
            config.max_answer_tokens,
            sampling=Sampling(config.temperature, top_p=config.top_p, seed=answer_seed(seed, position, number)),
            stop=stop,
        )
        for position in positions
        for number in range(count)
    ]
    longest = max(len(request.prompt) for request in requests) + config.max_answer_tokens
    rows = min(config.generation_rows, len(requests))
    with evaluating([model]):
        events = InferenceEngine(model, shape, EngineConfig(rows=rows, context_tokens=longest, is_stepwise=True)).run(
            requests
        )
    answers = [_answer(found, positions[number // count], number % count) for number, found in enumerate(events)]
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def answer_seed(seed: int, position: int, number: int) -> int:
    """Seed of one answer's random numbers (BLAKE2b, RFC 7693)."""
    digest = hashlib.blake2b(f"{seed} {position} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _answer(events: list[Event], position: int, number: int) -> Answer:
    last = events[-1]
    if last.finish == "error":
        raise NumericsError(
            f"answer {number} to the prompt at position {position:,}: {last.message}. Use an earlier "
            f"checkpoint; training goes on from there with a lower optim.lr or objective.grpo.kl_weight."
        )
    tokens = [event.token for event in events if event.token is not None]
    return Answer(
        tokens=np.array([token.id for token in tokens], dtype=np.int64),
        log_probs=np.array([token.logprob for token in tokens], dtype=np.float32),
        ended=last.finish == "stop",
    )
