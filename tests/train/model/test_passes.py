"""Norms, activations and loss against formulas in float64: compiled and in plain torch, fp32 and bf16, odd widths, and the
same bits for any number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from train.model.activation import activate
from train.model.cross_entropy import vocab_parallel_cross_entropy
from train.model.norm import rms_norm
from train.native import kernels, passes
from train.native.gemm import multiply

Inputs = list[torch.Tensor]
Function = Callable[..., torch.Tensor]


@pytest.fixture(params=["compiled", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(passes, "usable", lambda x: False)
    else:
        assert kernels.library("passes") is not None, "these kernels could not be compiled here"
    return request.param


def random(*shape: int, seed: int, factor: float = 1.0) -> torch.Tensor:
    return factor * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def result_and_gradients(function: Function, inputs: Inputs, grad: torch.Tensor) -> Inputs:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(function: Function, formula: Function, inputs: Inputs, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest number: of fp32's 2^-24, or of bf16's 2^-9 at what goes in and comes out."""
    inputs = [x.to(dtype) for x in inputs]
    exact = [x.double() for x in inputs]
    grad = random(*formula(*exact).shape, seed=9).to(dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    found = result_and_gradients(function, inputs, grad)
    for mine, wanted in zip(found, result_and_gradients(formula, exact, grad.double()), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def norm_formula(x: torch.Tensor, weight: torch.Tensor, *, offset: float, groups: int, eps: float) -> torch.Tensor:
    parts = x.unflatten(-1, (groups, -1))
    return (parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + eps)).flatten(-2) * (offset + weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(5, 3, 66), (1, 1, 24), (37, 2, 30), (300, 1, 48)], ids=str)
@pytest.mark.parametrize(("offset", "groups"), [(0.0, 1), (1.0, 1), (0.0, 3), (0.0, 6)])
def test_norms(form: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float, groups: int) -> None:
    options = {"offset": offset, "groups": groups, "eps": 1e-5}
    inputs = [random(*shape, seed=0, factor=3.0), random(shape[-1], seed=1)]
    compare(
        lambda x, w: rms_norm(x, w, **options),  # type: ignore[arg-type]
        lambda x, w: norm_formula(x, w, **options),  # type: ignore[arg-type]
        inputs,
        dtype,
    )


FORMULAS: dict[str, Function] = {
    "squared_relu": lambda x: torch.where(x > 0, x * x, 0 * x),
    "gelu": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(5, 3, 64), (2, 1, 22)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
@pytest.mark.parametrize("function", FORMULAS)
def test_activations(form: str, dtype: torch.dtype, shape: tuple[int, ...], gated: bool, function: str) -> None:
    def formula(x: torch.Tensor) -> torch.Tensor:
        if not gated:
            return FORMULAS[function](x)
        gate, up = x.chunk(2, dim=-1)
        return FORMULAS[function](gate) * up

    x = random(*shape, seed=2, factor=4.0)
    x[0, 0, :4] = torch.tensor([0.0, -30.0, 30.0, 1e-4])
    compare(lambda x: activate(x, function, gated), formula, [x], dtype)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A process group of one."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [64, 1003])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_loss(form: str, alone: dist.ProcessGroup, dtype: torch.dtype, vocabulary: int, cap: float | None) -> None:
    logits = random(7, 2, vocabulary, seed=3, factor=10.0).to(dtype)
    labels = torch.randint(0, vocabulary, (7, 2), generator=torch.Generator().manual_seed(4))
    weights = random(7, 2, seed=5)
    exact = logits.double().requires_grad_()
    capped = exact if cap is None else cap * torch.tanh(exact / cap)
    expected = F.cross_entropy(capped.flatten(0, 1), labels.flatten(), reduction="none").view(7, 2)
    (expected * weights).sum().backward()
    mine = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine * 1, labels, group=alone, softcap=cap)
    (loss * weights).sum().backward()
    assert loss.dtype == torch.float32 and mine.grad is not None and exact.grad is not None
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    error = (mine.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error <= (2e-6 if dtype == torch.float32 else 2**-8)


def test_a_logit_that_is_not_a_number_is_not_hidden(form: str, alone: dist.ProcessGroup) -> None:
    logits = random(3, 1, 40, seed=6)
    logits[1, 0, 17] = torch.nan
    loss = vocab_parallel_cross_entropy(logits, torch.zeros(3, 1, dtype=torch.int64), group=alone)
    assert loss.isnan().flatten().tolist() == [False, True, False]
    assert rms_norm(logits, torch.ones(40), eps=1e-5).isnan().any()
    assert activate(logits, "gelu", False).isnan().any()


def test_the_same_bits_for_any_number_of_threads(alone: dist.ProcessGroup) -> None:
    """Products included: what a step computes outside attention and the scan, which have separate tests."""
    x, weight, wide = random(501, 96, seed=7), random(96, seed=8), random(500, 96, seed=9)
    labels = torch.randint(0, 500, (1, 501), generator=torch.Generator().manual_seed(4))

    def everything() -> Inputs:
        leaf, scale, matrix = (y.clone().requires_grad_() for y in (x, weight, wide))
        hidden = rms_norm(activate(leaf, "gelu", False), scale, eps=1e-5)
        logits = multiply(hidden.detach(), matrix.detach().t()).requires_grad_()
        loss = vocab_parallel_cross_entropy((logits * 1).unsqueeze(0), labels, group=alone, softcap=30.0)
        loss.sum().backward()
        assert logits.grad is not None
        hidden.backward(multiply(logits.grad, wide))
        return [loss.detach(), leaf.grad, scale.grad, multiply(logits.grad.t(), hidden.detach())]  # type: ignore[list-item]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("m", "k", "n"), [(2048, 96, 64), (300, 2048, 40), (40, 2048, 300), (3, 5, 7), (1, 512, 1024)])
def test_products_of_any_strides(m: int, k: int, n: int) -> None:
    a, b = random(m, k, seed=0), random(k, n, seed=1)
    exact = a.double() @ b.double()
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            error = (multiply(left, right).double() - exact).abs().max() / exact.abs().max()
            assert error <= 5e-6
