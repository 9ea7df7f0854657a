"""Transformer Engine as a backend: the only module that names it.

Not run on a GPU yet: what is known without one is that the modules named here exist in the pinned versions and build
Megatron's production hybrid stack from (see docs/fp8.md once FP8 is in).
"""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.ssm.mamba_mixer import MambaMixer


def is_installed() -> bool:
    """Whether Transformer Engine's torch package can be imported here."""
    return importlib.util.find_spec("transformer_engine_torch") is not None


class TransformerEngineBackend:
    """Megatron's Transformer Engine modules, with the stock Mamba-2 mixer on mamba-ssm kernels."""

    name = "te"
    separates_documents = False  # Megatron's stock modules want cumulative lengths instead of RowContext

    def column_parallel_linear(self) -> type:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        return TERowParallelLinear

    def column_parallel_layer_norm_linear(self) -> type | None:
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

        return TELayerNormColumnParallelLinear

    def norm(self) -> type:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    def core_attention(self) -> type:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention

    def mixer(self) -> "type[MambaMixer]":
        from megatron.core.ssm.mamba_mixer import MambaMixer

        return MambaMixer
