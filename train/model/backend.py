"""Which modules a model is made of. The backend is an object, chosen once; no other code tests which backend runs.

A backend is Megatron's BackendSpecProvider (linear layers, norm, attention core) plus the Mamba-2 mixer and the hooks for
low precision. `reference` is plain torch on any device; `emulated` is the same modules with emulated low precision
(`train.precision.emulated`); `te` is Transformer Engine with mamba-ssm kernels on a GPU (`train.precision.te`).
"""

import os
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from recipes.schema.errors import BackendError, refuse
from recipes.schema.facts import Machine, missing_packages, wants_fp32_block_scales
from recipes.schema.model import ModelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.rules import backend_name, backend_problems, low_precision_problems
from recipes.schema.weight_formats import weight_format
from train.model.attention import AttentionCore
from train.model.linear import use_fast_product
from train.model.mixer import KernelMixer, ReferenceMixer
from train.model.norm import RMSNorm
from train.model.quantized_linear import train_rounded
from train.parallel.mesh import Mesh
from train.precision import emulated, te
from train.precision.control import PrecisionControl

_GENERATIONS = {(8, 0): "ampere", (8, 6): "ampere", (8, 9): "ada", (9, 0): "hopper"}
"""Compute capability -> generation (CUDA C++ Programming Guide, appendix on compute capabilities); 10.0 and above is
Blackwell."""


class Backend(Protocol):
    """The module classes that `train.model.build` puts into a model spec."""

    name: str

    @abstractmethod
    def column_parallel_linear(self) -> type: ...

    @abstractmethod
    def row_parallel_linear(self) -> type: ...

    @abstractmethod
    def column_parallel_layer_norm_linear(self) -> type | None:
        """The class that fuses norm and linear, or None if the backend has none."""

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
        """The object by which the training loop controls low precision, for all chunks of this rank."""


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
        if precision.quantize_weights != "none":
            train_rounded(chunk, model, weight_format(precision.quantize_weights))

    def control(self, chunks: list[Any], *, precision: PrecisionConfig, mesh: Mesh, seed: int) -> PrecisionControl:
        return emulated.EmulatedPrecision(
            chunks,
            precision=precision,
            amax_group=mesh.groups.tp_dp_cp,
            shards=mesh.layout.data * mesh.layout.context,
            seed=seed * 1_000_003 + mesh.rank,
        )


class EmulatedBackend(ReferenceBackend):
    """The reference modules, with GEMMs computed in emulated low precision by the recipe's scaling."""

    name = "emulated"

    def equip(self, chunk: torch.nn.Module, *, model: ModelConfig, precision: PrecisionConfig) -> None:
        use_fast_product(chunk)
        emulated.equip(chunk, model=model, precision=precision)


class TransformerEngineBackend(te.TransformerEngineModules):
    """Megatron's Transformer Engine modules, with the stock Mamba-2 mixer on mamba-ssm kernels."""

    def mixer(self) -> type[MambaMixer]:
        return KernelMixer


def this_machine() -> Machine:
    """The facts about this machine that the recipe rules need."""
    has_gpu = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if has_gpu else (0, 0)
    return Machine(
        has_gpu=has_gpu,
        name=torch.cuda.get_device_name() if has_gpu else "this machine",
        generation=_GENERATIONS.get((major, minor), "blackwell" if major > 9 else ""),
        has_fp8=(major, minor) >= (8, 9),
        missing=missing_packages(),
        fp32_block_scales=wants_fp32_block_scales(os.environ),
    )


def choose_backend(precision: PrecisionConfig, device: torch.device) -> Backend:
    """The backend that a recipe selects on this device (`recipes.schema.rules.backend_name`).

    Raises BackendError if a package or the hardware is missing, or if the backend does not support the scaling.
    """
    machine = replace(this_machine(), has_gpu=device.type == "cuda")
    refuse([*low_precision_problems(precision), *backend_problems(precision, machine)], BackendError)
    match backend_name(precision, machine):
        case "te":
            return TransformerEngineBackend()
        case "emulated":
            return EmulatedBackend()
        case "reference":
            return ReferenceBackend()
