"""Which modules a model is made of: the backend is a value, chosen once, and nothing else asks which one it is.

A backend is Megatron's BackendSpecProvider (linear layers, norm, attention core) plus the Mamba-2 mixer, and what low
precision needs of it. `reference` is plain torch on any device; `emulated` is the same modules with low-precision numbers
(`train.precision.emulated`); `te` is Transformer Engine with mamba-ssm kernels on a GPU (`train.precision.te`).
"""

from abc import abstractmethod
from typing import Any, Protocol

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from recipes.schema.errors import BackendError
from recipes.schema.model import ModelConfig
from recipes.schema.precision import PrecisionConfig
from train.model.attention import AttentionCore
from train.model.linear import use_fast_product
from train.model.mixer import KernelMixer, ReferenceMixer, have_mamba_kernels
from train.model.norm import RMSNorm
from train.parallel.mesh import Mesh
from train.precision import emulated, te
from train.precision.control import PrecisionControl


class Backend(Protocol):
    """Modules a model spec names."""

    name: str

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

    @abstractmethod
    def options(self, model: ModelConfig, precision: PrecisionConfig) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig that low precision needs."""

    @abstractmethod
    def equip(self, chunk: torch.nn.Module, *, model: ModelConfig, precision: PrecisionConfig) -> None:
        """Finish a freshly built model chunk."""

    @abstractmethod
    def control(self, chunks: list[Any], *, precision: PrecisionConfig, mesh: Mesh, seed: int) -> PrecisionControl:
        """What the training loop steers low precision with, over all chunks of this rank."""


class ReferenceBackend(LocalSpecProvider):
    """Plain torch modules, any device."""

    name = "reference"

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

    def options(self, model: ModelConfig, precision: PrecisionConfig) -> dict[str, Any]:
        return {}

    def equip(self, chunk: torch.nn.Module, *, model: ModelConfig, precision: PrecisionConfig) -> None:
        use_fast_product(chunk)

    def control(self, chunks: list[Any], *, precision: PrecisionConfig, mesh: Mesh, seed: int) -> PrecisionControl:
        return emulated.EmulatedPrecision(
            chunks,
            precision=precision,
            amax_group=mesh.groups.tp_dp_cp,
            shards=mesh.layout.data * mesh.layout.context,
            seed=seed * 1_000_003 + mesh.rank,
        )


class EmulatedBackend(ReferenceBackend):
    """The reference modules, with the GEMMs of the recipe's scaling computed in low precision."""

    name = "emulated"

    def equip(self, chunk: torch.nn.Module, *, model: ModelConfig, precision: PrecisionConfig) -> None:
        use_fast_product(chunk)
        emulated.equip(chunk, model=model, precision=precision)


class TransformerEngineBackend(te.TransformerEngineModules):
    """Megatron's Transformer Engine modules, with the stock Mamba-2 mixer on mamba-ssm kernels."""

    def mixer(self) -> type[MambaMixer]:
        return KernelMixer


def choose_backend(precision: PrecisionConfig, device: torch.device) -> Backend:
    """The backend a recipe asks for on this device.

    `auto` is `te` where that can run, else `emulated` for a low-precision recipe, else `reference`. Raises BackendError
    naming what is missing for an explicit `te`, or a scaling that a backend does not have.
    """
    scalings = {precision.scaling, precision.scaling_after if precision.switch_at_tokens is not None else "none"}
    is_low = scalings != {"none"}
    missing = []
    if device.type != "cuda":
        missing.append("a GPU")
    if not te.is_installed():
        missing.append("transformer-engine")
    if not have_mamba_kernels():
        missing.append("mamba-ssm with causal-conv1d")
    if precision.fp8_weights and (missing or precision.backend in ("reference", "emulated")):
        why = f"which needs {', '.join(missing)}" if missing else f"but precision.backend={precision.backend}"
        raise BackendError(f"precision.fp8_weights=true: only `te` keeps weights in FP8, {why}. Set fp8_weights=false.")
    match precision.backend:
        case "te" if missing:
            raise BackendError(
                f"precision.backend=te needs {', '.join(missing)}. Use precision.backend=emulated (low precision) or "
                f"reference, or install the `gpu` extra (`pip install -e '.[gpu]'`) on a machine with a GPU."
            )
        case "te" if "unscaled" in scalings:
            raise BackendError("precision.scaling=unscaled is an example of what goes wrong; only `emulated` has it.")
        case "reference" if is_low:
            raise BackendError(
                f"precision.backend=reference computes in high precision only, but precision.scaling={precision.scaling}"
                f" (scaling_after={precision.scaling_after}). Use precision.backend=emulated or te, or scaling=none."
            )
        case "te":
            return TransformerEngineBackend()
        case "auto" if not missing and "unscaled" not in scalings:
            return TransformerEngineBackend()
        case "emulated":
            return EmulatedBackend()
        case "auto" if is_low:
            return EmulatedBackend()
        case _:
            return ReferenceBackend()
