"""Low-precision linear layers on any device: Megatron's parallel linears with GEMM operands quantised bit for bit.

    x, weight --quantise--> values that the small format can represent --fp32 GEMM--> output   (gradients likewise)

A module keeps its class, weight, names and sharded checkpoint; only its function for the matrix product changes.
`recipes.schema.scaling` says how each operand is quantised, `train.precision.quantize` does it. The only difference to a
GPU is in the sums: tensor cores add the same products in another order and with fewer bits.

Delayed scaling has state: a scale and an amax history for input, weight and gradient of each linear, as buffers of the
module, so checkpoints move them to any layout. Another buffer marks layers that the health policy switched to high
precision. Scales are updated once per step, after amaxes were reduced over all microbatches and ranks, so they do not
depend on how a step is split over these. A rank computes the gradient of the mean over its own tokens, which grows with
the number of data shards: gradient scales are stored for one shard.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from recipes.schema.model import ModelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.scaling import (
    LINEARS,
    Operand,
    Orientation,
    Scaling,
    active_scaling,
    low_precision_linears,
    rule_numbers,
    scaling_of,
)
from train.native.gemm import Multiply, unchecked
from train.native.product_check import multiplier_of
from train.precision import health
from train.precision.control import Reading
from train.precision.quantize import Quantized, quantize, rotate, scale_from_history

ROWS = 32
"""Rows of an expert are filled up to a multiple of this. Transformer Engine needs it for MXFP8; NVFP4's rotation needs 16."""

OPERANDS = ("input", "weight", "grad")
"""Columns of the delayed-scaling state."""


@dataclass
class LowPrecisionLinear:
    """The mutable low-precision state of one linear layer during a step."""

    layer: int
    name: str
    module: torch.nn.Module
    expert: int | None = None
    """Index in the layer, if the module has the matrices of several experts (`train.model.grouped_linear`)."""
    rule: Scaling | None = None
    """Scaling by `precision.rules`; None: that of the step."""
    scaling: Scaling | None = None
    """Scaling of the current step; None: high precision."""
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Delayed scaling's encoding scales of input, weight and gradient."""
    amaxes: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Largest magnitudes seen in this step."""
    seed: int = 0
    """Seed of this step's stochastic rounding on this rank."""
    backwards: int = 0
    """Backward passes of this step so far; each rounds with its own seed."""
    weight_cache: tuple[Any, Quantized] | None = None
    """(key of the weight, the quantised weight), reused by the step's other microbatches and backward passes."""
    sums: dict[str, health.Sums] | None = None
    """Error sums of this step by operand; None if the step is not measured."""

    def operand(self, name: str) -> Operand:
        assert self.scaling is not None
        return getattr(self.scaling, name)

    def quantized(self, x: torch.Tensor, name: str, along: Orientation, *, record: bool) -> Quantized:
        """Quantise operand `name` of this layer. record: store its amax, and its error if the step is measured."""
        operand = self.operand(name)
        index = OPERANDS.index(name.removesuffix("_for_weight_grad"))
        scale = self.scales[index] if operand.rule == "history" else 1.0
        seed = zlib.crc32(f"{self.seed} {self.backwards} {name}".encode()) if operand.stochastic else 0
        result = quantize(x, operand, along, scale=scale, seed=seed)
        if record and result.amax is not None:
            self.amaxes[index] = max(self.amaxes[index], result.amax)
        if record and self.sums is not None and name not in self.sums:
            seen = rotate(x.contiguous()) if operand.hadamard else x
            self.sums[name] = health.measure(seen, result, operand, along, scale=scale)
        return result

    def quantized_weight(self, weight: torch.Tensor, along: Orientation, *, record: bool) -> Quantized:
        """The weight for the forward (`rows`) or the data-gradient GEMM (`columns`)."""
        if not self.operand("weight").same_both_ways:
            return self.quantized(weight, "weight", along, record=record)
        key = (weight.data_ptr(), weight._version)  # torch increases _version at every in-place update
        if self.weight_cache is None or self.weight_cache[0] != key or (record and self.scaling_needs_record()):
            self.weight_cache = (key, self.quantized(weight, "weight", along, record=record))
        return self.weight_cache[1]

    def scaling_needs_record(self) -> bool:
        """Whether this step's amax or error sums of the weight are still missing."""
        assert self.scaling is not None
        return (self.scaling.uses_history and self.amaxes[1] == 0.0) or (
            self.sums is not None and "weight" not in self.sums
        )


class _Product(torch.autograd.Function):
    """y = x W' with every operand of the three GEMMs quantised."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, linear: LowPrecisionLinear, record: bool
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scaling = linear.scaling
        assert scaling is not None
        qx = linear.quantized(rows, "input", "rows", record=record)
        qw = linear.quantized_weight(weight, "rows", record=record)
        ctx.linear, ctx.scaling, ctx.x_shape = linear, scaling, x.shape
        ctx.shares_input = scaling.input == scaling.input_for_weight_grad and scaling.input.same_both_ways
        ctx.input_factor = qx.factor
        ctx.save_for_backward(qx.values if ctx.shares_input else rows, weight)
        output = gemm("forward", linear, qx.values, qw.values.t(), qx.factor * qw.factor)
        return output.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:  # type: ignore[override]
        kept, weight = ctx.saved_tensors
        linear, scaling = ctx.linear, ctx.scaling
        rows = grad.reshape(-1, grad.shape[-1])
        linear.backwards += 1
        qg = linear.quantized(rows, "grad", "rows", record=True)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            qw = linear.quantized_weight(weight, "columns", record=False)
            product = gemm("data_grad", linear, qg.values, qw.values, qg.factor * qw.factor)
            grad_x = product.to(grad.dtype).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            if ctx.shares_input:
                qx = Quantized(kept, ctx.input_factor)
            else:
                qx = linear.quantized(kept, "input_for_weight_grad", "columns", record=True)
            if not (scaling.grad == scaling.grad_for_weight_grad and scaling.grad.same_both_ways):
                qg = linear.quantized(rows, "grad_for_weight_grad", "columns", record=True)
            product = gemm("weight_grad", linear, qg.values.t(), qx.values, qg.factor * qx.factor)
            grad_weight = product.to(weight.dtype)
        return grad_x, grad_weight, None, None


def gemm(name: str, linear: LowPrecisionLinear, a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * a b in fp32. All low-precision GEMMs call this, so tests can count them by name and layer.

    name: forward, data_grad or weight_grad.
    """
    where = name if linear.expert is None else f"expert {linear.expert} {name}"
    return multiplier_of(linear.module)(where, a, b, factor=factor)


def equip(chunk: torch.nn.Module, *, model: ModelConfig, precision: PrecisionConfig) -> None:
    """Add low-precision products and state to the linear layers that a recipe selects, in a freshly built chunk."""
    chosen, decided = low_precision_linears(model, precision), rule_numbers(model, precision)
    scalings = [scaling_of(precision), scaling_of(precision, precision.scaling_after)]
    has_history = any(scaling is not None and scaling.uses_history for scaling in scalings)
    for layer in chunk.decoder.layers:  # type: ignore[union-attr]
        index = layer.layer_number - 1
        for name in chosen.get(index, ()):
            module = layer.get_submodule(name)
            number = decided.get(index, {}).get(name)
            rule = None if number is None else scaling_of(precision, precision.rules[number].scaling)
            linear = LowPrecisionLinear(layer=index, name=name, module=module, rule=rule)
            device = module.weight.device
            if has_history:
                scale = torch.ones(len(OPERANDS), device=device)
                history = torch.zeros(precision.amax_history, len(OPERANDS), device=device)
                module.register_buffer("low_precision_scale", scale)
                module.register_buffer("low_precision_history", history)
            module.register_buffer("low_precision_off", torch.zeros(1, device=device))
            if name in LINEARS["E"]:
                module.low_precision = [
                    replace(linear, expert=module.first_expert + local) for local in range(module.experts)
                ]
                module._forward_impl = _grouped_product_of(module.low_precision, module._forward_impl)
                continue
            module.low_precision = [linear]
            module._forward_impl = _product_of(linear, module._forward_impl)


def _product_of(linear: LowPrecisionLinear, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function that a parallel linear calls for its product and collectives; same contract as Megatron's.

    The input is gathered and then quantised. Transformer Engine quantises each rank's part with an amax reduced over the
    tensor group, which gives the same numbers.
    """

    def product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **arguments: Any) -> torch.Tensor:
        if linear.scaling is None:
            return plain(input=input, weight=weight, bias=bias, **arguments)
        assert bias is None, "low-precision linears have no bias"
        if arguments["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=arguments["tp_group"])
        elif arguments["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=arguments["tp_group"])
        return _Product.apply(input, weight, linear, torch.is_grad_enabled())

    return product


def _grouped_product_of(
    linears: list[LowPrecisionLinear], plain: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """The same for the experts of a rank: each expert's rows are quantised by themselves, filled up with zeros to `ROWS`."""

    def product(
        x: torch.Tensor, weight: torch.Tensor, counts: list[int], *, multiply: Multiply = unchecked
    ) -> torch.Tensor:
        if linears[0].scaling is None:
            return plain(x, weight, counts, multiply=multiply)
        outputs = []
        for linear, rows, matrix in zip(linears, x.split(counts), weight, strict=True):
            count = len(rows)
            if not count:
                linear.sums = None  # an error of nothing is not measured
            padded = torch.nn.functional.pad(rows, (0, 0, 0, -count % ROWS if count else ROWS))
            outputs.append(_Product.apply(padded, matrix, linear, torch.is_grad_enabled())[:count])
        return torch.cat(outputs)

    return product


class EmulatedPrecision:
    """PrecisionControl of this rank's linear layers that `equip` changed; without such layers it does nothing."""

    def __init__(
        self, chunks: list[Any], *, precision: PrecisionConfig, amax_group: dist.ProcessGroup, shards: int, seed: int
    ) -> None:
        """amax_group: ranks over which delayed scaling reduces amaxes. shards: data-parallel times context ranks.

        seed: seed of stochastic rounding, different on every rank.
        """
        parts = [part for chunk in chunks for part in chunk.modules()]
        self.linears: list[LowPrecisionLinear] = [one for part in parts for one in getattr(part, "low_precision", ())]
        self.precision = precision
        self.amax_group = amax_group
        self.shards = shards
        self.seed = seed
        self.begin_step(step=0, tokens=0)

    def active(self) -> str:
        return self._of_step if any(linear.scaling is not None for linear in self.linears) else "none"

    def begin_step(self, *, step: int, tokens: int, measure: bool = False) -> None:
        scaling = active_scaling(self.precision, tokens)
        self._of_step = "none" if scaling is None else scaling.name
        for linear in self.linears:
            linear.scaling = None if scaling is None or _is_off(linear) else linear.rule or scaling
            if linear.scaling is not None and linear.scaling.uses_history:
                input, weight, grad = linear.module.low_precision_scale.tolist()
                linear.scales = (input, weight, grad / self.shards)
            linear.amaxes = [0.0, 0.0, 0.0]
            place = linear.name if linear.expert is None else f"{linear.name} {linear.expert}"
            linear.seed = zlib.crc32(f"{self.seed} {step} {linear.layer} {place}".encode())
            linear.backwards = 0
            linear.weight_cache = None
            linear.sums = {} if measure else None

    def finish_step(self) -> None:
        for linear in self.linears:
            linear.weight_cache = None
        live = [linear for linear in self.linears if linear.scaling is not None and linear.scaling.uses_history]
        if not live:
            return
        amaxes = torch.tensor([linear.amaxes for linear in live], device=live[0].module.low_precision_scale.device)
        amaxes[:, OPERANDS.index("grad")] /= self.shards
        if self.amax_group.size() > 1:
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.amax_group)
        for linear, amax in zip(live, amaxes, strict=True):
            assert linear.scaling is not None
            maxima = torch.tensor([linear.operand(name).format.max for name in OPERANDS], device=amax.device)
            history = linear.module.low_precision_history
            history[0] = torch.maximum(history[0], amax)
            most_recent = self.precision.amax_from == "most_recent"
            scale_from_history(history, linear.module.low_precision_scale, maxima, most_recent=most_recent)

    def gather_state(self) -> None: ...  # the buffers are the state

    def apply_state(self) -> None: ...

    def health(self) -> list[Reading]:
        mine = [
            ((linear.layer, linear.name, operand), (sums, linear.operand(operand)))
            for linear in self.linears
            if linear.sums and linear.scaling is not None
            for operand, sums in linear.sums.items()
        ]
        ranks: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        readings = []
        for key in sorted({key for rank in ranks for key, _ in rank}):
            found = [each for rank in ranks for place, each in rank if place == key]
            layer, name, operand = key
            readings.append(
                health.reading(
                    health.merged([sums for sums, _ in found]),
                    layer=layer,
                    linear=name,
                    name=operand,
                    operand=found[0][1],
                    floor_db=self.precision.health_floor_db,
                )
            )
        if self.precision.health_policy == "high_precision":
            unhealthy = {(r.layer, r.linear) for r in readings if not r.is_healthy}
            for linear in self.linears:
                if (linear.layer, linear.name) in unhealthy:
                    linear.module.low_precision_off.fill_(1.0)
        return readings


def _is_off(linear: LowPrecisionLinear) -> bool:
    """Whether the health policy switched this layer to high precision, in this run or before it was resumed."""
    return bool(linear.module.low_precision_off.item())
