"""Fields of the `telemetry` group: what is shown and recorded.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import PositiveInt


@dataclass(frozen=True)
class TelemetryConfig:
    """What is shown and recorded."""

    log_every_steps: PositiveInt = 10
    """Steps between reductions of the metrics over ranks. Every step of the interval is recorded."""
    progress: bool = True
    """Show a live progress bar (one line per interval if the output is not a terminal)."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases. `offline` needs no network; `wandb sync` uploads later. A tracker's failure never stops a run."""
    wandb_project: str = "stratum"
    """Project name at Weights & Biases."""
    mlflow: str | None = None
    """MLflow: `sqlite:///mlflow.db`, or the address of a tracking server. Needs the extra `mlflow`. null: off."""
    mlflow_experiment: str = "stratum"
    """Experiment name at MLflow."""
    trackio: bool = False
    """Trackio: a file on this machine, or the place that Trackio's own settings name. Needs the extra `trackio`."""
    trackio_project: str = "stratum"
    """Project name at Trackio."""
