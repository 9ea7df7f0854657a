"""Which modules a model is made of: the backend is a value, chosen once, and nothing else asks which one it is.

A backend is Megatron's BackendSpecProvider (linear layers, norm, attention core) plus the Mamba-2 mixer. `reference`
is plain torch on any device; `te` is Transformer Engine with mamba-ssm kernels on a GPU (`train.precision.te`).
"""

from abc import abstractmethod
from typing import Protocol

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from train.config import PrecisionConfig
from train.errors import BackendError
from train.model.attention import AttentionCore
from train.model.mixer import ReferenceMixer, have_mamba_kernels
from train.model.norm import RMSNorm
from train.precision import te


class Backend(Protocol):
    """Modules a model spec names."""

    name: str
    separates_documents: bool
    """Whether its attention and scan honour `RowContext.documents`."""

    @abstractmethod
    def column_parallel_linear(self) -> type: ...

    @abstractmethod
    def row_parallel_linear(self) -> type: ...

    @abstractmethod
    def column_parallel_layer_norm_linear(self) -> type | None:
        """One module for norm and linear where the backend has it, else None."""

    @abstractmethod
    def norm(self) -> type: ...

    @abstractmethod
    def core_attention(self) -> type: ...

    @abstractmethod
    def mixer(self) -> type[MambaMixer]: ...


class ReferenceBackend(LocalSpecProvider):
    """Plain torch modules, any device."""

    name = "reference"
    separates_documents = True

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type[RowParallelLinear]:
        return RowParallelLinear

    def norm(self) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return AttentionCore

    def mixer(self) -> type[MambaMixer]:
        return ReferenceMixer


def choose_backend(precision: PrecisionConfig, device: torch.device) -> Backend:
    """The backend a recipe asks for on this device; `auto` is `te` where that can run, else `reference`.

    Raises BackendError naming what is missing for an explicit `te`.
    """
    missing = []
    if device.type != "cuda":
        missing.append("a GPU")
    if not te.is_installed():
        missing.append("transformer-engine")
    if not have_mamba_kernels():
        missing.append("mamba-ssm with causal-conv1d")
    match precision.backend:
        case "te" if missing:
            raise BackendError(
                f"precision.backend=te needs {', '.join(missing)}. Use precision.backend=reference, or install the "
                f"`gpu` extra (`pip install -e '.[gpu]'`) on a machine with a GPU."
            )
        case "te":
            return te.TransformerEngineBackend()
        case "auto" if not missing:
            return te.TransformerEngineBackend()
        case _:
            return ReferenceBackend()
