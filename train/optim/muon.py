"""Muon for the matrices of a model whose optimizer state is sharded: momentum, orthogonalized by a Newton-Schulz iteration.

    M <- momentum M + (1 - momentum) G;  U = momentum M + (1 - momentum) G (Nesterov) or M
    W <- W - lr (0.2 sqrt(max(rows, columns)) NewtonSchulz(U) + weight_decay W)

Muon: Keller Jordan, https://kellerjordan.github.io/posts/muon/ (iteration, coefficients, Nesterov). Weight decay and the scale,
which gives an update the root mean square of AdamW's: Moonlight, arXiv 2502.16982, section 2.2; also Kimi K2, arXiv 2507.20534.
Rows and columns are those of the matrix that is orthogonalized.

A rank has a slice of the momentum and of the fp32 weights. Whole matrices exist only during the update:

    slices --data ranks--> a rank's part of a parameter --cut--> matrices --tensor ranks--> whole matrices --> and back

Each matrix has one owner among the ranks that share it and is orthogonalized once. The result does not depend on the layout,
except for the rounding of gradients. Products run in fp32 on a CPU and in bf16, as published, on a GPU (not run).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from recipes.schema.muon import iteration_cost
from recipes.schema.optim import MuonConfig
from train.optim.owners import Exchange, assign_owners
from train.parallel.mesh import Mesh

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Keller Jordan's post): the steepest slope at zero; singular values end between about 0.7 and 1.2."""
UPDATE_RMS = 0.2
"""Usual root mean square of AdamW's updates (Moonlight, section 2.2)."""
MOST_ELEMENTS = 2**26
"""Experts' matrices are multiplied together, up to this number of elements: it limits temporary memory."""
_EPS = 1e-7


def orthogonalize(matrices: torch.Tensor, *, iterations: int) -> torch.Tensor:
    """Matrices with the same singular vectors and singular values near 1. matrices: [count, rows, columns], fp32 or float64."""
    a, b, c = COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=_EPS)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    if x.device.type == "cuda":
        x = x.to(torch.bfloat16)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def update_scale(rows: int, columns: int) -> float:
    """Factor of an orthogonalized matrix (Moonlight, section 2.2)."""
    return UPDATE_RMS * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class Cut:
    """How a rank's part of a parameter is cut into matrices."""

    count: int
    """Parameters that are stacked in this one: experts and their branches."""
    groups: int
    """How often the fused projections repeat along the rows: key-value heads."""
    sizes: tuple[int, ...]
    """Rows of each fused projection in one group."""
    columns: int
    split: Literal["rows", "columns", "none"]
    """What the tensor ranks divide."""

    def views(self, part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each projection of this rank's part, [count, groups, size, columns]. part: flat and contiguous."""
        return part.view(self.count, self.groups, sum(self.sizes), self.columns).split(self.sizes, 2)

    def shapes(self, ranks: int) -> list[tuple[int, int]]:
        """Rows and columns of each projection on all tensor ranks together."""
        down, across = ranks if self.split == "rows" else 1, ranks if self.split == "columns" else 1
        return [(self.groups * size * down, self.columns * across) for size in self.sizes]

    def cost(self, ranks: int) -> int:
        """Operations of one iteration, up to a constant factor."""
        return sum(self.count * iteration_cost(*shape) for shape in self.shapes(ranks))


def matrix_cuts(chunk: nn.Module, *, split_fused: bool) -> dict[nn.Parameter, Cut]:
    """The parameters of a model chunk that Muon updates: all matrices except embedding, head and encoders, and the weights of
    experts."""
    found = {}
    for name, parameter in chunk.named_parameters():
        if not parameter.requires_grad or name.startswith(("embedding.", "output_layer.", "media.")):
            continue
        *outer, rows, columns = parameter.shape if parameter.dim() > 1 else (1, 1)
        split: Literal["rows", "columns", "none"] = "none"
        if (experts := getattr(parameter, "part_of_experts", None)) is not None:
            split = "rows" if experts.split_dim == parameter.dim() - 2 else "columns"
            if not split_fused:
                outer, rows = outer[:1], math.prod(outer[1:]) * rows
            found[parameter] = Cut(math.prod(outer), 1, (rows,), columns, split)
        elif parameter.dim() == 2:
            if getattr(parameter, "tensor_model_parallel", False):
                split = "columns" if parameter.partition_dim else "rows"  # type: ignore[attr-defined]
            groups, sizes = _fused(name, parameter, chunk.config) if split_fused else (1, (rows,))
            found[parameter] = Cut(1, groups, sizes, columns, split)
    return found


def _fused(name: str, parameter: nn.Parameter, config: Any) -> tuple[int, tuple[int, ...]]:
    """The projections that a weight contains: how often they repeat, and the rows of each."""
    rows = parameter.shape[0]
    if name.endswith("linear_qkv.weight"):  # for each key-value head its queries, key and value
        head = config.kv_channels
        sizes = (config.num_attention_heads // config.num_query_groups * head, head, head)
        return rows // sum(sizes), sizes
    if (pieces := getattr(parameter, "partition_sizes", None)) is not None:  # in_proj: z, x, B, C, dt
        return 1, tuple(pieces)
    branches = getattr(parameter, "partition_stride", 1)  # 2 in a gated MLP
    return 1, (rows // branches,) * branches


class Muon:
    """Updates the matrices of one part of Megatron's distributed optimizer. State of a slice: `exp_avg` (the momentum), and
    `largest_update`, which is not saved (`train.checkpoint.stale` reads it)."""

    def __init__(self, part: Any, cuts: dict[nn.Parameter, Cut], *, config: MuonConfig, mesh: Mesh) -> None:
        """part: a `DistributedOptimizer`. cuts: all matrices of this rank's model, in the order of the model. Collective over
        the data-parallel ranks of the part."""
        self._config = config
        is_expert = part.optimizer.param_groups[0]["is_expert_parallel"]
        group, tensor = part.data_parallel_group, mesh.groups.expt_tp if is_expert else mesh.groups.tp
        parameters = [p for p in cuts if getattr(p, "allreduce", True) != is_expert]
        self._slices = [_slice_of(part, parameter) for parameter in parameters]
        self._state = part.optimizer.state
        self._nothing = torch.empty(0, device=mesh.device)
        ranges: list[Any] = [[_range_of(part, parameter) for parameter in parameters]]
        if group.size() > 1:
            mine, ranges = ranges[0], [None] * group.size()
            dist.all_gather_object(ranges, mine, group=group)
        by_parameter = list(zip(*ranges, strict=True))
        for parameter, bounds in zip(parameters, by_parameter, strict=True):
            ends = [0, *(end for start, end in bounds if end > start)]
            in_order = [(start, end) for start, end in bounds if end > start] == list(pairwise(ends))
            assert in_order and ends[-1] == parameter.numel(), (
                f"slices of a parameter are not in order of ranks: {bounds}"
            )
        self._ranks = tensor.size()
        self._data = Exchange(
            [[end - start for start, end in bounds] for bounds in by_parameter],
            assign_owners([cuts[parameter].cost(self._ranks) for parameter in parameters], ranks=group.size()),
            group=group,
            device=mesh.device,
        )
        self._cuts = [cuts[parameters[item]] for item in self._data.owned]
        # The tensor ranks with one data-parallel index own the same parameters, so they exchange the same matrices.
        shared = [
            (cut.count, shape) for cut in self._cuts if self._is_divided(cut) for shape in cut.shapes(self._ranks)
        ]
        self._tensor = Exchange(
            [[count * math.prod(shape) // self._ranks] * self._ranks for count, shape in shared],
            assign_owners([count * iteration_cost(*shape) for count, shape in shared], ranks=self._ranks),
            group=tensor,
            device=mesh.device,
        )

    @torch.no_grad()
    def step(self, groups: Sequence[dict[str, Any]]) -> None:
        """One update. groups: the optimizer's groups of matrices, with their learning rate and weight decay. Collective over the
        data-parallel and the tensor ranks, also for ranks without a slice."""
        rates = {one: group for group in groups for one in group["params"]}
        held = [one for one in self._slices if one is not None]
        updates = dict(zip(held, self._directions(held), strict=True))
        parts = [self._nothing if one is None else updates[one].view(-1) for one in self._slices]
        wholes = self._data.to_owners(parts)
        self._orthogonalize(wholes)
        for one, update in zip(self._slices, self._data.to_parts(wholes), strict=True):
            if one is not None:
                group = rates[one]
                one.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(one), alpha=-group["lr"])
                self._state[one]["largest_update"] = update.abs().max()

    def _directions(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """What is orthogonalized, after adding the gradients to the momentum. -> new tensors."""
        if not held:
            return []
        momentum, moments = self._config.momentum, [self._state[one]["exp_avg"] for one in held]
        gradients = [one.grad for one in held]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        if not self._config.nesterov:
            return [moment.clone() for moment in moments]
        return list(torch._foreach_lerp(gradients, moments, momentum))

    def _orthogonalize(self, parts: list[torch.Tensor]) -> None:
        """Replace this rank's parts of the parameters that it owns by scaled orthogonal matrices, in place. parts: flat."""
        divided: list[tuple[torch.Tensor, Cut]] = []
        for part, cut in zip(parts, self._cuts, strict=True):
            for view in cut.views(part):
                if self._is_divided(cut):
                    divided.append((view, cut))
                else:
                    matrix = view.reshape(cut.count, -1, cut.columns)
                    view.copy_(self._updates(matrix).view_as(view))
        wholes = self._tensor.to_owners([view.reshape(-1) for view, _ in divided])
        results = []
        for whole, item in zip(wholes, self._tensor.owned, strict=True):
            view, cut = divided[item]
            # Parts in the order of ranks: [ranks, count, rows, columns].
            axes = (1, 0, 2, 3) if cut.split == "rows" else (1, 2, 0, 3)
            stacked = whole.view(self._ranks, cut.count, -1, cut.columns).permute(axes)
            matrix = stacked.reshape(cut.count, -1, cut.columns * (self._ranks if cut.split == "columns" else 1))
            back = (1, 0, 2, 3) if cut.split == "rows" else (2, 0, 1, 3)
            results.append(self._updates(matrix).view(stacked.shape).permute(back).reshape(-1))
        for (view, _), result in zip(divided, self._tensor.to_parts(results), strict=True):
            view.copy_(result.view(view.shape))

    def _is_divided(self, cut: Cut) -> bool:
        return self._ranks > 1 and cut.split != "none"

    def _updates(self, matrices: torch.Tensor) -> torch.Tensor:
        """Scaled orthogonal matrices. matrices: [count, rows, columns], whole."""
        _, rows, columns = matrices.shape
        together = matrices.split(max(1, MOST_ELEMENTS // (rows * columns)))
        found = [orthogonalize(some, iterations=self._config.iterations) for some in together]
        return torch.cat(found).mul_(update_scale(rows, columns))


def _range_of(part: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Elements of the flattened parameter whose optimizer state is on this rank; (0, 0) if there are none."""
    if parameter not in part.model_param_gbuf_map:
        return 0, 0
    found = part._get_model_param_range_map(parameter)["param"]
    return found.start, found.end


def _slice_of(part: Any, parameter: nn.Parameter) -> torch.Tensor | None:
    """The fp32 weights of `_range_of`, as Megatron gives them to the optimizer."""
    if parameter not in part.model_param_gbuf_map:
        return None
    group, order = part.model_param_group_index_map[parameter]
    found: torch.Tensor = part.optimizer.param_groups[group]["params"][order]
    return found
