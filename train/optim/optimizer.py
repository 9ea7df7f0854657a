"""AdamW, and Muon for matrices, over fp32 masters, sharded over the data-parallel ranks by Megatron's distributed optimizer.

Megatron stores parameters, gradients and optimizer state in flat buffers and gives each data-parallel rank a slice; the
arithmetic on a slice is ordinary Adam. This project has its own Adam because Megatron's checkpoints expect the step count in
the parameter group. torch's AdamW has one count per parameter: after a load all parameters would share one counter, which
every parameter increments (docs/megatron.md).
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import (
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch.optim.adamw import adamw

from recipes.schema.optim import OptimConfig
from recipes.schema.parameter_groups import rule_of
from recipes.schema.precision import PrecisionConfig
from train.optim.muon import Cut, Muon, matrix_cuts
from train.parallel.mesh import Mesh


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) with its step count in the parameter group.

    State of a parameter: `exp_avg`, `exp_avg_sq`, both fp32 and of its shape. One fused kernel per group. Groups with `muon` are
    left to `self.muon`.
    """

    muon: Muon | None = None

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "GroupStepAdamW supports decoupled weight decay only, and no CUDA graphs"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, in place. Moments must exist (`build_optimizer` creates them). Collective
        with Muon (`Muon.step`)."""
        if self.muon is not None:
            matrices = [group for group in self.param_groups if group.get("muon")]
            self.muon.step(matrices)
            for group in matrices:
                group["step"] += 1
        for group in self.param_groups:
            if group.get("muon"):
                continue
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            done = float(group["step"])
            counts = [torch.full((), done, dtype=torch.float32, device=p.device) for p in params]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            group["step"] = int(done) + 1


def build_optimizer(
    chunks: list[Any],
    *,
    optim: OptimConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    names: Mapping[torch.nn.Parameter, str],
) -> MegatronOptimizer:
    """Megatron's distributed optimizer over DDP-wrapped chunks. names: of all parameters, in the whole model. Collective over
    the world.

    With `optim.kind=muon`, Muon updates the matrices of `matrix_cuts`, and AdamW all other parameters. Unless a rule of
    `optim.groups` says otherwise, weight decay applies to matrices only, not to one-dimensional parameters (norms, biases,
    A_log, D, dt_bias).
    """
    _use_group_step_adamw()
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_norm,
        bf16=precision.params == "bf16",
        params_dtype=torch.bfloat16 if precision.params == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        fp8_recipe=chunks[0].module.config.fp8_recipe if precision.fp8_weights else None,
    )
    overrides = get_standard_config_overrides(config)
    cuts: dict[torch.nn.Parameter, Cut] = {}
    if optim.kind == "muon":
        for chunk in chunks:
            cuts |= matrix_cuts(chunk.module, split_fused=optim.muon.split_fused)
        overrides[ParamKey(predicate=ParamPredicate("muon", cuts.__contains__))] = {"muon": True}  # type: ignore[typeddict-unknown-key]
    rules = {parameter: rule_of(optim.groups, name) for parameter, name in names.items()}
    for index in range(len(optim.groups)):
        key = ParamKey(predicate=ParamPredicate(f"rule {index}", lambda one, index=index: rules[one] == index))
        overrides[key] = {"rule": index}  # type: ignore[typeddict-unknown-key]
    optimizer = get_megatron_optimizer(
        config, chunks, overrides, use_gloo_process_groups=mesh.device.type == "cuda", pg_collection=mesh.groups
    )
    for part in _parts(optimizer):
        _repair_group_index(part)
        _create_moments(part.optimizer)
        if cuts:
            part.optimizer.muon = Muon(part, cuts, config=optim.muon, mesh=mesh)
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        if "rule" in group:
            rule = optim.groups[group["rule"]]
            group["lr_mult"] = rule.lr_factor
            if rule.weight_decay is not None:
                group["weight_decay"] = rule.weight_decay
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use `lr` from the next step on, times the factor of each parameter's group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments before the first step, so that step 0 can be saved too. Muon has no second moment."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter.data)
            if not group.get("muon"):
                optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter.data)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _use_group_step_adamw() -> None:
    """Replace Megatron's fused Adam by GroupStepAdamW; for fused ones it saves and loads the group's step count."""
    megatron_optimizer.Adam = GroupStepAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _repair_group_index(part: Any) -> None:
    """Make Megatron's parameter index agree with the order of its own groups.

    In 0.19.2 the index follows the order of the gradient buffers (bf16 first), but the groups are built fp32 first. In a
    model with both (fp32 scan parameters and bf16 weights), checkpoints would swap states, or fail if the shapes differ.
    """
    for group_index, (fp32, bf16) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for order, parameter in enumerate([*fp32, *bf16]):
            part.model_param_group_index_map[parameter] = (group_index, order)
