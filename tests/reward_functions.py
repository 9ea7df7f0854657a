"""Reward functions for tests, as a user would write them: `tests.reward_functions:NAME`. They run in a verifier's process."""

import os
import time
from typing import Any


def digit_share(prompt: str, answer: str, facts: dict[str, Any]) -> float:
    """Share of the answer's characters that are digits."""
    return sum(character.isdigit() for character in answer) / max(1, len(answer))


def random_reward(prompt: str, answer: str, facts: dict[str, Any]) -> float:
    """Another number at every call."""
    return int.from_bytes(os.urandom(6), "little") / 2**48


def fails(prompt: str, answer: str, facts: dict[str, Any]) -> float:
    """By the fact `how`: raises, hangs, gives NaN, or gives a number."""
    match facts.get("how"):
        case "raise":
            raise ValueError("no reward")
        case "hang":
            time.sleep(60)
        case "nan":
            return float("nan")
    return digit_share(prompt, answer, facts)
