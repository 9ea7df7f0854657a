"""Speed of generation on one GPU: a step of decoding reads all weights once, and the caches of every text.

    tokens/s of a batch = batch / (bytes of a step / (share of the bandwidth that decoding reaches x bandwidth))

At the batches that fit one GPU a step is limited by memory, not by arithmetic. The time to read prompts is not included.
"""

from dataclasses import dataclass

from launch.plan.cost.device import Device
from launch.plan.cost.inference import inference_memory, state_bytes
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import counts, expert_parameters, flops_per_token, parameters
from recipes.schema.units import GIB

BANDWIDTH_SHARE = 0.685
"""Share of the data sheet's bandwidth that decoding reaches: 1,397 of 2,039 GB/s on an A100, Llama 2 7B in bf16 (gpt-fast, table
"Benchmarks" of its README). Not fitted to the figures in docs/plan.md."""
USABLE = 0.95
"""Share of the memory for weights and caches (arXiv 2508.14444, section 4: 5 % of an A10G are left for the rest)."""


@dataclass(frozen=True)
class DecodeSpeed:
    """Prediction for a batch of texts that generate."""

    context_tokens: int
    """Tokens of each text, prompt included."""
    batch: int
    memory_bytes: float
    """Weights and caches of the whole batch at this context."""
    tokens_per_s: float
    """Of all texts together."""


def decode_memory(model: ModelConfig, *, context_tokens: int, batch: int) -> float:
    """Bytes of weights (bf16), keys and values (bf16) and Mamba-2 states (fp32, as `train.inference` stores them)."""
    memory = inference_memory(model, context_tokens=context_tokens, batch=batch)
    return memory.weights + memory.keys_values + _states(model, batch)


def largest_batch(model: ModelConfig, device: Device, *, context_tokens: int) -> int:
    """Texts of `context_tokens` whose caches fit next to the weights; 0 if not even one does. 1 for a model without caches (MLP
    layers alone)."""
    weights = decode_memory(model, context_tokens=context_tokens, batch=0)
    each = decode_memory(model, context_tokens=context_tokens, batch=1) - weights
    room = USABLE * device.memory_gib * GIB - weights
    return max(0, int(room // each)) if each else int(room >= 0)


def decode_speed(
    model: ModelConfig, device: Device, *, context_tokens: int, batch: int, read_tokens: float | None = None
) -> DecodeSpeed:
    """Speed of a batch. read_tokens: tokens of a text in the caches on average, if fewer than `context_tokens`: p + n / 2 while a
    text grows from p to p + n tokens."""
    read = context_tokens if read_tokens is None else round(read_tokens)
    memory = inference_memory(model, context_tokens=read, batch=batch)
    # One row of the embedding is read for a token; with tied weights the head reads all of it.
    embedding = 2.0 * parameters(model).embedding if model.has_own_head else 0.0
    moved = (
        memory.weights
        - embedding
        - 2.0 * parameters(model).mtp  # further depths are used for guesses only
        - 2.0 * _unread_experts(model, batch)
        + memory.keys_values
        + 2 * _states(model, batch)
    )  # states are read and written
    training = flops_per_token(model, read)
    flops = batch * (training.total - training.mtp) / 3  # backward passes are two thirds
    seconds = max(moved / (BANDWIDTH_SHARE * device.hbm), flops / device.peak["bf16"])
    whole = decode_memory(model, context_tokens=context_tokens, batch=batch)
    return DecodeSpeed(context_tokens, batch, whole, batch / seconds)


def decode_table(model: ModelConfig, device: Device, contexts: tuple[int, ...]) -> list[DecodeSpeed]:
    """For each context that fits: one text, and the largest batch."""
    found = []
    for context in contexts:
        most = largest_batch(model, device, context_tokens=context)
        found += [
            decode_speed(model, device, context_tokens=context, batch=batch) for batch in sorted({1, most}) if most
        ]
    return found


def _unread_experts(model: ModelConfig, batch: int) -> float:
    """Expected number of weights of experts that no token of a step chooses, if tokens choose evenly and independently."""
    experts = model.experts
    share = (1 - experts.top_k / experts.count) ** batch
    return counts(model.pattern)["E"] * experts.count * share * expert_parameters(model)


def _states(model: ModelConfig, batch: int) -> float:
    return float(batch * counts(model.pattern)["M"] * state_bytes(model))
