"""Initial weights that depend on the seed and the parameter's name only.

Megatron draws each rank's shard from the rank's own random stream, so the same seed gives different models at different
layouts. Here the whole tensor of each parameter is drawn from a generator seeded with (seed, global name), and the rank
keeps its part: every layout starts from the same weights, and losses can be compared across layouts.

Rules (L layers): projections N(0, init_std); projections into the residual stream N(0, init_std / sqrt(L)); norm weights
and D one (zero for norm weights to which one is added); A uniform in [1, 16]; softplus(dt_bias) log-uniform in
[0.001, 0.1]; convolution uniform in +-1/sqrt(taps) (mamba-ssm's Mamba2 module, arXiv 2405.21060); a scalar head
N(0, 1/sqrt(hidden + 1)) (arXiv 2009.01325); adapters' `down` uniform in +-1/sqrt(inputs), as torch's linears, and `up` zero
(arXiv 2106.09685, section 4.1). Encoders: the same for their projections, with L their own layers; biases zero, norms one; what
takes pixels and frames in N(0, 1/sqrt(inputs)); learned positions N(0, init_std).

Each expert's matrix is drawn by itself, seeded with the name and the expert's index in the layer.

Cost: a rank draws the full tensor of each of its parameters, one at a time, on the CPU.
"""

import hashlib
import math
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds

_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight", "latent_out.weight")
HEAD = "output_layer.weight"
ADAPTER_DOWN, ADAPTER_UP = "_adapter.down", "_adapter.up"
MTP = "mtp."
"""The beginning of the names of all weights of further depths."""
MEDIA = "media."
"""The beginning of the names of all weights of encoders and projectors."""
_PLAIN = (
    "linear_qkv.weight",
    "linear_fc1.weight",
    "in_proj.weight",
    "word_embeddings.weight",
    HEAD,
    "router.weight",
    "latent_in.weight",
    "eh_proj.weight",
)
_GATED_NORM = "mixer.norm.weight"
_NORMS = ("norm.weight", "layernorm.weight", "layer_norm_weight")
A_RANGE = (1.0, 16.0)
DT_RANGE = (1e-3, 0.1)
DT_FLOOR = 1e-4


def global_names(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name with layer indices of the whole model, from 0; parameter) for every parameter in this rank's chunk."""
    layers = chunk.decoder.layers
    for name, parameter in chunk.named_parameters():
        match = re.match(r"decoder\.layers\.(\d+)\.", name)
        if match is not None:
            index = layers[int(match.group(1))].layer_number - 1
            name = f"decoder.layers.{index}.{name[match.end() :]}"
        yield name, parameter


def initialize(
    chunk: nn.Module, *, model: ModelConfig, seed: int, tensor_group: dist.ProcessGroup, only: str = ""
) -> None:
    """Fill every parameter of `chunk` in place, or those whose name begins with `only`. Same result for the same seed at every
    layout. Not collective.

    Parameters without memory (meta device) are skipped.
    """
    layers = len(layer_kinds(model.pattern))
    for name, parameter in global_names(chunk):
        if parameter.is_meta or not name.startswith(only):
            continue
        if not model.has_own_head and name == HEAD:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage's copy of the one matrix
        if (linear := getattr(parameter, "part_of_experts", None)) is not None:
            for local, weight in enumerate(parameter.data):
                one = f"{name}/{linear.first_expert + local}"
                whole = _draw(name, linear.whole_shape, model=model, layers=layers, seed=seed, stream=one)
                weight.copy_(linear.part_of(whole))
            continue
        whole = _draw(name, _whole_shape(parameter, tensor_group.size()), model=model, layers=layers, seed=seed)
        parameter.data.copy_(_part(whole, parameter, rank=tensor_group.rank(), ranks=tensor_group.size()))


def _whole_shape(parameter: nn.Parameter, ranks: int) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= ranks
    return shape


def _part(whole: torch.Tensor, parameter: nn.Parameter, *, rank: int, ranks: int) -> torch.Tensor:
    """This rank's part of a whole tensor. Fused projections are split component by component, as Megatron does."""
    if ranks == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim = parameter.partition_dim
    pieces = getattr(parameter, "partition_sizes", None)
    if pieces is None:
        stride = getattr(parameter, "partition_stride", 1)
        pieces = [parameter.shape[dim] // stride] * stride
    components = whole.split([size * ranks for size in pieces], dim)
    return torch.cat([component.chunk(ranks, dim)[rank] for component in components], dim)


def _draw(
    name: str, shape: list[int], *, model: ModelConfig, layers: int, seed: int, stream: str | None = None
) -> torch.Tensor:
    """Initial values of a parameter. stream: what the generator is seeded with, if not the name."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{stream or name}".encode()).digest()[:8], "little") >> 1
    )

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if name.startswith(MEDIA):
        return _draw_encoder(name, shape, model=model, generator=generator)
    if name == HEAD and model.head == "scalar":
        return torch.empty(shape).normal_(0.0, 1 / math.sqrt(model.hidden + 1), generator=generator)
    if name.endswith(ADAPTER_DOWN):
        bound = 1 / math.sqrt(shape[1])
        return uniform(-bound, bound)
    if name.endswith(ADAPTER_UP):
        return torch.zeros(shape)
    if name.endswith(_RESIDUAL):
        return torch.empty(shape).normal_(0.0, model.init_std / math.sqrt(layers), generator=generator)
    if name.endswith(_PLAIN):
        return torch.empty(shape).normal_(0.0, model.init_std, generator=generator)
    if name.endswith(_NORMS) and not name.endswith(_GATED_NORM):
        return torch.full(shape, 1.0 - model.norm_offset)
    if name.endswith((_GATED_NORM, "mixer.D")):
        return torch.ones(shape)
    if name.endswith(("conv1d_weight", "conv1d_bias")):
        bound = 1 / math.sqrt(model.mamba_conv)
        return uniform(-bound, bound)
    if name.endswith("A_log"):
        return uniform(*A_RANGE).log()
    if name.endswith("dt_bias"):
        dt = uniform(math.log(DT_RANGE[0]), math.log(DT_RANGE[1])).exp().clamp(min=DT_FLOOR)
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    raise AssertionError(f"no rule for the initial value of {name}: add one to train/model/initial.py")


def _draw_encoder(name: str, shape: list[int], *, model: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """Initial values of a parameter of `train.model.media`."""
    depth = {"vision": model.vision.layers, "audio": model.audio.layers}.get(name.split(".")[1], 1)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "layernorm" in name:
        return torch.ones(shape)
    if name.endswith(("patch_embedding.weight", "conv1.weight", "conv2.weight")):
        return torch.empty(shape).normal_(0.0, 1 / math.sqrt(math.prod(shape[1:])), generator=generator)
    std = model.init_std / math.sqrt(depth) if name.endswith(_RESIDUAL) else model.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
