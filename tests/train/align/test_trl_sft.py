"""Supervised fine-tuning against TRL 1.16, another implementation: the same mask, the same loss, the same gradients.

TRL reads each chat alone, in a microbatch of its own; here the chats are packed in rows, several a row and several rows a step.
Run by `make test-oracle`, in .trl (install_trl.sh).
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import PLAIN, SYSTEM, TURNS, assistant, tokenizer, tokenizer_file, user
from datasets import Dataset
from parity.peers import peer_of, their_part
from ranks import run_ranks
from tiny import RECIPE, TINY, VOCAB, engine_of
from transformers import PreTrainedTokenizerFast

from data.batch import Batch
from data.chat.encode import ChatDocument, ChatEncoder
from data.chat.pack import RowPacker
from data.chat.template import ChatError, ChatTemplate, open_template
from recipes.schema.data import ChatConfig
from recipes.schema.model import ModelConfig
from train.engine import run_schedule
from train.objective.next_token import count_labels
from train.objective.step_counts import count_step

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.oracle

ROW, EOD = 64, 0
MODELS = {
    "hybrid": replace(TINY, pattern="M-M*-"),
    "gemma": replace(
        TINY, pattern="w-*-", activation="geglu", position="rope", window_tokens=20, attention_softcap=50.0, logit_softcap=30.0,
        norm_eps=1e-6, norm_offset=1, post_norms=True, scale_embedding=True, tie_embeddings=True,
    ),
}  # fmt: skip


def trainer_of(model: Any, folder: Path, **more: Any) -> Any:
    """TRL's trainer on one CPU process, reporting nowhere."""
    config = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], max_length=None, bf16=False, **more.pop("config", {})
    )
    return trl.SFTTrainer(model=model, args=config, **more)


def conversations() -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, which are learned) of chats of 5 to 60 tokens, the last an end-of-document token."""
    draw = np.random.default_rng(3)
    found = []
    for size in draw.integers(5, 60, 9):
        ids = np.append(draw.integers(1, VOCAB, size - 1), EOD)
        learned = np.append(draw.random(size - 1) < draw.uniform(0.05, 0.9), False)
        learned[size // 2] = True
        found.append((ids, learned))
    return found


def packed() -> Batch:
    """The same chats in whole rows, by our packer."""
    packer: RowPacker[int, ChatDocument] = RowPacker(ROW, EOD, is_single=False)
    documents = [ChatDocument(ids, learned, 0) for ids, learned in conversations()]
    out = [pair for number, document in enumerate(documents) for pair in packer.add(number, document)]
    out += packer.finish()
    labels = np.concatenate([document.ids for _, document in out]).reshape(-1, ROW)
    learned = np.concatenate([document.learned for _, document in out]).reshape(-1, ROW)
    index = np.repeat(np.arange(len(out)), [len(document.ids) for _, document in out]).reshape(-1, ROW)
    tokens = np.roll(labels.reshape(-1), 1).reshape(-1, ROW)  # each row ends with EOD, as the one before the first
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        document_index=torch.from_numpy((index - index[:, :1]).astype(np.int32)),
        source=torch.zeros(len(labels), dtype=torch.int32),
        positions=np.arange(len(labels)),
        learned=torch.from_numpy(learned),
    )


def compare(rank: int, model: ModelConfig, folder: Path) -> dict[str, float]:
    """Relative differences of the loss and of every gradient."""
    peer = peer_of(model)
    peer.config._name_or_path = str(tokenizer_file().parent)
    fast = fast_tokenizer()
    rows = trl_rows()
    trainer = trainer_of(
        peer,
        folder,
        train_dataset=rows,
        processing_class=fast,
        config={"dataset_kwargs": {"skip_prepare_dataset": True}},
    )
    items = sum(int(learned.sum()) for _, learned in conversations())
    loss = torch.zeros(())
    for row in rows:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        part = trainer.compute_loss(peer, inputs, num_items_in_batch=torch.tensor(items))
        part.backward()
        loss = loss + part.detach()
    weights = dict(peer.named_parameters())
    gradients = {name: p.grad for name, p in weights.items()}
    batch = packed()
    recipe = replace(
        RECIPE,
        model=model,
        run=replace(RECIPE.run, global_rows=len(batch.labels), microbatch_rows=1),
        data=replace(RECIPE.data, row_tokens=ROW, reset_at_documents=True),
    )
    found = {}
    with engine_of(recipe, rank=rank, world=1) as engine:
        ours = engine.chunks[0].module
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(their_part(name, weights, model))
        engine.chunks[0].zero_grad_buffer()
        microbatches, _ = count_step(
            engine.mesh, [batch.part(row, row + 1) for row in range(len(batch.labels))], count_labels
        )
        reports = run_schedule(engine, microbatches, forward_step=engine.forward_step)
        found["loss"] = abs(float(torch.stack(reports).mean()) / float(loss) - 1)
        for name, parameter in ours.named_parameters():
            wanted = their_part(name, gradients, model)
            found[name] = float((parameter.main_grad - wanted).abs().max() / wanted.abs().max())
    return found


def trl_rows() -> Any:
    rows = []
    for ids, learned in conversations():
        labels = np.where(learned, ids, -100)
        rows.append({"input_ids": [EOD, *ids.tolist()], "labels": [-100, *labels.tolist()]})
    return Dataset.from_list(rows)


def fast_tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file()), eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<bos>"
    )


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_trl(name: str, tmp_path: Path) -> None:
    found = run_ranks(1, compare, MODELS[name], tmp_path)[0]
    assert found.pop("loss") < 1e-6
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-5, f"{worst}: {found[worst]:.1e}"
    assert len(found) > 10


def test_mask_is_that_of_trl(tmp_path: Path) -> None:
    chats = [TURNS, SYSTEM, [user("Add 1 and 2."), assistant("3", reasoning_content="1 + 2 = 3")]]
    fast = fast_tokenizer()
    with open_template("chatml", tokenizer()) as template:
        fast.chat_template = template.source
    model = peer_of(MODELS["hybrid"])
    trainer = trainer_of(
        model, tmp_path, train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]), processing_class=fast,
        config={"assistant_only_loss": True},
    )  # fmt: skip
    with ChatEncoder(ChatConfig(), tokenizer(), row_tokens=1000, seed=1) as encoder:
        for chat, theirs in zip(chats, trainer.train_dataset, strict=True):
            (ours,) = encoder.documents(json.dumps({"messages": chat}))
            assert ours.ids[:-1].tolist() == theirs["input_ids"][: len(ours.ids) - 1]
            assert ours.ids[-1] == tokenizer().eod and not ours.learned[-1]
            if "assistant_masks" in theirs:
                assert ours.learned[:-1].astype(int).tolist() == theirs["assistant_masks"][: len(ours.ids) - 1]
            else:
                learned = [label != -100 for label in theirs["labels"]]
                assert ours.learned[:-1].tolist() == learned[: len(ours.ids) - 1]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer", "description": "d"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "x", "parameters": PARAMETERS}}]
CALLING = [
    user("Add."),
    assistant("", reasoning_content="r", tool_calls=[CALL]),
    {"role": "tool", "content": "3", "name": "add"},
    assistant("It is 3."),
]
THINKING = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d", reasoning_content="why")]


def test_every_template_that_comes_with_trl_gives_the_text_and_mask_of_transformers() -> None:
    fast, compared = fast_tokenizer(), 0
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        with ChatTemplate(path.read_text(), tokenizer("<bos>"), place=path.name) as template:
            for chat in (PLAIN, TURNS, SYSTEM, CALLING, THINKING):
                tools = TOOLS if chat is CALLING else None
                how = {"tools": tools, "chat_template": template.source}
                try:
                    wanted = fast.apply_chat_template(chat, tokenize=False, **how)
                except Exception:  # of any kind: a template that refuses a chat must refuse it here too
                    with pytest.raises(ChatError):
                        template.render(chat, tools=tools, date=time.time())
                    continue
                rendered = template.render(chat, tools=tools, date=time.time())
                assert rendered.text == wanted, path.name
                compared += 1
                if template.is_tagged:
                    ours = template.encode(rendered.text, rendered.spans)
                    theirs = fast.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True, **how)
                    # Without <bos> in the template, ours puts it before the chat, as the tokenizer here asks.
                    size = len(theirs["input_ids"])
                    assert ours.ids[-size:].tolist() == theirs["input_ids"], path.name
                    assert ours.learned[-size:].astype(int).tolist() == theirs["assistant_masks"], path.name
    assert compared > 250
