"""transformers' `generate` with the same weights writes the same greedy tokens and gives them the same
log-probabilities, for a batch of ragged prompts of both families."""

from dataclasses import replace

import pytest
import torch
from parity.peers import peer_of, their_part
from ranks import run_ranks
from tiny import GEMMA, RECIPE, TINY, VOCAB, engine_of, recipe_with

from recipes.schema.model import ModelConfig
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling

NEW = 24
SHAPES = {"nemotron_h": replace(TINY, kv_heads=1), "gemma2": replace(recipe_with(**GEMMA).model, window_tokens=11)}


def against_transformers(rank: int, shape: ModelConfig) -> tuple[list[tuple[list[int], list[int]]], float]:
    theirs = peer_of(shape).eval()
    tensors, draw = dict(theirs.named_parameters()), torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in (5, 1, 33)]
    with engine_of(replace(RECIPE, model=shape), rank=rank, world=1) as built, torch.no_grad():
        ours = built.chunks[0].module
        for name, parameter in ours.named_parameters():
            parameter.copy_(their_part(name, tensors, shape).view(parameter.shape))
        config = EngineConfig(rows=3, context_tokens=64, step_tokens=20, page_tokens=4)
        found = InferenceEngine(ours, shape, config).run([Request(p, NEW, sampling=Sampling(0.0)) for p in prompts])
        pairs, worst = [], 0.0
        for prompt, events in zip(prompts, found, strict=True):
            tokens = torch.tensor([prompt])
            out = theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                use_cache=True, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            expected = torch.log_softmax(torch.cat(out.logits).float(), -1)
            new = out.sequences[0, len(prompt) :]
            logprobs = torch.tensor([event.token.logprob for event in events if event.token])
            worst = max(worst, float((expected.gather(1, new[:, None])[:, 0] - logprobs).abs().max()))
            pairs.append((new.tolist(), [event.token.id for event in events if event.token]))
        return pairs, worst


@pytest.mark.parametrize("family", SHAPES)
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(family: str) -> None:
    pairs, worst = run_ranks(1, against_transformers, SHAPES[family])[0]
    assert all(theirs == ours for theirs, ours in pairs)
    assert worst < 1e-5
