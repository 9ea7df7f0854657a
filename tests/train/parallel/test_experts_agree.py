"""Expert layers train as one process at every layout: losses, gradient norms, and all weights and biases after five steps.

Losses and norms agree to rounding (`ROUNDING` of test_layouts_agree). Weights may be further apart: AdamW divides a gradient by
its own size, so an element whose gradient is near zero moves by rounding alone. Measured over these layouts, a tensor differs by
at most 1.3e-5 of its norm. Biases move by whole steps and must be equal.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_models import EXPERTS, MIXTURE, trained_weights, whole_weights
from ranks import run_ranks
from tiny import Numbers, recipe_with, train_tiny

from recipes.schema.experts import ExpertsConfig

ROUNDING, WEIGHTS = 2e-6, 4e-5
STEPS = 5
TP2 = {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "recompute": (1, {"parallel.recompute": "full"}),
    "EP2": (2, {"parallel.expert": 2}),
    "CP2 EP2": (2, {"parallel.expert": 2, "parallel.context": 2}),
    "EP2 of 4 data ranks": (4, {"parallel.expert": 2}),
    "TP2 EP2, 2 data ranks": (4, {"parallel.expert": 2, **TP2}),
    "TP2 EP2 ETP2": (4, {"parallel.expert": 2, "parallel.expert_tensor": 2, **TP2}),
    "PP2 EP2": (4, {"parallel.expert": 2, "parallel.pipeline": 2}),
}
ROUTERS: dict[str, tuple[ExpertsConfig, dict[str, Any]]] = {
    "softmax, loss of the microbatch, gated": (
        replace(EXPERTS, score="softmax", bias_rate=0.0, aux_loss="microbatch", shared_ffn=0),
        {"model.activation": "swiglu", "parallel.expert_tensor": 2},
    ),
    "groups, latent": (
        replace(EXPERTS, count=8, top_k=4, groups=4, top_groups=2, latent=24),
        {**TP2, "parallel.expert": 2},
    ),
    "capacity": (replace(EXPERTS, capacity=0.75), {"parallel.expert": 2}),
}


def close(got: Numbers, expected: Numbers) -> None:
    assert got.losses == pytest.approx(expected.losses, rel=ROUNDING)
    assert got.grad_norms == pytest.approx(expected.grad_norms, rel=ROUNDING)


@pytest.fixture(scope="module")
def single() -> tuple[Numbers, dict[str, torch.Tensor]]:
    ranks = run_ranks(1, trained_weights, recipe_with(**MIXTURE), 1, STEPS)
    return ranks[0][0], whole_weights(ranks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_train_as_one_process(name: str, single: tuple[Numbers, dict[str, torch.Tensor]]) -> None:
    world, changes = LAYOUTS[name]
    ranks = run_ranks(world, trained_weights, recipe_with(**MIXTURE, **changes), world, STEPS)
    numbers, weights = single
    for mine, _ in ranks:
        close(mine, numbers)
    found = whole_weights(ranks)
    assert found.keys() == weights.keys()
    for key, tensor in found.items():
        if key.endswith("expert_bias"):
            assert torch.equal(tensor, weights[key]) and tensor.abs().max() >= 0.05, key
        else:
            assert float((tensor - weights[key]).norm()) <= WEIGHTS * float(weights[key].norm()), key


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_trains_as_one_process(name: str) -> None:
    experts, changes = ROUTERS[name]
    mixture = MIXTURE | {"model.experts": experts}
    split = run_ranks(2, train_tiny, recipe_with(**mixture, **changes), 2)
    activation = {key: value for key, value in changes.items() if key == "model.activation"}
    single = run_ranks(1, train_tiny, recipe_with(**mixture, **activation), 1)
    for numbers in split:
        close(numbers, single[0])
