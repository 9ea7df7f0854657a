"""Muon against torch.optim.Muon in float64, and at every layout. (Its checkpoints: test_layout_matrix.)

torch's class computes in bf16. Here its call of `bfloat16` is replaced, so that its own code runs in float64.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from expert_models import trained_weights, whole_weights
from ranks import run_ranks
from tiny import Numbers, engine_of, microbatches, recipe_with

from recipes.schema.model import ModelConfig
from recipes.schema.muon import layer_matrices
from recipes.schema.recipe import Recipe
from train.checkpoint.pieces import local_tensors_of, optimizer_parts
from train.engine import run_schedule
from train.model.initial import global_names
from train.optim.muon import matrix_cuts, orthogonalize
from train.optim.optimizer import set_learning_rate
from train.optim.owners import assign_owners

MODEL: dict[str, Any] = {
    "optim.kind": "muon", "model.pattern": "M*-E", "model.activation": "swiglu", "model.experts.count": 4,
    "model.experts.ffn": 32, "model.experts.shared_ffn": 64, "model.experts.latent": 32,
}  # fmt: skip
LR, DECAY, STEPS = 1e-2, 0.5, 2
MATRICES = (
    "in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router", "latent_in", "latent_out",
)  # fmt: skip


def matrices_by_hand(name: str, weight: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The matrices of a whole weight, from the shapes in the recipe; [] for a parameter that AdamW updates."""
    inner, state = model.mamba_heads * model.mamba_head_dim, model.mamba_groups * model.mamba_state
    match name.rsplit(".", 2)[-2]:
        case "in_proj":
            return list(weight.split([inner, inner, state, state, model.mamba_heads]))
        case "linear_qkv":
            per_key = model.heads // model.kv_heads * model.head_dim
            groups = weight.view(model.kv_heads, -1, model.hidden)
            parts = groups.split([per_key, model.head_dim, model.head_dim], 1)
            return [part.reshape(-1, model.hidden) for part in parts]
        case "linear_fc1":
            return (
                list(weight.flatten(0, 1)) if "experts.linear" in name and weight.dim() == 4 else list(weight.chunk(2))
            )
        case "linear_fc2":
            return list(weight) if weight.dim() == 3 else [weight]
        case "out_proj" | "linear_proj" | "router" | "latent_in" | "latent_out":
            return [weight]
    return []


def distances(rank: int, recipe: Recipe, fields: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of each weight to torch.optim.Muon with `fields`, fed with our gradients."""
    torch.Tensor.bfloat16 = lambda self: self.to(torch.float64, copy=True)  # type: ignore[method-assign]  # in a forked rank
    with engine_of(recipe, rank=rank, world=1) as engine:
        chunk = engine.chunks[0]
        named = dict(global_names(chunk.module))
        split = recipe.optim.muon.split_fused

        def cut(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
            by_hand = matrices_by_hand(name, weight.detach().double(), recipe.model)
            if split or not by_hand:
                return by_hand
            return list(weight.double().flatten(1, -2)) if weight.dim() > 2 else [weight.double()]

        theirs = {name: [torch.nn.Parameter(one.clone()) for one in cut(name, p)] for name, p in named.items()}
        theirs = {name: matrices for name, matrices in theirs.items() if matrices}
        muon = torch.optim.Muon(
            [one for matrices in theirs.values() for one in matrices], lr=LR, weight_decay=DECAY,
            adjust_lr_fn="match_rms_adamw", **fields,
        )  # fmt: skip
        for step in range(STEPS):
            chunk.zero_grad_buffer()
            engine.optimizer.zero_grad()
            run_schedule(engine, microbatches(recipe, engine.mesh, step), forward_step=engine.forward_step)
            for name, matrices in theirs.items():
                for one, gradient in zip(matrices, cut(name, named[name].main_grad), strict=True):
                    one.grad = gradient.clone()
            set_learning_rate(engine.optimizer, LR)
            engine.optimizer.step()
            muon.step()
        found = {}
        for name, matrices in theirs.items():
            pairs = zip(cut(name, named[name]), matrices, strict=True)
            found[name] = max(float((ours - one).abs().max() / one.abs().max()) for ours, one in pairs)
        return found


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({}, {}),
    "every field changed": (
        {
            "optim.muon.momentum": 0.5, "optim.muon.nesterov": False, "optim.muon.iterations": 2,
            "optim.muon.split_fused": False,
        },
        {"momentum": 0.5, "nesterov": False, "ns_steps": 2},
    ),
}  # fmt: skip
"""Fields of ours and of torch's: a field that did nothing would leave the weights of torch's."""


def every_case(rank: int) -> dict[str, dict[str, float]]:
    base = {**MODEL, "optim.weight_decay": DECAY, "optim.clip_norm": 0.0}
    return {name: distances(rank, recipe_with(**base, **ours), theirs) for name, (ours, theirs) in CASES.items()}


def test_weights_are_those_of_torch_muon_in_float64() -> None:
    for case, errors in run_ranks(1, every_case)[0].items():
        assert {name.rsplit(".", 2)[-2] for name in errors} == set(MATRICES)
        assert max(errors.values()) < 5e-5, (case, errors)


def test_singular_values_end_near_one() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 40, 24), (2, 24, 40), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=g), iterations=5))
        # Keller Jordan's post: within about 0.3 of 1 for the published coefficients.
        assert float(values[:, : shape[1] // 2].min()) > 0.5 and float(values.max()) < 1.3
    assert not orthogonalize(torch.zeros(1, 4, 4), iterations=5).any()


def test_owners_share_the_work() -> None:
    costs = [8, 1, 1, 1, 1, 1, 1, 1, 1, 7, 7, 2]
    owners = assign_owners(costs, ranks=4)
    assert [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(4)] == [8, 8, 8, 8]
    assert assign_owners([5, 4], ranks=4) == [0, 1]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "TP2 SP EP2 ETP2": (
        4,
        {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2, "parallel.expert_tensor": 2},
    ),
}


def five_steps(world: int, **changes: Any) -> tuple[Numbers, dict[str, torch.Tensor]]:
    ranks = run_ranks(world, trained_weights, recipe_with(**MODEL, **changes), world, 5)
    return ranks[0][0], whole_weights(ranks)


@pytest.fixture(scope="module")
def single() -> tuple[Numbers, dict[str, torch.Tensor]]:
    return five_steps(1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_process(layout: str, single: tuple[Numbers, dict[str, torch.Tensor]]) -> None:
    expected, theirs = single
    world, changes = LAYOUTS[layout]
    numbers, ours = five_steps(world, **changes)
    assert numbers.losses == pytest.approx(expected.losses, rel=2e-6)
    assert numbers.grad_norms == pytest.approx(expected.grad_norms, rel=2e-6)
    assert ours.keys() == theirs.keys()
    for name, whole in theirs.items():
        if any(f".{kind}.weight" in name for kind in MATRICES):
            torch.testing.assert_close(ours[name], whole, rtol=0, atol=2e-6, msg=name)


def updated_by_muon(rank: int, recipe: Recipe) -> tuple[set[str], Counter[tuple[int, int, int]]]:
    """Parameters with a second moment, which AdamW updates; and (count, rows, columns) of the matrices that Muon updates."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        modules = [chunk.module for chunk in engine.chunks]
        parts = optimizer_parts(engine.optimizer, modules, local_tensors_of(modules, engine.mesh.groups.dp_cp))
        second = {part.local.components[0].name for part in parts if "exp_avg_sq" in part.moments}
        cuts = matrix_cuts(modules[0], split_fused=recipe.optim.muon.split_fused).values()
        return second, Counter((cut.count, *shape) for cut in cuts for shape in cut.shapes(1))


@pytest.mark.parametrize("split_fused", [True, False])
def test_muon_updates_the_matrices_of_layers_that_the_plan_counts(split_fused: bool) -> None:
    recipe = recipe_with(**MODEL, **{"optim.muon.split_fused": split_fused})
    names, matrices = run_ranks(1, updated_by_muon, recipe)[0]
    ends = {name.split(".", 3)[-1] if name.startswith("decoder.layers") else name for name in names}
    assert ends == {
        "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_norm.weight", "norm.weight",
        "input_layernorm.weight", "pre_mlp_layernorm.weight", "mixer.norm.weight", "mixer.conv1d.weight.x",
        "mixer.conv1d.bias.x", "mixer.A_log", "mixer.D", "mixer.dt_bias",
    }  # fmt: skip
    model, muon = recipe.model, recipe.optim.muon
    planned = [matrix for kind in model.pattern for matrix in layer_matrices(model, kind, muon=muon)]
    elements = [
        sum(math.prod(one) * times for one, times in Counter(found).items()) for found in (planned, matrices.elements())
    ]
    shapes = [{(rows, columns) for _, rows, columns in found} for found in (planned, matrices)]
    assert elements[0] == elements[1] and shapes[0] == shapes[1]
