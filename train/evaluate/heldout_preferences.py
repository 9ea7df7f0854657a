"""Held-out preferences under a reward model, or under a model that DPO trains: loss, accuracy and calibration of each source.

    rows, dealt to the data-parallel ranks --model--> rewards --pairs--> gathered on every rank --> metrics

Every pair of answers of different ranks counts once. Intervals cover the choice of other pairs, as if they were independent; the
pairs of one ranking are not. The calibration error has none: a binned error is biased upwards, and so are its bootstrap samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from train.align.losses.preference import RankedPairs, bradley_terry_losses, calibration_error, pair_accuracy
from train.align.reward import pairs_of
from train.engine import Engine, run_schedule
from train.evaluate.ask import TaskResult
from train.evaluate.deal import deal, evaluating
from train.evaluate.intervals import NO_INTERVAL, Metric, mean, share
from train.objective.next_token import local_rows
from train.parallel.mesh import Mesh


def heldout_preferences(
    engine: Engine,
    dataset: Any,
    *,
    rows_per_source: int,
    pairs_step: Callable[..., Any] | None = None,
    prepare: Callable[[list[Any]], list[Any]] = lambda batches: batches,
) -> list[TaskResult]:
    """Metrics of each source's first held-out rows; sources without held-out preferences are left out. Collective over the
    world; the same result on every rank.

    pairs_step: the forward step that reports the `RankedPairs` of a microbatch; None: by the rewards of a reward model. prepare:
    what the microbatches get first.
    """
    found = []
    forward = pairs_step or reward_pairs_step(engine.mesh)
    with evaluating(engine.chunks):
        for name in dataset.source_names:
            pairs = _pairs(engine, dataset, name, limit=rows_per_source, forward=forward, prepare=prepare)
            if pairs.shape[1]:
                metrics = metrics_of(pairs[0], pairs[1])
                found.append(
                    TaskResult(f"heldout/{name}", "preferences", dataset.manifest_hash, pairs.shape[1], metrics)
                )
    return found


def recorded(results: Sequence[TaskResult]) -> dict[str, dict[str, Any]]:
    """The results as metrics.jsonl records scores of tasks (`train.evaluate.training_tasks`)."""
    return {
        one.name: {
            "hash": one.hash,
            "items": one.items,
            "cut_contexts": 0,
            "metrics": {name: asdict(metric) for name, metric in one.metrics.items()},
        }
        for one in results
    }


def metrics_of(better_N: torch.Tensor, worse_N: torch.Tensor) -> dict[str, Metric]:
    """Accuracy, calibration error and Bradley-Terry loss (nats) of pairs with these rewards, [N] each."""
    error = float(calibration_error(better_N, worse_N))
    return {
        "accuracy": share(float(pair_accuracy(better_N, worse_N)) * len(better_N), len(better_N)),
        "calibration_error": Metric(error, np.nan, np.nan, NO_INTERVAL, higher_is_better=False),
        "loss": mean(bradley_terry_losses(better_N, worse_N).tolist(), higher_is_better=False),
    }


def reward_pairs_step(mesh: Mesh) -> Callable[..., Any]:
    """A forward step of a reward model. Its report: the rewards of the microbatch's pairs."""

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        rows_of_step = next(iterator)
        rows = local_rows(rows_of_step, mesh, reset_at_documents=True)
        output = model(rows.tokens, rows.positions, None, packed_seq_params=rows.context)

        def report_of(values_BS: torch.Tensor) -> tuple[torch.Tensor, RankedPairs]:
            return values_BS.new_zeros(()), pairs_of(rows_of_step, values_BS, rows.positions[0], mesh=mesh)

        return output, report_of

    return step


def _pairs(
    engine: Engine,
    dataset: Any,
    name: str,
    *,
    limit: int,
    forward: Callable[..., Any],
    prepare: Callable[[list[Any]], list[Any]],
) -> torch.Tensor:
    """Rewards of the better and the worse answer of all pairs, [2, pairs] float64 on the CPU."""
    mesh = engine.mesh
    count = min(limit, dataset.heldout_count(name))
    if not count:
        return torch.empty(2, 0, dtype=torch.float64)
    batch = dataset.heldout_rows(name, 0, count)
    microbatches = []
    for part in deal(count, mesh, microbatch_rows=engine.microbatch_rows):
        rows = batch.select(np.array([row for row, _ in part]))
        counts = torch.tensor([is_counted for _, is_counted in part])
        microbatches.append(replace(rows, ranks=torch.where(counts[:, None], rows.ranks, -1)))

    reports = run_schedule(engine, prepare(microbatches), forward_step=forward, forward_only=True)
    # Tensor and context ranks have equal rewards; earlier pipeline stages have none.
    is_first = mesh.groups.tp.rank() == 0 and mesh.groups.cp.rank() == 0
    own = [torch.stack([one.better_N, one.worse_N]).double().cpu() for one in reports] if is_first else []  # type: ignore[attr-defined]
    parts = [part for of_rank in mesh.gather_objects(own) for part in of_rank]
    return torch.cat([torch.empty(2, 0, dtype=torch.float64), *parts], dim=1)
