"""The check that sampler and trainer agree: |log p (sampler) - log p (trainer)| of every token of a batch of answers.

The trainer's log p comes from the forward pass of the update itself if a batch is learned from once and at once, otherwise from
a pass of its own. Either way it is checked before the weights change.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from recipes.schema.errors import NumericsError
from recipes.schema.recipe import Recipe
from train.parallel.mesh import Mesh
from train.record.telemetry import Telemetry


@dataclass(frozen=True)
class GapCheck:
    """Compares the answers of one batch, and records the batch."""

    recipe: Recipe
    mesh: Mesh
    telemetry: Telemetry
    step: int
    """The step that learns from the batch first, counted from 1."""
    positions: np.ndarray
    """int64 [prompts]"""
    drawn: list[np.ndarray]
    """float32 [tokens] of each answer: log p by the sampler at temperature 1."""
    event: dict[str, Any]
    """What else is recorded about the batch (`docs/align.md` lists the fields)."""
    found: dict[int, np.ndarray] = field(default_factory=dict)
    """log p by the trainer of this rank's answers, by number."""

    def add(self, numbers: list[int], log_probs_BT: torch.Tensor) -> None:
        """Note the trainer's log p at temperature 1 of some answers. Values after the end of an answer are not read."""
        for number, line in zip(numbers, log_probs_BT.detach().float().cpu().numpy(), strict=True):
            self.found[number] = line[: len(self.drawn[number])].copy()

    def finish(self) -> None:
        """Compare and record everything. NumericsError on every rank if a gap is too large. Collective over the world."""
        self.record(gathered(self.mesh, self.found))

    def record(self, ours: list[np.ndarray]) -> None:
        """As `finish`, with the trainer's log p of all answers, which every rank has."""
        gaps = self._gaps(ours)
        entropy = -float(np.concatenate(ours).mean(dtype=np.float64))
        self.telemetry.event("rollouts", step=self.step, **self.event, entropy=entropy, log_prob_gap=gaps)

    def _gaps(self, ours: list[np.ndarray]) -> dict[str, float]:
        """The largest and the mean gap."""
        config, precision = self.recipe.objective.grpo, self.recipe.precision
        is_fp32 = precision.params == "fp32" and precision.scaling == "none"
        most = config.log_prob_gap or (1e-5 if is_fp32 else 1.0)
        most_mean = config.mean_log_prob_gap or (1e-6 if is_fp32 else 0.05)
        gaps = [np.abs(a - b) for a, b in zip(self.drawn, ours, strict=True)]
        worst = max(range(len(gaps)), key=lambda number: float(gaps[number].max()))
        token = int(gaps[worst].argmax())
        found = {"max": float(gaps[worst][token]), "mean": float(np.concatenate(gaps).mean(dtype=np.float64))}
        if found["max"] <= most and found["mean"] <= most_mean:
            return found
        group, number = divmod(worst, config.generations_per_prompt)
        raise NumericsError(
            f"step {self.step:,}: the sampler and the trainer disagree about answer {number} to the prompt at position "
            f"{int(self.positions[group]):,}: log p of token {token} is {float(self.drawn[worst][token]):.7f} and "
            f"{float(ours[worst][token]):.7f}. Gap: {found['max']:.2e} (at most {most:.0e}), mean {found['mean']:.2e} (at most "
            f"{most_mean:.0e}). If it is rounding of a large model, raise objective.grpo.log_prob_gap and mean_log_prob_gap."
        )


def gathered(mesh: Mesh, mine: dict[int, np.ndarray]) -> list[np.ndarray]:
    """The arrays of all ranks in the order of their numbers, on every rank. Collective over the world."""
    is_first = mesh.groups.tp.rank() == 0  # tensor ranks have equal numbers
    everyone: dict[int, np.ndarray] = {}
    for some in mesh.gather_objects(mine if is_first else {}):
        everyone |= some
    return [everyone[number] for number in range(len(everyone))]
