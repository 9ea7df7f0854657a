"""Low precision on a real GPU: Transformer Engine's native kernels against our numbers, and training through the `te` backend.

Written without a GPU at hand and **not run yet**; every name used here is checked against the pinned packages' sources by
tests/parity/test_te.py. Run on a GPU machine with the `gpu` extra: `make test-gpu`. A recipe that the GPU does not have
(FP8 blocks need Hopper, MXFP8 and NVFP4 need Blackwell) is skipped with Transformer Engine's own reason.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import matrices
from tiny import recipe_with, steps_of

from recipes.schema.precision import PrecisionConfig
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import E2M1, E4M3, E5M2, Operand, scaling_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.precision.quantize import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SCALINGS = ("delayed", "current", "blockwise", "mxfp8", "nvfp4")
GPU = torch.device("cuda")


def need(scaling: str) -> None:
    """Skip where this GPU does not have a recipe."""
    from transformer_engine.pytorch import quantization

    available, reason = {
        "delayed": quantization.is_fp8_available,
        "current": quantization.is_fp8_available,
        "blockwise": quantization.is_fp8_block_scaling_available,
        "mxfp8": quantization.is_mxfp8_available,
        "nvfp4": quantization.is_nvfp4_available,
    }[scaling](return_reason=True)
    if not available:
        pytest.skip(reason)


def native_quantizer(scaling: str, operand: str) -> tuple[Any, Operand]:
    """Transformer Engine's compiled quantiser and our table's entry for it."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    scheme = scaling_of(PrecisionConfig(), scaling)
    assert scheme is not None
    ours = getattr(scheme, operand)
    dtype = {E4M3.name: DType.kFloat8E4M3, E5M2.name: DType.kFloat8E5M2, E2M1.name: DType.kFloat4E2M1}[ours.format.name]
    match scaling:
        case "current":
            return Float8CurrentScalingQuantizer(dtype, GPU, columnwise=False), ours
        case "blockwise":
            dimensions = 2 if ours.block == (128, 128) else 1
            return Float8BlockQuantizer(dtype, rowwise=True, columnwise=False, block_scaling_dim=dimensions), ours
        case "mxfp8":
            return MXFP8Quantizer(dtype, columnwise=False), ours
        case _:
            square = ours.block == (16, 16)
            return NVFP4Quantizer(dtype, columnwise=False, with_2d_quantization=square), replace(ours, stochastic=False)


@pytest.mark.parametrize("operand", ["input", "weight", "grad"])
@pytest.mark.parametrize("scaling", ["current", "blockwise", "mxfp8", "nvfp4"])
def test_native_kernels_give_our_numbers(scaling: str, operand: str) -> None:
    need(scaling)
    theirs, ours = native_quantizer(scaling, operand)
    for name, x in matrices().items():
        x = x.bfloat16()
        want = theirs(x.to(GPU)).dequantize(dtype=torch.float32).cpu()
        got = quantize(x, ours, "rows").decoded()
        if scaling == "nvfp4":  # the tensor's fp32 scale is applied in another order of roundings
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("scaling", SCALINGS)
def test_linear_layers_agree(scaling: str) -> None:
    """Output and both gradients of te.Linear under the native recipe, against the emulated layer on the CPU."""
    need(scaling)
    import transformer_engine.pytorch as te
    from megatron.core.fp4_utils import get_fp4_recipe
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer import TransformerConfig
    from tiny import TINY

    from train.model.backend import TransformerEngineBackend
    from train.precision.emulated import LowPrecisionLinear, _Product

    options = TransformerEngineBackend().options(TINY, PrecisionConfig(scaling=scaling))  # type: ignore[arg-type]
    config = TransformerConfig(num_layers=10, hidden_size=64, num_attention_heads=4, bf16=True, **options)
    recipe = get_fp4_recipe(config) if config.fp4 else get_fp8_recipe(config)
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(256, 512, generator=g).bfloat16(), torch.randn(256, 384, generator=g).bfloat16()
    weight = (torch.randn(384, 512, generator=g) / 20).bfloat16()
    theirs = te.Linear(512, 384, bias=False, params_dtype=torch.bfloat16).to(GPU)
    theirs.weight.data.copy_(weight)
    x_gpu = x.to(GPU).requires_grad_()
    with te.autocast(enabled=True, recipe=recipe):
        y = theirs(x_gpu)
    y.backward(grad.to(GPU))

    linear = LowPrecisionLinear(layer=0, name="linear", module=torch.nn.Module())
    linear.scaling = scaling_of(PrecisionConfig(), scaling)
    x_cpu, w_cpu = x.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = _Product.apply(x_cpu, w_cpu, linear, True)
    ours.backward(grad)
    assert x_cpu.grad is not None and w_cpu.grad is not None
    # bf16 results, tensor-core accumulation; gradients of NVFP4 round at random, with other numbers on the GPU.
    for name, a, b in (("y", ours, y), ("dx", x_cpu.grad, x_gpu.grad), ("dw", w_cpu.grad, theirs.weight.grad)):
        limit = 0.2 if scaling == "nvfp4" and name != "y" else 5e-3
        error = float((a.float() - b.float().cpu()).norm() / b.float().norm().cpu())
        assert error < limit, (name, error)


def recipe_of(scaling: str, backend: str, **changes: Any) -> Recipe:
    """The tiny hybrid at widths every recipe takes."""
    return recipe_with(
        **{
            "run.device": "cuda",
            "run.microbatch_rows": 4,
            "model.mamba_heads": 32,
            "model.mamba_head_dim": 8,
            "precision.params": "bf16",
            "precision.scaling": scaling,
            "precision.backend": backend,
            "precision.high_precision_first": 2,
            "precision.high_precision_last": 2,
            **changes,
        }
    )


def train_on_gpu(recipe: Recipe, steps: range, *, load: Path | None = None, save: Path | None = None) -> Any:
    """Build on the GPU; load from `load` and save to `save` if they are given; train."""
    from train.build import build_engine, check, mesh_of
    from train.megatron import use_device

    use_device(GPU)
    layout = check(recipe, world=1)
    with mesh_of(recipe, layout, device=GPU, rank=0) as mesh:
        engine = build_engine(recipe, mesh)
        if load is not None:
            found = CheckpointFolder(load, recipe.checkpoint).newest()
            assert found is not None
            CheckpointFolder(load, recipe.checkpoint).load(engine, found[0])
        numbers = steps_of(engine, recipe, steps)
        if save is not None:
            CheckpointFolder(save, recipe.checkpoint).save(engine, RunState(step=steps.stop, position=0, data_hash="h"))
        return numbers


@pytest.mark.parametrize("scaling", ["none", *SCALINGS])
def test_the_te_backend_trains_like_the_emulated_one(scaling: str) -> None:
    if scaling != "none":
        need(scaling)
    theirs = train_on_gpu(recipe_of(scaling, "te"), range(4))
    ours = train_on_gpu(recipe_of(scaling, "emulated"), range(4))
    assert theirs.losses == pytest.approx(ours.losses, rel=2e-3)
    assert theirs.grad_norms == pytest.approx(ours.grad_norms, rel=3e-2)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_resume_is_bit_exact(scaling: str, tmp_path: Path) -> None:
    need(scaling)
    recipe = recipe_of(scaling, "te")
    whole = train_on_gpu(recipe, range(4))
    train_on_gpu(recipe, range(2), save=tmp_path)
    assert train_on_gpu(recipe, range(2, 4), load=tmp_path).losses == whole.losses[2:]


@pytest.mark.parametrize("scaling", ["current", "blockwise", "mxfp8"])
def test_weights_kept_in_fp8_train(scaling: str) -> None:
    need(scaling)
    kept = train_on_gpu(recipe_of(scaling, "te", **{"precision.fp8_weights": True}), range(4))
    plain = train_on_gpu(recipe_of(scaling, "te"), range(4))
    assert kept.losses == pytest.approx(plain.losses, rel=2e-3)
