"""Held-out loss by source, in bits per byte: comparable across tokenizers and vocabularies.

bits per byte = (sum of -log2 p(label)) / (UTF-8 bytes of the labels)

Of chats, only the labels that are learned count: the answers.

Rows are dealt to the data-parallel ranks (`train.evaluate.deal`). Apart from rounding, the sums do not depend on the layout.
"""

import math
from typing import Any

import numpy as np
import torch

from recipes.schema.errors import DataError
from train.engine import Engine, run_schedule
from train.evaluate.deal import deal, evaluating
from train.objective.next_token import local_rows


def heldout_bits_per_byte(engine: Engine, dataset: Any, *, rows_per_source: int) -> dict[str, float]:
    """Bits per byte of each source's first held-out rows. Collective over the world; the same result on every rank."""
    token_bytes = dataset.tokenizer.token_bytes()
    with evaluating(engine.chunks):
        return {
            name: _bits_per_byte(engine, dataset, name, limit=rows_per_source, token_bytes=token_bytes)
            for name in dataset.source_names
        }


def _bits_per_byte(engine: Engine, dataset: Any, name: str, *, limit: int, token_bytes: np.ndarray) -> float:
    layout, mesh = engine.mesh.layout, engine.mesh
    count = min(limit, dataset.heldout_count(name))
    if not count:  # Megatron's schedule fails without a microbatch
        raise DataError(
            f"source {name!r} has no held-out row of data.row_tokens={engine.row_tokens}. Raise "
            f"data.sources.{name}.heldout_fraction, or add text, and prepare the data again; or lower data.row_tokens."
        )
    batch = dataset.heldout_rows(name, 0, count)
    dealt = deal(count, mesh, microbatch_rows=engine.microbatch_rows)
    microbatches = [batch.select(np.array([row for row, _ in part])) for part in dealt]
    counts = np.array([is_counted for part in dealt for _, is_counted in part])

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        rows = local_rows(next(iterator), mesh, reset_at_documents=engine.reset_at_documents)
        output = model(rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context)

        def loss_of(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if rows.learned is not None:
                token_losses = torch.where(rows.learned, token_losses, 0)
            per_row = token_losses.double().sum(dim=1)
            return per_row.sum().float(), per_row

        return output, loss_of

    reports = run_schedule(engine, microbatches, forward_step=step, forward_only=True)
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if reports:
        nats = (torch.cat(reports) * torch.from_numpy(counts).to(mesh.device)).sum()
    # The sum is over the world. Tensor ranks have equal losses; only the last pipeline stage reports losses.
    nats = mesh.sum_over_world(nats) / layout.tensor
    labels = batch.labels if batch.learned is None else batch.labels[batch.learned]
    total_bytes = max(1, int(token_bytes[labels.numpy()].sum()))
    return float(nats) / math.log(2) / total_bytes
