"""Reward models against TRL 1.16: the same weights, answers and preferences give the same loss and the same gradients.

TRL reads each conversation alone, padded; here all are packed in rows, several a row and several rows a step. Run by
`make test-oracle`, in .trl (install_trl.sh).
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parity.peers import peer_of, their_part
from preference_rows import EOD, batch_of, preference_row
from ranks import run_ranks
from test_trl import accelerator, metrics
from tiny import RECIPE, TINY, VOCAB, engine_of
from transformers import Gemma2ForSequenceClassification

from recipes.schema.align import RewardConfig
from train.engine import run_schedule
from train.objective.step_counts import count_step

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.oracle

ROW, PAD = 64, VOCAB - 1
MODEL = replace(
    TINY, pattern="w-*-", activation="geglu", position="rope", window_tokens=20, attention_softcap=50.0, logit_softcap=30.0,
    norm_eps=1e-6, norm_offset=1, post_norms=True, scale_embedding=True, tie_embeddings=True, head="scalar",
)  # fmt: skip


def pairs() -> list[tuple[list[int], list[int]]]:
    """(chosen, rejected) conversations of 4 to 25 tokens, with a common beginning."""
    draw = np.random.default_rng(5)
    found = []
    for _ in range(6):
        context = draw.integers(1, PAD, int(draw.integers(2, 9))).tolist()
        chosen, rejected = (context + draw.integers(1, PAD, int(draw.integers(2, 17))).tolist() for _ in range(2))
        found.append((chosen, rejected))
    return found


def compare(rank: int, center_weight: float) -> dict[str, float]:
    """Relative differences of the loss and of every gradient."""
    body = peer_of(replace(MODEL, head="vocabulary"))
    config = body.config
    config.num_labels, config.pad_token_id = 1, PAD
    peer = Gemma2ForSequenceClassification._from_config(config, attn_implementation="eager").float()
    peer.model.load_state_dict(body.model.state_dict())
    texts = [[EOD, *text] for side in zip(*pairs(), strict=True) for text in side]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    trainer = SimpleNamespace(
        model=peer, accelerator=accelerator(), _metrics=metrics(), _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(center_rewards_coefficient=center_weight or None),
    )  # fmt: skip
    peer.train()
    loss = trl.RewardTrainer.compute_loss(trainer, peer, {"input_ids": ids, "attention_mask": (ids != PAD).long()})
    loss.backward()
    weights = {name.replace("score", "lm_head"): p for name, p in peer.named_parameters()}
    gradients = {name: p.grad for name, p in weights.items()}

    rows: list[Any] = []
    for place, (chosen, rejected) in enumerate(pairs()):
        if place % 2 == 0:
            rows.append([])
        group = place % 2
        if sum(len(text) + 1 for text, *_ in rows[-1]) + len(chosen) + len(rejected) + 2 > ROW:
            rows.append([])
            group = 0
        rows[-1] += [(chosen, 2, group, 0), (rejected, 2, group, 1)]
    batch = batch_of([preference_row(row, ROW) for row in rows], np.arange(len(rows)))
    recipe = replace(
        RECIPE,
        model=MODEL,
        run=replace(RECIPE.run, global_rows=len(rows), microbatch_rows=1),
        data=replace(RECIPE.data, row_tokens=ROW, reset_at_documents=True),
        objective=replace(RECIPE.objective, kind="reward", reward=RewardConfig(center_weight=center_weight)),
    )
    with engine_of(recipe, rank=rank, world=1) as engine:
        ours = engine.chunks[0].module
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(their_part(name, weights, MODEL))
        engine.chunks[0].zero_grad_buffer()
        parts = [batch.part(row, row + 1) for row in range(len(rows))]
        microbatches, _ = count_step(engine.mesh, parts, engine.counter)
        reports = run_schedule(engine, microbatches, forward_step=engine.forward_step)
        found = {"loss": abs(float(torch.stack(reports)[:, 0].mean()) / float(loss) - 1)}
        for name, parameter in ours.named_parameters():
            wanted = their_part(name, gradients, MODEL)
            found[name] = float((parameter.main_grad - wanted).abs().max() / wanted.abs().max())
    return found


@pytest.mark.parametrize("center_weight", [0.0, 0.02])
def test_loss_and_gradients_are_those_of_trl(center_weight: float) -> None:
    found = run_ranks(1, compare, center_weight)[0]
    assert found.pop("loss") < 1e-6
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-5, f"{worst}: {found[worst]:.1e}"
    assert "output_layer.weight" in found and len(found) > 10
