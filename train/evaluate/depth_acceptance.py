"""How many guesses of the further depths (`model.mtp`) the model itself would make: acceptance of greedy speculative decoding.

    token t + 1 is final      depth k guesses token t + k + 1; the model, having read tokens 0 ... t + k, guesses it too
    accepted at depth k       depths 1 ... k all have the likeliest token of the model (arXiv 2211.17192, temperature 0)
    tokens per pass           1 + number of accepted guesses: the pass that checks them has one more token

Tokens between are those of the held-out text. A generated text has the model's own ones there, so on text that the model would
not write only depth 1 is exactly what generation accepts. All depths count the same positions: those for which the labels of all
depths are in the row, in the document, and learned. Every layout counts the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from train.engine import Engine, run_schedule
from train.evaluate.ask import TaskResult
from train.evaluate.deal import deal, evaluating
from train.evaluate.intervals import Metric, ratio
from train.model.attention import zigzag_positions
from train.objective.next_token import local_rows
from train.objective.several_tokens import local_ahead
from train.parallel.mesh import Mesh


def depth_acceptance(engine: Engine, dataset: Any, *, depths: int, rows_per_source: int) -> list[TaskResult]:
    """Metrics of each source's first held-out rows; sources without a position that counts are left out. Collective over the
    world; the same result on every rank. The model must have `depths` further depths."""
    found = []
    with evaluating(engine.chunks):
        for name in dataset.source_names:
            counts = _counts(engine, dataset, name, depths=depths, limit=rows_per_source)
            if positions := int(counts[:, 0].sum()):
                metrics = metrics_of(counts)
                found.append(TaskResult(f"speculation/{name}", "acceptance", dataset.manifest_hash, positions, metrics))
    return found


def metrics_of(counts: np.ndarray) -> dict[str, Metric]:
    """counts: for each row [positions, accepted at depth 1, ...]. The positions of a row depend on each other, so intervals are
    over rows."""
    positions = counts[:, 0].tolist()

    def per_position(numbers: Sequence[float]) -> Metric:
        return ratio(numbers, positions, higher_is_better=True)

    shares = {f"accepted_{depth}": per_position(counts[:, depth].tolist()) for depth in range(1, counts.shape[1])}
    return {**shares, "tokens_per_pass": per_position(counts.sum(1).tolist())}


def _counts(engine: Engine, dataset: Any, name: str, *, depths: int, limit: int) -> np.ndarray:
    """[rows, 1 + depths], see `metrics_of`; the same on every rank."""
    mesh, layout = engine.mesh, engine.mesh.layout
    count = min(limit, dataset.heldout_count(name))
    sums = torch.zeros(count, 1 + depths, dtype=torch.float64, device=mesh.device)
    if not count:
        return sums.cpu().numpy()
    batch = dataset.heldout_rows(name, 0, count)
    dealt = deal(count, mesh, microbatch_rows=engine.microbatch_rows)
    microbatches = [batch.select(np.array([row for row, _ in part])) for part in dealt]

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        rows_of_step = next(iterator)
        rows = local_rows(rows_of_step, mesh, reset_at_documents=engine.reset_at_documents)
        ahead = local_ahead(rows_of_step, depths, mesh, reset_at_documents=engine.reset_at_documents)
        output = model(rows.tokens, rows.positions, None, ahead=ahead, packed_seq_params=rows.context)

        def report_of(guesses_DBS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            accepted_DBS = _accepted(guesses_DBS, rows.positions[0], counted_BS=ahead.learned_DBS.all(0), mesh=mesh)
            return torch.zeros((), device=mesh.device), accepted_DBS.sum(-1).t().double()

        return output, report_of

    reports = run_schedule(engine, microbatches, forward_step=step, forward_only=True)
    if reports:  # on the last pipeline stage
        for (row, is_counted), numbers in zip((one for part in dealt for one in part), torch.cat(reports), strict=True):
            if is_counted:
                sums[row] += numbers
    # Tensor ranks have equal numbers, context ranks have other positions.
    return (mesh.sum_over_world(sums) / layout.tensor).cpu().numpy()


def _accepted(
    guesses_DBS: torch.Tensor, positions_S: torch.Tensor, *, counted_BS: torch.Tensor, mesh: Mesh
) -> torch.Tensor:
    """Which positions count, then which of them are accepted at each depth, [1 + depths, rows, sequence of this context rank].

    guesses_DBS: `Model.guesses_of_depths`. Collective over the context group.
    """
    own_BS = guesses_DBS[0]
    group = mesh.groups.cp
    parts = [torch.empty_like(own_BS) for _ in range(group.size())]
    dist.all_gather(parts, own_BS.contiguous(), group=group)
    length = own_BS.shape[1] * group.size()
    whole_BS = own_BS.new_empty(len(own_BS), length)
    for rank, part in enumerate(parts):
        whole_BS[:, zigzag_positions(length, rank=rank, ranks=group.size(), device=mesh.device)] = part
    accepted = [counted_BS]
    for depth in range(1, len(guesses_DBS)):
        later_S = (positions_S + depth).clamp(max=length - 1)  # beyond the row nothing counts
        accepted.append(accepted[-1] & (guesses_DBS[depth] == whole_BS[:, later_S]))
    return torch.stack(accepted)
