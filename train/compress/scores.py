"""Scores of a model's parts, measured before pruning, and the selection of the best parts by score.

    hidden     score of each residual channel, over all norms
    layers     by layer: scores of `ffn` neurons | `heads` query heads | `mamba` (head, channel) pairs
    energy     by norm: mean square of each channel of its input, to correct the norm's weight after channels are removed
    influence  by layer: block influence, 1 - cos(input, output)
    removals   depth: one entry per removed layer, in order, with the effect of removing each candidate

A folder contains scores.json (for people) and scores.npz (all numbers).
"""

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.system import disk
from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import read_json
from recipes.schema.model import ModelConfig
from recipes.schema.typed import build

FORMAT = 1
SCORES = "scores.json"
"""Written last: a folder without this file has no scores."""


@dataclass(frozen=True)
class Candidate:
    """The model without some layers, compared with the full model on the calibration rows."""

    layer: int
    logit_error: float
    """sum (logits - full model's logits)^2 / sum (full model's logits)^2."""
    loss_increase: float
    """Next-token loss minus the full model's, nats per token."""


@dataclass(frozen=True)
class Removal:
    """One round of depth scoring: the effect of each candidate, given the layers removed before, and the layer removed."""

    layer: int
    candidates: list[Candidate]


@dataclass
class Scores:
    """See the module docstring. All arrays are float64."""

    model: dict[str, Any]
    """The scored model's shape."""
    parent: str
    rows: int
    depth_rows: int = 0
    depth_metric: str = ""
    hidden: np.ndarray = field(default_factory=lambda: np.zeros(0))
    layers: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    energy: dict[str, np.ndarray] = field(default_factory=dict)
    influence: np.ndarray = field(default_factory=lambda: np.zeros(0))
    removals: list[Removal] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    """Settings, weights and data that the scores were measured with. Equal requests are not measured again."""

    def save(self, folder: Path) -> None:
        """Write both files, scores.json last: after a kill at any moment the folder has the old scores, none, or these."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SCORES).unlink(missing_ok=True)
        arrays: dict[str, Any] = {"hidden": self.hidden, "influence": self.influence}
        arrays |= {f"layers/{n}/{kind}": x for n, kinds in self.layers.items() for kind, x in kinds.items()}
        arrays |= {f"energy/{site}": x for site, x in self.energy.items()}
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        (folder / "scores.npz").write_bytes(packed.getvalue())
        about = {
            "format": FORMAT,
            "parent": self.parent,
            "request": self.request,
            "model": self.model,
            "rows": self.rows,
            "depth_rows": self.depth_rows,
            "depth_metric": self.depth_metric,
            "influence": [float(f"{value:.6g}") for value in self.influence],
            "removals": [asdict(removal) for removal in self.removals],
        }
        disk.write_text(folder / SCORES, json.dumps(about, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Read both files. CheckpointError if they are missing or damaged."""
        try:
            about = read_json(folder / SCORES, most_bytes=1 << 30)
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}; this version reads {FORMAT}")
            with np.load(folder / "scores.npz", allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            scores = cls(
                model=about["model"],
                parent=about["parent"],
                request=about.get("request", {}),
                rows=about["rows"],
                depth_rows=about["depth_rows"],
                depth_metric=about["depth_metric"],
                hidden=arrays.pop("hidden"),
                influence=arrays.pop("influence"),
                removals=[Removal(r["layer"], [Candidate(**c) for c in r["candidates"]]) for r in about["removals"]],
            )
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} has no scores: {Path(error.filename).name} is missing. Measure them: stratum compress "
                f"score with this recipe."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"the scores in {folder} cannot be read ({error}). Delete {folder}/{SCORES} and measure them again: stratum "
                f"compress score with this recipe."
            ) from error
        for name, array in arrays.items():
            what, *rest = name.split("/")
            if what == "energy":
                scores.energy[rest[0]] = array
            else:
                scores.layers.setdefault(int(rest[0]), {})[rest[1]] = array
        return scores


def best(values: np.ndarray, keep: int) -> np.ndarray:
    """Indices of the `keep` largest values, ascending. Among equal values the first wins."""
    order = np.argsort(-values, kind="stable")[:keep]
    return np.sort(order)


def best_in_groups(values: np.ndarray, keep: int, groups: int) -> np.ndarray:
    """Like `best`, with an equal number from each of `groups` contiguous groups."""
    assert len(values) % groups == 0 and keep % groups == 0, f"{keep} of {len(values)} do not divide by {groups} groups"
    size = len(values) // groups
    return np.concatenate([g * size + best(values[g * size : (g + 1) * size], keep // groups) for g in range(groups)])


def best_mamba(scores: np.ndarray, *, heads: int, channels: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(heads kept, channels kept) of a Mamba-2 layer from scores [heads, channels].

    First channels, by their norm over heads: the same channels in every head. Then heads, by their norm over those channels:
    an equal number in each group of heads that share B and C (arXiv 2504.11409, section 3).
    """
    kept_channels = best(np.linalg.norm(scores, axis=0), channels)
    return best_in_groups(np.linalg.norm(scores[:, kept_channels], axis=1), heads, groups), kept_channels


def model_of(scores: Scores) -> ModelConfig:
    """The scored model's shape."""
    return build(ModelConfig, scores.model, "model")
