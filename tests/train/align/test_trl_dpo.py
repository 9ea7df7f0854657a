"""DPO against TRL 1.16, another implementation: the same loss and the same gradients, reference included.

TRL reads each answer alone, padded; here the answers to one context share a row, and a step has several microbatches. Run by
`make test-oracle`, in .trl (install_trl.sh).
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import tokenizer_file
from datasets import Dataset
from parity.peers import peer_of, their_part
from preference_rows import batch_of, preference_row
from ranks import run_ranks
from test_trl_sft import EOD, MODELS, ROW, fast_tokenizer
from tiny import RECIPE, VOCAB, engine_of

from data.batch import Batch
from recipes.schema.align import DpoConfig
from recipes.schema.model import ModelConfig
from train.align.dpo import count_pairs, log_prob_step
from train.engine import Engine, run_schedule
from train.evaluate.deal import evaluating
from train.objective.step_counts import count_step

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.oracle

CONFIG = DpoConfig(beta=0.3, sft_weight=0.2)


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids."""
    draw = np.random.default_rng(5)
    sizes = [(5, 3, 9), (8, 6, 2), (4, 12, 7), (3, 1, 4), (6, 5, 5)]
    return [tuple(draw.integers(1, VOCAB, size).tolist() for size in three) for three in sizes]  # type: ignore[misc]


def packed() -> Batch:
    """Two pairs a row, of the last row one."""
    rows = []
    for start in range(0, len(pairs()), 2):
        answers = [
            ([*prompt, *answer], len(answer), group, rank)
            for group, (prompt, *both) in enumerate(pairs()[start : start + 2])
            for rank, answer in enumerate(both)
        ]
        rows.append(preference_row(answers, ROW))
    return batch_of(rows, np.arange(len(rows)))


def with_weights(engine: Engine, peer: Any, model: ModelConfig) -> None:
    with torch.no_grad():
        for name, parameter in engine.chunks[0].module.named_parameters():
            parameter.copy_(their_part(name, dict(peer.named_parameters()), model))


def compare(rank: int, model: ModelConfig, folder: Path) -> dict[str, float]:
    """Relative differences of the loss and of every gradient."""
    peer = peer_of(model)
    peer.config._name_or_path = str(tokenizer_file().parent)
    reference = copy.deepcopy(peer)
    with torch.no_grad():
        for number, parameter in enumerate(reference.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * parameter.std().nan_to_num() * noise)
    rows = [{"prompt_ids": [EOD, *p], "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs()]
    config = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], bf16=False, max_length=None, beta=CONFIG.beta,
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, CONFIG.sft_weight], gradient_checkpointing=False,
    )  # fmt: skip
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = trl.DPOTrainer(
        model=peer,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(text),
        processing_class=fast_tokenizer(),
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    recipe = replace(
        RECIPE,
        model=model,
        run=replace(RECIPE.run, global_rows=3, microbatch_rows=1),
        data=replace(RECIPE.data, row_tokens=ROW, reset_at_documents=True),
        objective=replace(RECIPE.objective, kind="dpo", dpo=CONFIG),
    )
    found = {}
    with engine_of(recipe, rank=rank, world=1) as engine:
        batches = [packed().part(row, row + 1) for row in range(3)]
        with_weights(engine, reference, model)
        with evaluating(engine.chunks):
            sums = run_schedule(engine, batches, forward_step=log_prob_step(engine.mesh), forward_only=True)
        batches = [replace(batch, reference=one) for batch, one in zip(batches, sums, strict=True)]
        with_weights(engine, peer, model)
        engine.chunks[0].zero_grad_buffer()
        microbatches, _ = count_step(engine.mesh, batches, count_pairs)
        reports = run_schedule(engine, microbatches, forward_step=engine.forward_step)
        found["loss"] = abs(float(torch.stack(reports)[:, 0].mean()) / float(loss) - 1)
        for name, parameter in engine.chunks[0].module.named_parameters():
            wanted = their_part(name, gradients, model)
            found[name] = float((parameter.main_grad - wanted).abs().max() / wanted.abs().max())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_trl(name: str, tmp_path: Path) -> None:
    found = run_ranks(1, compare, MODELS[name], tmp_path)[0]
    assert found.pop("loss") < 1e-6
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-5, f"{worst}: {found[worst]:.1e}"
    assert len(found) > 10
