"""Titles, units and scales of charts of what objectives and tasks report under short names."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Title:
    """How a chart of a recorded number is headed."""

    text: str
    unit: str = ""
    times: float = 1.0
    """Factor from the recorded number to the unit: 100 for a share that is shown in percent."""


_PARTS = {
    "z_loss": Title("Z-loss (weighted)", "nats"),
    # distillation
    "divergence": Title("Divergence from the teacher", "nats"),
    "next_token": Title("Loss of the next token", "nats"),
    "hidden": Title("Distance of hidden states to the teacher's"),
    # preferences and reward models
    "preference": Title("Preference loss of pairs", "nats"),
    "sft": Title("Loss of the better answers' tokens", "nats"),
    "chosen_reward": Title("Reward of the better answers, mean"),
    "rejected_reward": Title("Reward of the worse answers, mean"),
    "margin": Title("Reward of the better minus the worse answer"),
    "accuracy": Title("Pairs in the right order", "%", 100),
    # policies
    "kl": Title("KL divergence from the reference model", "nats per token"),
    "clipped_low": Title("Tokens clipped because they became less likely", "%", 100),
    "clipped_high": Title("Tokens clipped because they became more likely", "%", 100),
    "capped": Title("Tokens with a capped importance weight", "%", 100),
}
"""Parts of losses: `PARTS` of the objectives."""

_METRICS = {
    "accuracy": Title("Accuracy", "%", 100),
    "accuracy_per_byte": Title("Accuracy by probability per byte", "%", 100),
    "calibration_error": Title("Calibration error of held-out pairs"),
    "bits_per_byte": Title("Expected texts of tasks", "bits per byte"),
    "score": Title("Score of written answers", "0 to 1"),
    "loss": Title("Loss of held-out pairs", "nats"),
    "tokens_per_pass": Title("Tokens per pass of the model, by guesses of its further depths"),
}


def title_of_part(name: str) -> Title:
    """Of a part of the loss."""
    if found := re.fullmatch(r"mtp_(\d+)(_right)?", name):
        ahead = int(found[1]) + 1
        return (
            Title(f"Right guesses of token {ahead} ahead", "%", 100)
            if found[2]
            else Title(f"Loss of token {ahead} ahead", "nats")
        )
    return _PARTS.get(name) or _plain(name)


def title_of_metric(name: str) -> Title:
    """Of a metric of a task."""
    if found := re.fullmatch(r"accepted_(\d+)", name):
        guesses = "guesses of the first further depth" if found[1] == "1" else f"guesses of all depths up to {found[1]}"
        return Title(f"Accepted {guesses}", "%", 100)
    return _METRICS.get(name) or _plain(name)


def _plain(name: str) -> Title:
    text = name.replace("_", " ")
    return Title(text[:1].upper() + text[1:])
