"""The mixture of experts of an `E` layer: router, exchange of tokens between expert ranks, experts, weighted sum.

    hidden --router--> weights p and choices          Megatron's TopKRouter: scores, groups, bias, auxiliary losses, capacity
           --sort by expert, send--> rows of this rank's experts --fc1, activation, fc2--> --send back, sum p y--> output
           --shared expert (an MLP) ------------------------------------------------------------------------------^

Not Megatron's MoELayer: its experts need Transformer Engine or run one after the other, its exchange needs NCCL, and its latent
projections need Transformer Engine (docs/experts.md). The router, the shared expert, the balancing of loads and the treatment of
gradients are Megatron's.

Letters of shapes: S sequence, B rows, H hidden, T = S B tokens of this rank, E experts, L the routed experts' width, N rows in
experts (T x top_k without drops).
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from recipes.schema.experts import ExpertsConfig
from train.model.activation import FeedForward
from train.model.grouped_linear import GroupedLinear
from train.model.linear import fast_linear
from train.native.product_check import multiplier_of
from train.parallel.exchange import exchange_rows, gather_rows, scatter_rows
from train.parallel.mesh import Mesh


def router_options(experts: ExpertsConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for the router of `E` layers."""
    kinds = {"none": "none", "microbatch": "aux_loss", "row": "seq_aux_loss"}
    is_grouped = experts.groups > 1
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.score,
        "moe_router_pre_softmax": experts.score == "softmax" and experts.top_k == 1,
        "moe_router_num_groups": experts.groups if is_grouped else None,
        "moe_router_group_topk": experts.top_groups if is_grouped else None,
        "moe_router_topk_scaling_factor": experts.scaling,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": kinds[experts.aux_loss],
        "moe_aux_loss_coeff": experts.aux_coefficient if experts.aux_loss != "none" else 0.0,
        "moe_router_enable_expert_bias": experts.bias_rate > 0,
        "moe_router_bias_update_rate": experts.bias_rate,
        "moe_expert_capacity_factor": experts.capacity,
        "moe_token_dispatcher_type": "alltoall",
    }


@dataclass
class Load:
    """What a router did since the last reading, on this rank's tokens."""

    per_expert: torch.Tensor
    """Rows of each expert after drops, int64 [E]."""
    tokens: int = 0
    entropy: float = 0.0
    """Sum over tokens of the entropy of the scores, in nats, as if they were a distribution over all experts."""


@dataclass(frozen=True)
class LoadReading:
    """The router of one layer since the last reading, over all ranks."""

    layer: int
    """Index in the model, from 0."""
    load_max: float
    """Rows of the busiest expert, as a multiple of the mean."""
    load_min: float
    entropy: float
    """Mean entropy of a token's scores, as a share of the largest possible: 1 if all experts are equally likely."""
    dropped: float
    """Share of a token's choices that were dropped for lack of capacity."""
    bias_min: float
    """Smallest bias with which experts are chosen; 0 without a bias."""
    bias_max: float


def expert_loads(chunks: Sequence[Any], mesh: Mesh) -> list[LoadReading]:
    """The reading of every `E` layer, in order, and a new start for the next one; [] for a model without any.

    Collective over the world.
    """
    config = chunks[0].module.config
    if config.num_moe_experts is None:
        return []
    mine = {}
    for layer in _layers(chunks):
        mine[layer.layer_number - 1] = layer.take_load()
    ranks = mesh.gather_objects(mine)
    readings = []
    for number in sorted({number for rank in ranks for number in rank}):
        found = [rank[number] for rank in ranks if number in rank]
        rows = torch.stack([load.per_expert for load, _ in found]).sum(0).double()
        tokens = max(1, sum(load.tokens for load, _ in found))
        mean = max(float(rows.mean()), 1.0)
        entropy = sum(float(load.entropy) for load, _ in found) / tokens
        low, high = found[0][1]
        readings.append(
            LoadReading(
                layer=number,
                load_max=float(rows.max()) / mean,
                load_min=float(rows.min()) / mean,
                entropy=entropy / math.log(config.num_moe_experts) if config.num_moe_experts > 1 else 1.0,
                dropped=1 - float(rows.sum()) / (tokens * config.moe_router_topk),
                bias_min=low,
                bias_max=high,
            )
        )
    return readings


def loads_of(chunks: Sequence[Any]) -> list[Load]:
    """Copies of what this rank's routers have counted since the last reading, for `set_loads`."""
    return [
        Load(layer.load.per_expert.clone(), layer.load.tokens, float(layer.router.entropy)) for layer in _layers(chunks)
    ]


def set_loads(chunks: Sequence[Any], loads: list[Load]) -> None:
    """Go back to these counts: what was computed since is computed again, or was not training."""
    for layer, load in zip(_layers(chunks), loads, strict=True):
        layer.load = Load(load.per_expert.clone(), load.tokens)
        layer.router.entropy = load.entropy


def start_counting(chunks: Sequence[Any]) -> None:
    """Begin a step: forget the rows that earlier steps sent to experts."""
    for layer in _layers(chunks):
        layer.step_rows.zero_()


@torch.no_grad()
def update_biases(chunks: Sequence[Any], group: dist.ProcessGroup) -> None:
    """Move the bias of each expert by `bias_rate` towards the mean load of the step (arXiv 2408.15664, algorithm 1).

    Counts are whole numbers, so the bias is the same at every layout. Collective over `group`, the ranks of a pipeline stage.
    """
    layers = [layer for layer in _layers(chunks) if layer.router.expert_bias is not None]
    layers = [
        layer for layer in layers if layer.router.weight.requires_grad
    ]  # a frozen router keeps its bias (model.lora)
    if not layers:
        return
    rows = torch.stack([layer.step_rows for layer in layers])
    if group.size() > 1:
        dist.all_reduce(rows, group=group)
    towards = (rows.double().mean(1, keepdim=True) - rows).sign()
    for layer, sign in zip(layers, towards, strict=True):
        layer.router.expert_bias += layer.config.moe_router_bias_update_rate * sign.to(torch.float32)


def _layers(chunks: Sequence[Any]) -> Iterator["ExpertLayer"]:
    for chunk in chunks:
        yield from (part for part in chunk.modules() if isinstance(part, ExpertLayer))


class Router(TopKRouter):
    """Megatron's router, which also sums the entropy of its scores, and drops tokens (`capacity`) in training only: otherwise the
    numbers of an evaluated or generated text would depend on the texts that are read with it.

    Megatron would update the bias when gradients are complete. A save in the background may still copy the state then, and a
    step may yet be skipped: `update_biases` does it with the weights.
    """

    entropy: torch.Tensor | float = 0.0

    def __init__(self, config: TransformerConfig, *, pg_collection: Any) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.frozen_expert_bias = True
        self._in_training = config
        self._without_capacity = copy(config)
        self._without_capacity.moe_expert_capacity_factor = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and whether tokens are dropped."""
        super().train(mode)
        self.config = self._in_training if mode else self._without_capacity
        return self

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        """logits [sequence, rows, experts] -> (weights, choices), both [tokens, experts]."""
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                wide = logits.float()
                scores = torch.sigmoid(wide) if self.score_function == "sigmoid" else wide.softmax(-1)
                shares = scores / scores.sum(-1, keepdim=True)
                self.entropy = self.entropy + torch.special.entr(shares).sum()
        return super().routing(logits, padding_mask=padding_mask)


class _Combine(torch.autograd.Function):
    """out[t] = sum of weight[n] y[n] over the rows n of token t, in y's dtype; sums in fp32, in the order of experts."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weight: torch.Tensor, token: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.save_for_backward(y, weight, token)
        wide = torch.promote_types(y.dtype, weight.dtype)
        scaled = y.to(wide) * weight.to(wide)[:, None]
        return torch.zeros(tokens, y.shape[1], dtype=wide, device=y.device).index_add_(0, token, scaled).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:  # type: ignore[override]
        y, weight, token = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, weight.dtype)
        rows = grad.to(wide).index_select(0, token)
        grad_weight = torch.linalg.vecdot(rows, y.to(wide)).to(weight.dtype)
        return rows.mul_(weight.to(wide)[:, None]).to(y.dtype), grad_weight, None, None


class Experts(MegatronModule):
    """The routed experts of this rank: fc1, activation, fc2 on rows sorted by expert."""

    def __init__(self, config: TransformerConfig, *, width: int, groups: Any) -> None:
        super().__init__(config)  # whose sharded state asks each linear for its own
        assert config.moe_ffn_hidden_size is not None
        ffn, self.activation = config.moe_ffn_hidden_size, config.activation_func
        branches = 2 if config.gated_linear_unit else 1
        self.linear_fc1 = GroupedLinear(
            config, inputs=width, outputs=ffn, branches=branches, split="out", groups=groups
        )
        self.linear_fc2 = GroupedLinear(config, inputs=ffn, outputs=width, split="in", groups=groups)

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """[rows, width] -> the same shape; a partial sum if expert-tensor ranks divide `ffn`."""
        return self.linear_fc2(self.activation(self.linear_fc1(x, counts)), counts)


class ExpertLayer(MegatronModule):
    """The `mlp` of an `E` layer."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        experts: ExpertsConfig,
        shared: MLPSubmodules,
        pg_collection: Any,
        **_unused: Any,
    ) -> None:
        """shared: the linear classes of the shared expert. pg_collection: Megatron's process groups."""
        super().__init__(config)
        self.groups = pg_collection
        device = torch.cuda.current_device()
        self.router = Router(config, pg_collection=pg_collection).to(device)
        width = experts.latent or config.hidden_size
        self.latent_in = self.latent_out = None
        if experts.latent:
            self.latent_in = _projection(config, config.hidden_size, width)
            self.latent_out = _projection(config, width, config.hidden_size)
        self.experts = Experts(config, width=width, groups=pg_collection)
        self.shared_experts = None
        if experts.shared_ffn:
            own = copy(config)
            own.ffn_hidden_size = experts.shared_ffn
            self.shared_experts = FeedForward(
                own, shared, ffn_hidden_size=experts.shared_ffn, tp_group=pg_collection.tp
            )
        self.load = Load(torch.zeros(experts.count, dtype=torch.int64, device=device))
        self.step_rows = torch.zeros(experts.count, dtype=torch.int64, device=device)
        """Rows of each expert in this step so far, on this rank."""

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router its layer, counted from 1 in the whole model."""
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)

    def forward(self, hidden_SBH: torch.Tensor, **_unused: Any) -> tuple[torch.Tensor, None]:
        """[sequence, rows, hidden] of this rank -> the same shape. Collective over the expert and expert-tensor groups, and over
        the tensor group (shared expert)."""
        weights_TE, chosen_TE = self.router(hidden_SBH)
        if self.training and torch.is_grad_enabled():
            rows = chosen_TE.sum(0)
            self.step_rows += rows
            self.load.per_expert += rows
            self.load.tokens += chosen_TE.shape[0]
        x = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        if self.latent_in is not None:
            x = _projected(x, self.latent_in)
        # Rows by expert, and of an expert by token: the order in which a token's results are summed is the same at every layout.
        chosen_ET = chosen_TE.t().contiguous()
        token_N = chosen_ET.nonzero(as_tuple=True)[1]
        weight_N = weights_TE.t().masked_select(chosen_ET)
        sent = chosen_ET.sum(1)
        y = self._through_experts(x.index_select(0, token_N), sent)
        out = _Combine.apply(y, weight_N, token_N, x.shape[0])
        if self.latent_out is not None:
            out = _projected(out, self.latent_out)
        out = out.view_as(hidden_SBH)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_SBH)[0]
        return out, None

    def _through_experts(self, x: torch.Tensor, sent_E: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert -> their experts' outputs, in the same order. sent_E: rows for each expert."""
        expert, tensor = self.groups.ep, self.groups.expt_tp
        if expert.size() == tensor.size() == 1:
            return self.experts(x, sent_E.tolist())
        both = self.groups.tp_ep  # all expert ranks of all expert-tensor ranks; expert-tensor ranks are neighbours
        everyone = sent_E.new_empty(both.size() * sent_E.numel())
        dist.all_gather_into_tensor(everyone, sent_E.contiguous(), group=both)
        # [expert rank of the sender, expert-tensor rank of the sender, expert rank of the receiver, its experts]
        table = everyone.view(expert.size(), tensor.size(), expert.size(), -1)
        mine = table[:, :, expert.rank()]  # rows for this rank's experts
        send = table[expert.rank(), tensor.rank()].sum(-1).tolist()
        receive = mine[:, tensor.rank()].sum(-1).tolist()
        of_peers = mine.sum((0, 2)).tolist()
        x = exchange_rows(x, send=send, receive=receive, group=expert)
        x = gather_rows(x, counts=of_peers, group=tensor)
        # Now rows are in the order (expert-tensor rank, expert rank, expert, token). Sort them by expert.
        chunks = mine.transpose(0, 1).reshape(-1)
        labels = torch.arange(mine.shape[-1], device=x.device).repeat(chunks.numel() // mine.shape[-1])
        order = labels.repeat_interleave(chunks).argsort(stable=True)
        y = self.experts(x.index_select(0, order), mine.sum((0, 1)).tolist())
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = scatter_rows(y.index_select(0, back), counts=of_peers, group=tensor)
        return exchange_rows(y, send=receive, receive=send, group=expert)

    def take_load(self) -> tuple[Load, tuple[float, float]]:
        """This rank's load since the last call, and the range of the bias."""
        load = Load(self.load.per_expert.cpu(), self.load.tokens, float(self.router.entropy))
        self.load = Load(torch.zeros_like(self.load.per_expert))
        self.router.entropy = 0.0
        bias = self.router.expert_bias
        return load, (0.0, 0.0) if bias is None else (float(bias.min()), float(bias.max()))


def _projection(config: TransformerConfig, inputs: int, outputs: int) -> nn.Linear:
    """A latent projection, the same on every rank. Under sequence parallelism ranks have parts of its gradient."""
    device = torch.cuda.current_device()
    linear = nn.Linear(inputs, outputs, bias=False, dtype=config.params_dtype, device=device)
    linear.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return linear


def _projected(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return fast_linear(x, linear.weight, None, False, False, False, multiply=multiplier_of(linear))
