"""MLflow: a tracking server, or an SQLite file (`sqlite:///mlflow.db`). MLflow refuses plain folders since 3.0.

MLflow keeps every point that it is sent, also twice the same. Each row is one transaction and contains the metric `step`, whose
last value says which step the run has.
"""

import contextlib
import hashlib
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.record.trackers.rows import Row
from train.record.trackers.tracker import TrackedRun

_SQLITE = "sqlite:///"
_TAG = "stratum.run"
_LONGEST_NAME = 200
_LONGEST_VALUE = 500
_PARAMS_AT_ONCE = 100
"""Limit of MLflow's interface for one call."""


class MLflow:
    """A run at MLflow."""

    def __init__(self, run: TrackedRun, *, uri: str, experiment: str) -> None:
        import mlflow  # optional package
        from mlflow.entities import Metric, Param  # optional package

        self._metric = Metric
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports each table that it makes
        if uri.startswith(_SQLITE):
            _make_file(Path(uri.removeprefix(_SQLITE)))
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        runs = self._client.search_runs([number], filter_string=f"tags.`{_TAG}` = '{run.key}'", max_results=1)
        if runs:
            self._id, self.last_step = runs[0].info.run_id, int(runs[0].data.metrics.get("step", -1))
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {_TAG: run.key, "stratum.group": run.group, "stratum.folder": str(run.folder.resolve())}
        self._id, self.last_step = self._client.create_run(number, run_name=run.name, tags=tags).info.run_id, -1
        params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in _flat(run.recipe)]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            scalars = {**row.scalars, "step": float(row.step)}
            metrics = [
                self._metric(_allowed(name), value, int(1000 * row.time), row.step) for name, value in scalars.items()
            ]
            self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _make_file(path: Path) -> None:
    """Make an SQLite file with MLflow's tables, whole or not at all: a kill while MLflow makes them (seconds) would leave a file
    that it refuses for ever."""
    import mlflow  # optional package

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        mlflow.MlflowClient(tracking_uri=f"{_SQLITE}{new}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another run was first
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


def _allowed(name: str) -> str:
    """A metric's name in the letters that MLflow allows; a changed one ends with a digest of the original."""
    plain = posixpath.normpath(re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)).lstrip("/.")[:_LONGEST_NAME]
    return name if plain == name else f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field of a recipe."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield _allowed(prefix), value
