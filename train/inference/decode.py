"""Text from a trained model, token by token, with constant-size Mamba states and a key/value cache.

    prompt ids --prefill--> caches + last logits --pick--> id --one step--> caches + logits --> ...

The whole model is on one rank, a layout at which any checkpoint can be read. There is no tensor parallelism here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.model.context import LayerCaches, RowContext


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled from the model's distribution."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0


def forward_cached(model: Any, tokens_BS: torch.Tensor, caches: LayerCaches) -> torch.Tensor:
    """Read tokens into the caches. -> logits of the last token, fp32 [rows, vocabulary]. `caches` is updated in place."""
    start, length = caches.length, tokens_BS.shape[1]
    positions = torch.arange(start, start + length, device=tokens_BS.device).expand_as(tokens_BS)
    hidden = model.embedding(input_ids=tokens_BS, position_ids=positions)
    context = RowContext(caches=caches)
    for layer in model.decoder.layers:
        hidden = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
    caches.length = start + length
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits_SBV, _ = model.output_layer(model.decoder.final_norm(hidden[-1:]), weight=weight)
    return model.capped(logits_SBV[0].float())


def pick(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next token of each row, [rows]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        floor = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor, -torch.inf)
    probabilities = torch.softmax(logits_BV, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that reaches top_p is still included
        probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: Any, prompt: list[int], *, tokens: int, sampling: Sampling, end_of_document: int | None = None
) -> Iterator[int]:
    """Yield up to `tokens` new ids after `prompt` (not empty), one at a time; stops after `end_of_document`."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    caches = LayerCaches()
    logits = forward_cached(model, torch.tensor([prompt], device=device), caches)
    for index in range(tokens):
        token = pick(logits, sampling, generator)
        yield int(token)
        if int(token) == end_of_document or index + 1 == tokens:
            return
        logits = forward_cached(model, token.view(1, 1), caches)
