"""The trackers that a recipe asks for."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipes.schema.errors import StratumError
from recipes.schema.telemetry import TelemetryConfig
from train.record.trackers.follower import Follower
from train.record.trackers.mlflow_run import MLflow
from train.record.trackers.tracker import TrackedRun, Tracker
from train.record.trackers.trackio_run import Trackio
from train.record.trackers.wandb_run import WeightsAndBiases

Make = Callable[[TrackedRun], Tracker]


def trackers(config: TelemetryConfig) -> Iterator[tuple[str, str, Make]]:
    """(name, package, what opens a run) of each tracker that is switched on."""
    if (mode := config.wandb) != "off":
        yield "Weights & Biases", "wandb", lambda run: WeightsAndBiases(run, mode=mode, project=config.wandb_project)
    if (uri := config.mlflow) is not None:
        yield "MLflow", "mlflow", lambda run: MLflow(run, uri=uri, experiment=config.mlflow_experiment)
    if config.trackio:
        yield "Trackio", "trackio", lambda run: Trackio(run, project=config.trackio_project)


def follow(
    name: str, package: str, make: Make, *, folder: Path, first_step: int, recipe: dict[str, Any], data: str
) -> Follower:
    """A tracker's follower. StratumError if its package is not installed."""
    if _is_missing(package):
        raise StratumError(
            f"the package {package} is not installed. Install it: pip install 'stratum-pretrain[{package}]'. The next start of "
            f"the run then sends everything."
        )
    return Follower(name, make, folder=folder, first_step=first_step, recipe=recipe, data=data)


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except (ValueError, AttributeError):  # something else has been put in its place
        return False
