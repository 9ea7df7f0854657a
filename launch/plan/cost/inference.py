"""Memory of inference: weights, keys and values of attention layers, states of Mamba-2 layers.

Budgets for compression are given in this memory: Nemotron Nano 9B-v2 was pruned so that its weights and a context of 131,072
tokens fit on one A10G (arXiv 2508.14444, section 4).
"""

from dataclasses import dataclass

from recipes.schema.model import ModelConfig
from recipes.schema.pattern import counts, flops_per_token, parameters
from recipes.schema.units import GIB


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one device, for all sequences of a batch."""

    weights: float
    keys_values: float
    mamba_states: float
    """Scan state and the last inputs of the convolution. Does not depend on the context length."""

    @property
    def total(self) -> float:
        return self.weights + self.keys_values + self.mamba_states

    @property
    def gib(self) -> float:
        return self.total / GIB


def inference_memory(
    model: ModelConfig, *, context_tokens: int, batch: int = 1, weight_bytes: float = 2.0, cache_bytes: float = 2.0
) -> InferenceMemory:
    """Memory of `batch` sequences of `context_tokens` each. weight_bytes, cache_bytes: size of one number (2 for bf16).

    A `w` layer keeps only the keys and values of its window.
    """
    layers = counts(model.pattern)
    seen = layers["*"] * context_tokens + layers["w"] * min(context_tokens, model.window_tokens)
    inner = model.mamba_heads * model.mamba_head_dim
    conv = inner + 2 * model.mamba_groups * model.mamba_state
    state = inner * model.mamba_state + conv * (model.mamba_conv - 1)
    return InferenceMemory(
        weights=weight_bytes * parameters(model).total,
        keys_values=batch * cache_bytes * 2 * model.kv_heads * model.head_dim * seen,
        mamba_states=batch * cache_bytes * layers["M"] * state,
    )


def roofline_tokens_per_s(
    model: ModelConfig, *, context_tokens: int, batch: int, gb_per_s: float, tflops: float
) -> float:
    """Upper bound of the tokens per second that all rows of a batch generate at a full context, in 16 bits.

    A step is limited by memory traffic (it reads all weights except the embedding, reads all caches, and writes the Mamba states)
    or by its matrix products. Efficiencies are not included: use the figure to rank shapes on one device, not as a prediction.
    """
    memory = inference_memory(model, context_tokens=context_tokens, batch=batch)
    embedding = 0 if model.tie_embeddings else 2 * parameters(model).embedding
    traffic = memory.weights - embedding + memory.keys_values + 2 * memory.mamba_states
    flops = batch * flops_per_token(model, context_tokens).total / 3
    return batch / max(traffic / (gb_per_s * 1e9), flops / (tflops * 1e12))
