"""Predicted times against calculations by hand: pipeline bubble, recomputation, collectives, bandwidth of a group."""

from dataclasses import replace

import pytest

from launch.plan.cost.device import device_named
from launch.plan.cost.layer_work import layer_work
from launch.plan.cost.time import Setting, layer_seconds, step_time
from launch.plan.published.models import model_named
from recipes.schema.experts import ExpertsConfig
from recipes.schema.layout import Layout
from recipes.schema.optim import MuonConfig
from recipes.schema.pattern import cut, flops_per_token

LLAMA = model_named("Llama 3 8B")


def setting(*, tensor: int = 1, pipeline: int = 1, virtual: int = 1, data: int = 1, microbatches: int = 8) -> Setting:
    layout = Layout(tensor * pipeline * data, tensor, pipeline, virtual, 1, data, microbatches)
    stages = tuple(cut(LLAMA.pattern, pipeline * virtual, model=LLAMA))
    return Setting(
        model=LLAMA,
        layout=layout,
        stages=stages,
        rows=1,
        sequence=8192,
        device=device_named("h100"),
        split_sequence=tensor > 1,
    )


@pytest.mark.parametrize(("virtual", "microbatches"), [(1, 8), (1, 32), (2, 8), (4, 16)])
def test_the_bubble_is_the_textbooks(virtual: int, microbatches: int) -> None:
    """(p - 1) / (v m) of the stages' working time (arXiv 2104.04473, section 2.2), and the messages that fill it."""
    found = step_time(setting(pipeline=4, virtual=virtual, microbatches=microbatches))
    work = sum(found.stage_seconds) / 4 * microbatches
    assert found.parts["bubble"] / work == pytest.approx(3 / (virtual * microbatches), rel=0.05)


def test_muon_costs_its_products_and_two_exchanges() -> None:
    """Llama 3 8B by hand: 20 m^2 n + 10 m^3 FLOPs a matrix for five iterations, divided over the ranks; each rank sends its
    slices of 4 bytes an element and gets them back."""
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (4096, 14336), (4096, 14336), (4096, 14336)]
    flops = 32 * sum(20 * m * m * n + 10 * m**3 for m, n in shapes)
    plain = setting(data=8)
    split = replace(plain, muon=MuonConfig())
    extra = step_time(split).parts["optimizer"] - step_time(plain).parts["optimizer"]
    device = split.device
    products = flops / 8 / (device.peak["bf16"] * device.clock * split.efficiency.gemm[device.generation]["bf16"])
    elements = 32 * sum(m * n for m, n in shapes)
    sent = 2 * 4 * elements / 8 * 7 / 8 / (device.link * split.efficiency.link)
    assert extra == pytest.approx(products + sent, rel=0.02)
    fused = step_time(replace(plain, muon=MuonConfig(split_fused=False, iterations=10)))
    assert fused.parts["optimizer"] > step_time(split).parts["optimizer"]


def test_recomputing_everything_costs_about_a_third() -> None:
    once, twice = step_time(setting()), step_time(replace(setting(), recompute=1.0))
    assert 1.2 < twice.seconds / once.seconds < 1.36


def test_no_step_is_faster_than_the_peak() -> None:
    for low in (None, "fp8"):
        found = step_time(replace(setting(), low=low))  # type: ignore[arg-type]
        flops = flops_per_token(LLAMA, 8192).total * 8192 * 8
        assert flops / found.seconds < device_named("h100").peak[low or "bf16"]


def test_more_ranks_never_make_one_layer_slower_within_a_domain_at_this_length() -> None:
    layers = [layer_seconds(setting(tensor=tensor), "-") for tensor in (1, 2, 4, 8)]
    assert layers == sorted(layers, reverse=True)


def test_gradients_over_one_network_card_take_their_bytes() -> None:
    """8 tensor ranks fill a node, so each data-parallel rank has its own card: bytes x (d - 1) / d / (80 % of 50 GB/s)."""
    one = replace(setting(tensor=8, data=4, microbatches=1), overlap_grad_reduce=False, overlap_param_gather=False)
    found = step_time(one).parts["data"]
    weights = 8.03e9 / 8
    assert found == pytest.approx((4 + 2) * weights * 3 / 4 / (0.8 * 50e9), rel=0.03)


@pytest.mark.parametrize(("shared_ffn", "collectives"), [(0, (0, 0)), (1024, (2, 3))])
def test_only_a_shared_expert_gathers_tokens_over_tensor_ranks(shared_ffn: int, collectives: tuple[int, int]) -> None:
    model = replace(LLAMA, experts=ExpertsConfig(shared_ffn=shared_ffn))
    work = layer_work("E", model, tokens=64, sequence=64, tensor=2, split_sequence=True, is_low=False)
    assert work.tensor_collectives == collectives
