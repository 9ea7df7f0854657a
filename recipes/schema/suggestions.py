"""Suggestions for mistyped words."""

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice with the most similar spelling; None if none is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(word: str, choices: Iterable[str], *, otherwise: str) -> str:
    """`Did you mean X?`, or `otherwise` if no choice is close."""
    near = nearest(word, choices)
    return f"Did you mean {near}?" if near else otherwise
