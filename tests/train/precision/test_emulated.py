"""Emulated low-precision layers: gradients in float64, which GEMMs are low, state that survives, policies."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import RankFailed, run_ranks
from tiny import GEMMA, TINY, Numbers, engine_of, health, recipe_with, steps_of

from recipes.schema.errors import BackendError
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import low_precision_linears, scaling_of, shape_problems
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.model.backend import choose_backend
from train.precision import emulated
from train.precision.emulated import LowPrecisionLinear, _Product
from train.precision.quantize import quantize, rotate

NAMES = ("delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled")
LOW = ("delayed", "current", "blockwise", "mxfp8", "nvfp4")
WIDE: dict[str, Any] = {"run.microbatch_rows": 4}


def layer(name: str) -> LowPrecisionLinear:
    return LowPrecisionLinear(
        layer=0, name="linear", module=torch.nn.Module(), scaling=scaling_of(PrecisionConfig(), name),
        scales=(50.0, 300.0, 2000.0), seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_three_products_are_those_of_the_quantised_operands_in_float64(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 40, 192, generator=g).requires_grad_()
    weight = (torch.randn(144, 192, generator=g) / 14).requires_grad_()
    grad = torch.randn(4, 40, 144, generator=g) / 100
    linear = layer(name)
    y = _Product.apply(x, weight, linear, True)
    y.backward(grad)

    again = layer(name)
    again.backwards = 1  # the seed of the first backward pass
    rows, grad_rows = x.detach().reshape(160, 192), grad.reshape(160, 144)

    def exact(value: torch.Tensor, operand: str, along: Any) -> torch.Tensor:
        result = again.quantized(value, operand, along, record=False)
        return result.values.double() * result.factor

    # The Hadamard rotation is orthogonal, so the product of two rotated operands needs no turning back.
    want_y = exact(rows, "input", "rows") @ exact(weight.detach(), "weight", "rows").t()
    want_x = exact(grad_rows, "grad", "rows") @ exact(weight.detach(), "weight", "columns")
    want_w = exact(grad_rows, "grad_for_weight_grad", "columns").t() @ exact(rows, "input_for_weight_grad", "columns")
    assert x.grad is not None and weight.grad is not None
    for got, want in ((y, want_y), (x.grad, want_x), (weight.grad, want_w)):
        got = got.detach().double().reshape(want.shape)
        assert float((got - want).norm() / want.norm()) <= 1e-6

    plain = grad_rows.double().t() @ rows.double()
    error = float((weight.grad.double() - plain).norm() / plain.norm())
    assert error < (0.3 if name == "nvfp4" else 0.15 if name == "unscaled" else 0.06), error


def test_rotated_operands_give_the_plain_weight_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(64, 32, generator=g), torch.randn(64, 48, generator=g)
    turned = rotate(grad).double().t() @ rotate(x).double()
    assert torch.allclose(turned, grad.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


def count_gemms(rank: int, recipe: Recipe) -> dict[tuple[int, str], Counter[str]]:
    """One step; low-precision GEMMs by layer and module."""
    found: dict[tuple[int, str], Counter[str]] = {}
    plain = emulated.gemm

    def counting(name: str, linear: LowPrecisionLinear, *arguments: Any) -> torch.Tensor:
        found.setdefault((linear.layer, linear.name), Counter())[name] += 1
        return plain(name, linear, *arguments)

    emulated.gemm = counting
    with engine_of(recipe, rank=rank, world=1) as engine:
        steps_of(engine, recipe, range(1))
    return found


@pytest.mark.parametrize("pattern", ["M-M*-M-M*-", "*-M-", GEMMA["model.pattern"]])
@pytest.mark.parametrize("name", ["none", *LOW])
@pytest.mark.parametrize("ends", [(0, 0), (2, 1)])
def test_exactly_the_gemms_of_the_table_are_low_precision(name: str, pattern: str, ends: tuple[int, int]) -> None:
    """docs/fp8.md: both linears of every layer that is not at an end, once forward and once in each gradient."""
    family = GEMMA if "w" in pattern else {"model.pattern": pattern}
    recipe = recipe_with(
        **WIDE,
        **family,
        **{
            "precision.scaling": name,
            "precision.high_precision_first": ends[0],
            "precision.high_precision_last": ends[1],
        },
    )
    linears = {
        "M": ["mixer.in_proj", "mixer.out_proj"],
        "*": ["self_attention.linear_qkv", "self_attention.linear_proj"],
        "w": ["self_attention.linear_qkv", "self_attention.linear_proj"],
        "-": ["mlp.linear_fc1", "mlp.linear_fc2"],
    }
    each = Counter({"forward": 1, "data_grad": 1, "weight_grad": 1})
    inside = range(ends[0], len(pattern) - ends[1]) if name != "none" else range(0)
    want = {(index, linear): each for index in inside for linear in linears[pattern[index]]}
    assert run_ranks(1, count_gemms, recipe)[0] == want


def train_and_resume(rank: int, recipe: Recipe, folder: Path) -> tuple[Numbers, Numbers]:
    """Four steps, and the last two of them again from a checkpoint of the first two."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        whole = steps_of(engine, recipe, range(2))
        checkpoints.save(engine, RunState(step=2, position=8, data_hash="h"))
        rest = steps_of(engine, recipe, range(2, 4))
    with engine_of(replace(recipe, run=replace(recipe.run, seed=99)), rank=rank, world=1) as fresh:
        checkpoints.load(fresh, checkpoints.path_of(2))
        fresh.precision.seed = recipe.run.seed * 1_000_003  # of stochastic rounding, which a resumed run keeps
        again = steps_of(fresh, recipe, range(2, 4))
    assert again == rest
    return Numbers(whole.losses + rest.losses, whole.grad_norms + rest.grad_norms), again


@pytest.mark.parametrize("name", LOW)
def test_gemma_trains_in_every_recipe_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """The first step equals the plain one up to the error of 8 or 4 bits; a resumed step is the same to the bit."""
    gemma = GEMMA | WIDE
    low, _ = run_ranks(1, train_and_resume, recipe_with(**gemma, **{"precision.scaling": name}), tmp_path)[0]
    plain = run_ranks(1, train, recipe_with(**gemma), 1, 4)[0]
    loss, norm = (0.01, 0.1) if name != "nvfp4" else (0.02, 0.3)
    assert low.losses != plain.losses
    assert low.losses == pytest.approx(plain.losses, rel=loss)
    assert low.grad_norms[0] == pytest.approx(plain.grad_norms[0], rel=norm)


@pytest.mark.parametrize("name", ["current", "blockwise", "nvfp4"])
def test_sequence_parallelism_changes_nothing(name: str) -> None:
    """The input is quantised after it was gathered: its amax is that of all ranks."""
    changes = {"parallel.tensor": 2, "precision.scaling": name, "run.microbatch_rows": 4}
    plain = run_ranks(2, train, recipe_with(**changes), 2)[0]
    split = run_ranks(2, train, recipe_with(**changes, **{"parallel.sequence": True}), 2)[0]
    assert split.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert split.grad_norms[0] == pytest.approx(plain.grad_norms[0], rel=1e-4)


def train(rank: int, recipe: Recipe, world: int, steps: int = 1) -> Any:
    with engine_of(recipe, rank=rank, world=world) as engine:
        return steps_of(engine, recipe, range(steps))


def switch(rank: int, recipe: Recipe) -> Any:
    with engine_of(recipe, rank=rank, world=1) as engine:
        names = []
        for step in range(4):
            steps_of(engine, recipe, range(step, step + 1))
            names.append(engine.precision.active())
        return names


def test_scaling_switches_at_a_token_count() -> None:
    tokens = 4 * 64  # of a step
    for after in ("none", "delayed"):
        recipe = recipe_with(
            **{
                "precision.scaling": "blockwise",
                "precision.switch_at_tokens": 2 * tokens,
                "precision.scaling_after": after,
                "run.microbatch_rows": 4,
            }
        )
        assert run_ranks(1, switch, recipe)[0] == ["blockwise", "blockwise", after, after]


def test_recompute_quantises_the_same() -> None:
    changes = {"precision.scaling": "delayed", "run.microbatch_rows": 2}
    plain = run_ranks(1, train, recipe_with(**changes), 1, 3)[0]
    assert run_ranks(1, train, recipe_with(**changes, **{"parallel.recompute": "full"}), 1, 3)[0] == plain


@pytest.mark.parametrize(
    ("name", "low", "high"), [("current", 24, 40), ("blockwise", 28, 40), ("mxfp8", 28, 40), ("nvfp4", 13, 30)]
)
def test_healthy_operands_are_in_their_band(name: str, low: float, high: float) -> None:
    """E4M3 rounds by at most 2^-4, about 31 dB on a bell curve; one bit less is 6 dB less."""
    recipe = recipe_with(**WIDE, **{"precision.scaling": name})
    (readings, _), _ = run_ranks(1, health, recipe, 1)[0]
    kinds = {reading.operand for reading in readings}
    assert {"input", "weight", "grad"} <= kinds
    assert len(readings) == len(kinds) * 20  # two linears in each of ten layers
    for reading in readings:
        assert reading.is_healthy, reading
        assert reading.snr_db is not None and low - (6 if reading.format == "e5m2" else 0) <= reading.snr_db <= high, (
            reading
        )
        assert reading.saturated == 0 or name == "nvfp4"


def test_readings_are_those_of_all_ranks_together() -> None:
    """Blocks do not depend on ranks: amax, elements and errors over two data ranks equal those of one process."""
    base = {"precision.scaling": "blockwise", "run.microbatch_rows": 2}
    (one, _), _ = run_ranks(1, health, recipe_with(**WIDE | {"precision.scaling": "blockwise"}), 1)[0]
    for (two, _), _ in run_ranks(2, health, recipe_with(**base), 2):
        for a, b in zip(one, two, strict=True):
            assert (a.layer, a.linear, a.operand) == (b.layer, b.linear, b.operand)
            assert a.amax == pytest.approx(b.amax, rel=1e-2 if "grad" not in a.operand else 2)
            assert a.snr_db == pytest.approx(b.snr_db, abs=1.5)


def test_without_scales_gradients_underflow_and_the_policy_moves_the_layers() -> None:
    changes = WIDE | {"precision.scaling": "unscaled", "precision.health_policy": "high_precision"}
    (first, second), off = run_ranks(1, health, recipe_with(**changes), 1)[0]
    sick = {(r.layer, r.linear) for r in first if not r.is_healthy}
    assert sick and max(r.underflowed for r in first if r.operand == "grad") > 0.05
    assert {(r.layer, r.linear) for r in second}.isdisjoint(sick), "moved layers are no longer quantised"
    assert sum(off) == len(sick)
    worst = min((r for r in first if r.snr_db is not None), key=lambda r: r.snr_db or math.inf)
    assert worst.operand == "grad"


def test_backends_refuse_what_they_cannot_do() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(PrecisionConfig(scaling="nvfp4"), cpu).name == "emulated"
    assert choose_backend(PrecisionConfig(switch_at_tokens=5, scaling_after="current"), cpu).name == "emulated"
    assert choose_backend(PrecisionConfig(backend="emulated"), cpu).name == "emulated"
    with pytest.raises(BackendError, match=r"backend=reference computes in high precision only.*emulated or te"):
        choose_backend(PrecisionConfig(backend="reference", scaling="current"), cpu)
    with pytest.raises(BackendError, match=r"fp8_weights=true: only `te`"):
        choose_backend(PrecisionConfig(fp8_weights=True, scaling="blockwise"), cpu)


NANO_9B = ModelConfig(
    **yaml.safe_load((Path(__file__).resolve().parents[3] / "recipes/model/nemotron_nano_9b_v2.yaml").read_text())
)


def problems(model: ModelConfig, scaling: str = "blockwise", tokens: int = 8192, **parallel: Any) -> list[str]:
    precision = PrecisionConfig(params="bf16", scaling=scaling)  # type: ignore[arg-type]
    found = shape_problems(model, parallel=ParallelConfig(**parallel), precision=precision, rank_tokens=tokens)
    return [str(problem) for problem in found]


def test_the_9b_is_refused_at_tensor_8_and_taken_at_4() -> None:
    assert problems(NANO_9B, tensor=4) == []
    complaints = problems(NANO_9B, tensor=8)
    assert len(complaints) == 2 and all("1,960" in c and "multiple of 16" in c for c in complaints)
    assert "mlp.linear_fc1" in complaints[0] and "mlp.linear_fc2" in complaints[1]
    assert problems(NANO_9B, "none", tensor=8) == []


def test_ragged_tokens_and_blocks_across_ranks_are_named() -> None:
    assert "8,190 tokens per rank, not a multiple of 16" in problems(NANO_9B, tokens=8190)[0]
    [complaint] = problems(NANO_9B, tokens=4 * 128 - 64, tensor=4, sequence=True)
    assert "112 each, not a multiple of the 128-token block" in complaint
    assert problems(NANO_9B, tokens=4 * 128, tensor=4, sequence=True) == []
    assert any("multiple of 32" in complaint for complaint in problems(TINY, "mxfp8"))


def test_the_choice_of_layers_follows_the_pattern() -> None:
    precision = PrecisionConfig(scaling="blockwise", high_precision_first=2, high_precision_last=2)
    assert sorted(low_precision_linears(TINY, precision)) == [2, 3, 4, 5, 6, 7]
    assert low_precision_linears(TINY, PrecisionConfig()) == {}
    only_later = PrecisionConfig(switch_at_tokens=10, scaling_after="nvfp4")
    assert len(low_precision_linears(TINY, only_later)) == 10


def test_an_error_in_a_rank_names_the_backend() -> None:
    with pytest.raises(RankFailed, match="high precision only"):
        run_ranks(1, train, recipe_with(**{"precision.backend": "reference", "precision.scaling": "current"}), 1)


def test_quantize_is_the_one_the_layers_use() -> None:
    """The layer's operand is exactly `quantize` of the table's entry."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    linear = layer("blockwise")
    direct = quantize(x, linear.operand("input"), "rows")
    assert torch.equal(linear.quantized(x, "input", "rows", record=False).values, direct.values)
