"""Our low-precision numbers against Transformer Engine's, and the `te` backend running on a CPU.

Transformer Engine's own Python layer runs over a stand-in for its compiled extension (te_on_cpu.py). Run by
`make test-oracle`, in a process of its own: torch is told that there is a GPU.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import matrices, same
from parity import te_on_cpu

from recipes.schema.precision import LinearRule, PrecisionConfig
from recipes.schema.scaling import E2M1, E4M3, E5M2, LINEARS, Operand, scaling_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.precision import quantize as quantize_module
from train.precision.quantize import hadamard_matrix, quantize, scale_from_history

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        os.environ.get("STRATUM_TEST_TE") != "1", reason="needs STRATUM_TEST_TE=1: use make test-oracle"
    ),
]
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
CURRENT = "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory"
NVFP4_MOST = 6.0 * 448.0
"""Largest magnitude of NVFP4 with a tensor scale of 1."""
NVFP4 = "transformer_engine.pytorch.custom_recipes.reference_nvfp4.nvfp4_ref_rht_2d_factory"


@pytest.fixture(autouse=True)
def same_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our side multiplies and norms by the torch operations that the stand-in uses: one last bit flips FP8 codes. Our own
    products and kernels are compared with float64 elsewhere (tests/train/model/test_passes.py)."""
    monkeypatch.setattr("train.native.gemm._goes_to_onednn", lambda a, b: False)
    monkeypatch.setattr("torch._scaled_mm", te_on_cpu.scaled_mm)
    monkeypatch.setattr("train.native.passes.usable", lambda x: False)


@pytest.fixture(scope="module")
def te() -> Any:
    import transformer_engine.pytorch

    return transformer_engine.pytorch


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_current_scaling_is_transformer_engines(format: Any, native: bool) -> None:
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    theirs = CurrentScalingQuantizerRef(dtype=TORCH[format.name], columnwise=False)
    for shape in ((256, 384), (17, 33)):
        for name, x in matrices(*shape).items():
            want = theirs.quantize(x)
            ours = quantize(x, Operand(format, "fp32"), "rows", torch_only=not native)
            assert same(ours.values, want.data), name
            assert ours.factor == float(want.scale), name


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("across", [1, 128])
@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(256, 384), (160, 208)], ids=["whole blocks", "ragged blocks"])
def test_blocks_with_power_of_two_scales_are_transformer_engines(
    shape: tuple[int, int], along: Any, across: int, native: bool
) -> None:
    """Its per-tensor reference quantiser, given one block after the other."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    theirs = CurrentScalingQuantizerRef(dtype=TORCH["e4m3"], columnwise=False, pow_2_scales=True)
    step = 16 if across == 1 else 1  # of 1x128 blocks, every 16th row is compared: the oracle goes block by block
    for name, x in matrices(*shape).items():
        ours = quantize(x, Operand(E4M3, "power_of_two", (across, 128)), along, torch_only=not native).decoded()
        if along == "columns":
            x, ours = x.t().contiguous(), ours.t()
        for top in range(0, x.shape[0], across * step):
            for left in range(0, x.shape[1], 128):
                block = x[top : top + across, left : left + 128].contiguous()
                want = theirs.quantize(block)
                assert same(ours[top : top + across, left : left + 128], want.data.float() * want.scale), (name, top)


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=["1x16", "16x16"])
def test_nvfp4_is_transformer_engines(block: tuple[int, int], native: bool) -> None:
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4, reference_utils

    theirs = reference_nvfp4.NVFP4QuantizerRef(dtype=reference_utils.Fp4Formats.E2M1, quant_tile_shape=block)
    operand = Operand(E2M1, "nvfp4", block)
    for name, x in matrices().items():
        want = theirs.quantize(x)
        for along, data, scale, amax in (
            ("rows", want.data, want.scale, want.global_amax_row),
            ("columns", want.data_t, want.scale_t, want.global_amax_col),
        ):
            decoded = reference_nvfp4.cast_from_fp4x2(data, torch.float32) * scale.float().repeat_interleave(16, 1)
            ours = quantize(x, operand, along, torch_only=not native)  # type: ignore[arg-type]
            values = ours.values if along == "rows" else ours.values.t()
            assert same(values, decoded), (name, along)
            assert ours.amax == float(amax), (name, along)
            assert ours.factor == pytest.approx(float(amax) / (6 * 448), rel=1e-6)


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
def test_the_hadamard_rotation_is_transformer_engines(native: bool) -> None:
    """On bf16 input of moderate range the sums of 16 are exact in fp32, so that their order does not matter."""
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4, reference_utils

    theirs = reference_nvfp4.NVFP4QuantizerRef(dtype=reference_utils.Fp4Formats.E2M1, with_rht=True)
    matrix = theirs._build_hadamard_matrix(16, torch.device("cpu"), torch.float32) / 4
    assert same(hadamard_matrix(), matrix)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 96, generator=g).bfloat16()
    want = theirs.quantize(x)
    decoded = reference_nvfp4.cast_from_fp4x2(want.data_t, torch.float32) * want.scale_t.float().repeat_interleave(
        16, 1
    )
    ours = quantize(x, Operand(E2M1, "nvfp4", (1, 16), hadamard=True), "columns", torch_only=not native)
    assert same(ours.values.t(), decoded)


@pytest.mark.parametrize("most_recent", [False, True])
def test_delayed_scales_move_on_as_in_transformer_engine(most_recent: bool) -> None:
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    recipe = DelayedScaling(amax_history_len=4, amax_compute_algo="most_recent" if most_recent else "max")
    g = torch.Generator().manual_seed(0)
    history, scale = torch.zeros(4, 3), torch.ones(3)
    their_history, their_scale = history.clone(), scale.clone()
    special = [torch.tensor([0.0, float("inf"), 2.0**-149]), torch.tensor([0.0, 1.0, 0.0])]
    maxima = torch.tensor([E4M3.max, E4M3.max, E5M2.max])
    for step in range(12):
        # Powers of two: Python's `number / tensor` multiplies by a reciprocal, which is exact for these only.
        amax = special[step - 5] if step in (5, 6) else torch.randint(-20, 20, (3,), generator=g).float().exp2()
        history[0] = their_history[0] = amax
        scale_from_history(history, scale, maxima, most_recent=most_recent)
        for column, most in enumerate(maxima):  # theirs takes one format at a time
            part, part_scale = their_history[:, column : column + 1].clone(), their_scale[column : column + 1].clone()
            _amax_and_scale_update(part, part_scale, float(most), recipe)
            their_history[:, column : column + 1], their_scale[column : column + 1] = part, part_scale
        assert torch.equal(scale, their_scale), step
        assert torch.equal(history, their_history), step


def _linear(scaling: str, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient and weight gradient of our emulated linear, stochastic rounding off."""
    from train.precision.emulated import LowPrecisionLinear, _Product

    scheme = scaling_of(PrecisionConfig(), scaling)
    assert scheme is not None
    linear = LowPrecisionLinear(layer=0, name="linear", module=torch.nn.Module(), scaling=_nearest(scheme))
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = _Product.apply(x, weight, linear, True)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def _nearest(scheme: Any) -> Any:
    """The same scaling without stochastic rounding, which no reference shares bit for bit."""
    names = [f.name for f in fields(scheme) if isinstance(getattr(scheme, f.name), Operand)]
    return replace(scheme, **{name: replace(getattr(scheme, name), stochastic=False) for name in names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("scaling", "factory"), [("current", CURRENT), ("nvfp4", NVFP4)])
def test_linear_layers_are_transformer_engines(te: Any, scaling: str, factory: str, dtype: torch.dtype) -> None:
    from transformer_engine.common.recipe import CustomRecipe

    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(64, 96, generator=g).to(dtype), torch.randn(64, 128, generator=g).to(dtype)
    weight = (torch.randn(128, 96, generator=g) / 10).to(dtype)
    theirs = te.Linear(96, 128, bias=False, params_dtype=dtype)
    theirs.weight.data.copy_(weight)
    x_theirs = x.clone().requires_grad_()
    with te.autocast(enabled=True, recipe=CustomRecipe(qfactory=_factory(factory))):
        y = theirs(x_theirs)
    y.backward(grad)
    ours = _linear(scaling, x, weight, grad)
    # The products of identical codes, summed in another order; fp32 Hadamard sums round differently before the cast.
    digits = 1e-6 if dtype == torch.float32 else 4e-3
    if scaling == "nvfp4" and dtype == torch.float32:
        digits = 2e-2
    for name, a, b in zip(
        ("output", "input grad", "weight grad"), ours, (y, x_theirs.grad, theirs.weight.grad), strict=True
    ):
        error = float((a.float() - b.detach().float()).norm() / b.detach().float().norm())
        assert error <= (digits if name == "weight grad" else min(digits, 4e-3)), (name, error)


def _factory(path: str) -> Callable[..., Any]:
    import importlib

    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _train(
    te_recipe: str | None,
    scaling: str,
    *,
    params: str = "bf16",
    backend: str,
    switch_at: int | None = None,
    scales_after_one_step: bool = False,
    resume_in: Path | None = None,
    load_from: Path | None = None,
    documents: bool = False,
    family: dict[str, Any] | None = None,
) -> Any:
    """Four steps of the tiny hybrid (changed to `family`) at widths that FP8 takes. te_recipe: Transformer Engine's factory
    of quantisers."""
    import functools
    from unittest import mock

    from tiny import recipe_with, steps_of

    from train.build import build_engine, check, mesh_of
    from train.model.backend import EmulatedBackend, TransformerEngineBackend

    class OverReferences(TransformerEngineBackend):
        """The `te` backend with Transformer Engine's reference quantisers, and our scan where mamba-ssm needs a GPU."""

        def options(self, model: Any, precision: Any) -> dict[str, Any]:
            options = super().options(model, precision)
            kind = "fp4" if options["fp4"] else "fp8"
            if te_recipe is not None:
                options |= {f"{kind}_recipe": "custom", f"{kind}_quantizer_factory": te_recipe}
            return options

        def mixer(self) -> Any:
            from train.model.mixer import ReferenceMixer

            return ReferenceMixer

        def core_attention(self) -> Any:
            from train.model.attention import AttentionCore

            return super().core_attention() if documents else AttentionCore

    chosen = OverReferences() if backend == "te" else EmulatedBackend()
    recipe = recipe_with(
        **{
            "model.mamba_heads": 32,
            "model.mamba_head_dim": 8,
            "model.hidden": 64,
            "precision.params": params,
            "precision.scaling": scaling,
            "precision.switch_at_tokens": switch_at,
            "precision.high_precision_first": 2,
            "precision.high_precision_last": 1,
            "run.microbatch_rows": 4,
            "data.reset_at_documents": documents,
            **(family or {}),
        }
    )
    torch.set_num_threads(1)
    scale_of = quantize_module._nvfp4_tensor_scale
    nearest = functools.wraps(scaling_of)(lambda *args: (s := scaling_of(*args)) and _nearest(s))
    layout = check(recipe, world=1)
    order = _block_by_block if scaling == "nvfp4" else _scaled_product

    def product(_name: str, a: torch.Tensor, b: torch.Tensor, *, factor: float) -> torch.Tensor:
        return order(a, b, factor=factor)

    with (
        mesh_of(recipe, layout, device=torch.device("cpu"), rank=0) as mesh,
        mock.patch("train.build.choose_backend", lambda precision, device: chosen),
        mock.patch("recipes.schema.scaling.scaling_of", nearest),
        mock.patch("train.precision.quantize.rotate", _rotate_by_product),
        mock.patch(
            "train.precision.quantize._nvfp4_tensor_scale",
            lambda amax, format: (*scale_of(amax, format)[:2], amax / NVFP4_MOST),  # unrounded, for `_block_by_block`
        ),
        mock.patch("train.precision.emulated.multiplier_of", lambda _linear: product),
    ):
        engine = build_engine(recipe, mesh)
        names = {name: tuple(p.shape) for name, p in engine.chunks[0].module.named_parameters()}
        kinds = {type(part).__name__ for part in engine.chunks[0].modules()}
        if scales_after_one_step:
            steps_of(engine, recipe, range(1))
            return _scales(engine)
        if load_from is not None:
            folder = CheckpointFolder(load_from, recipe.checkpoint)
            folder.load(engine, folder.path_of(2))
            return _scales(engine), steps_of(engine, recipe, range(2, 4))
        if resume_in is not None:
            folder = CheckpointFolder(resume_in, recipe.checkpoint)
            steps_of(engine, recipe, range(2))
            folder.save(engine, RunState(step=2, position=8, data_hash="h"))
            whole = steps_of(engine, recipe, range(2, 4))
            fresh = build_engine(recipe, mesh)
            folder.load(fresh, folder.path_of(2))
            return whole, steps_of(fresh, recipe, range(2, 4))
        return steps_of(engine, recipe, range(4)), names, kinds


def _scaled_product(a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """The product of the codes, then the scales of both: the order of the stand-in."""
    return (a @ b) * factor


def _block_by_block(a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """The order of Transformer Engine's reference for NVFP4: exact products of blocks of 16, added up one after the other, then
    scaled by (amax of a x amax of b) / (6 x 448)^2 in fp32."""
    blocks = (a[:, start : start + 16] @ b[start : start + 16] for start in range(0, a.shape[1], 16))
    return torch.div(torch.tensor(factor * NVFP4_MOST**2), NVFP4_MOST**2) * sum(
        blocks, torch.zeros(a.shape[0], b.shape[1])
    )


def _rotate_by_product(x: torch.Tensor, *, torch_only: bool = False) -> torch.Tensor:
    """NVFP4's rotation by the product of Transformer Engine's reference, whose sums round in another order than ours."""
    matrix = hadamard_matrix().to(x.dtype)
    return (x.t().contiguous().view(-1, len(matrix)) @ matrix).view(x.shape[1], x.shape[0]).t().contiguous().float()


def _scales(engine: Any) -> dict[str, list[float]]:
    """Delayed scaling's scales of input, weight and gradient by module, whichever backend holds them."""
    engine.precision.gather_state()
    parts = engine.chunks[0].named_modules()
    found = {name: part.low_precision_scale.tolist() for name, part in parts if hasattr(part, "low_precision_scale")}
    return found


@pytest.mark.parametrize(
    ("te_recipe", "scaling", "params", "digits"),
    [
        (None, "none", "fp32", 1e-6),
        (CURRENT, "current", "fp32", 1e-6),
        (None, "current", "fp32", 1e-6),  # Transformer Engine's native recipes, over the stand-in's quantiser
        (None, "delayed", "fp32", 1e-6),
        (NVFP4, "nvfp4", "fp32", 3e-4),  # our sums of the Hadamard rotation round in another order
        (None, "none", "bf16", 1e-6),
        (CURRENT, "current", "bf16", 1e-3),  # the norm and the residual sum round to bf16 in other places
        (NVFP4, "nvfp4", "bf16", 1e-3),
    ],
)
def test_the_te_backend_trains_like_the_emulated_one(
    te_recipe: str | None, scaling: str, params: str, digits: float
) -> None:
    """The first step agrees to the digits given. Then last bits flip a few codes, and Adam carries that on: the four
    steps stay within 1 %, a tenth of what the scalings differ by among themselves in gradient norm."""
    theirs, their_names, kinds = _train(te_recipe, scaling, params=params, backend="te")
    ours, our_names, _ = _train(te_recipe, scaling, params=params, backend="emulated")
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= kinds
    count = [sum(torch.Size(shape).numel() for shape in names.values()) for names in (their_names, our_names)]
    assert count[0] == count[1]
    assert theirs.losses[0] == pytest.approx(ours.losses[0], rel=min(digits, 1e-4))
    assert theirs.grad_norms[0] == pytest.approx(ours.grad_norms[0], rel=digits)
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-3)
    assert theirs.grad_norms == pytest.approx(ours.grad_norms, rel=1.5e-2)
    if scaling != "none":
        plain, _, _ = _train(None, "none", params=params, backend="te")
        assert abs(theirs.losses[0] / plain.losses[0] - 1) > 1e-5, "Transformer Engine did not quantise"


def test_the_te_backend_tells_documents_apart() -> None:
    """Transformer Engine's attention cannot by index: this project's core takes its place, and gives the same losses."""
    theirs, _, kinds = _train(None, "none", params="fp32", backend="te", documents=True)
    ours, _, _ = _train(None, "none", params="fp32", backend="emulated", documents=True)
    whole, _, _ = _train(None, "none", params="fp32", backend="te")
    assert "AttentionCore" in kinds and "TEDotProductAttention" not in kinds
    assert theirs.losses[0] == pytest.approx(ours.losses[0], rel=1e-6)
    assert theirs.grad_norms[0] == pytest.approx(ours.grad_norms[0], rel=1e-6)
    assert abs(theirs.losses[0] / whole.losses[0] - 1) > 1e-6, "the rows hold documents"


@pytest.mark.parametrize(
    ("te_recipe", "scaling", "params", "digits"),
    [
        (None, "none", "fp32", 1e-6),
        (CURRENT, "current", "fp32", 2e-4),  # some code at a rounding edge falls the other way: the loss agrees to 1e-6
        (None, "current", "fp32", 2e-4),
        (None, "delayed", "fp32", 1e-6),
        (NVFP4, "nvfp4", "fp32", 3e-4),
        (CURRENT, "current", "bf16", 2e-3),
    ],
)
def test_gemma_trains_like_the_emulated_one(te_recipe: str | None, scaling: str, params: str, digits: float) -> None:
    """Transformer Engine's norms before and after each layer, with weights added to one, between its linears; soft caps,
    rotary positions, windows, GeGLU and the tied head are this project's in both."""
    from tiny import GEMMA

    theirs, their_names, kinds = _train(te_recipe, scaling, params=params, backend="te", family=GEMMA)
    ours, our_names, _ = _train(te_recipe, scaling, params=params, backend="emulated", family=GEMMA)
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"} <= kinds
    count = [sum(torch.Size(shape).numel() for shape in names.values()) for names in (their_names, our_names)]
    assert count[0] == count[1]
    assert theirs.losses[0] == pytest.approx(ours.losses[0], rel=1e-6 if params == "fp32" else 1e-4)
    assert theirs.grad_norms[0] == pytest.approx(ours.grad_norms[0], rel=digits)
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-3)


def test_rules_by_linear_train_like_the_emulated_backend() -> None:
    """Attention in high precision by `precision.rules`, the other linears with the scales of the tensor."""
    rules = {"precision.rules": (LinearRule("none", linears="self_attention.*"),)}
    theirs, _, _ = _train(None, "current", params="fp32", backend="te", family=rules)
    ours, _, _ = _train(None, "current", params="fp32", backend="emulated", family=rules)
    plain, _, _ = _train(None, "current", params="fp32", backend="te")
    assert theirs.losses[0] == pytest.approx(ours.losses[0], rel=1e-6)
    assert theirs.grad_norms[0] == pytest.approx(ours.grad_norms[0], rel=2e-4)
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-3)
    assert abs(theirs.losses[0] / plain.losses[0] - 1) > 1e-6, "the rule has an effect"


def test_delayed_scales_are_those_transformer_engine_keeps() -> None:
    """After one step every linear layer of both backends has the same three scales, and the same layers have them."""
    theirs = _train(None, "delayed", params="fp32", backend="te", scales_after_one_step=True)
    ours = _train(None, "delayed", params="fp32", backend="emulated", scales_after_one_step=True)
    assert theirs.keys() == ours.keys() and len(ours) == 14  # two in each of ten layers, without three layers' six
    for name, scales in ours.items():
        assert theirs[name] == pytest.approx(scales, rel=1e-5), name
        assert 1.0 not in scales


@pytest.mark.parametrize(("te_recipe", "scaling"), [(None, "none"), (None, "delayed"), (None, "current")])
def test_the_te_backend_resumes_bit_for_bit(te_recipe: str | None, scaling: str, tmp_path: Path) -> None:
    whole, resumed = _train(te_recipe, scaling, backend="te", resume_in=tmp_path)
    assert resumed == whole


@pytest.mark.parametrize(("first", "second"), [("te", "emulated"), ("emulated", "te")])
def test_delayed_scales_move_between_backends(first: str, second: str, tmp_path: Path) -> None:
    """A run saved by one backend continues with the other: the same scales to the bit, the same loss."""
    numbers, _ = _train(None, "delayed", params="fp32", backend=first, resume_in=tmp_path)
    same, again = _train(None, "delayed", params="fp32", backend=first, load_from=tmp_path)
    moved, elsewhere = _train(None, "delayed", params="fp32", backend=second, load_from=tmp_path)
    assert moved == same and len(moved) == 14
    assert again == numbers
    assert elsewhere.losses == pytest.approx(numbers.losses, rel=1e-4)


def test_the_te_backend_switches_to_high_precision() -> None:
    """After the switch the step from the same weights is a plain one: the first step, switched at token 0, is `none`'s."""
    plain, _, _ = _train(None, "none", params="fp32", backend="te")
    at_once, _, _ = _train(CURRENT, "current", params="fp32", backend="te", switch_at=0)
    assert at_once == plain
    step_tokens = 4 * 64
    theirs, _, _ = _train(CURRENT, "current", params="fp32", backend="te", switch_at=2 * step_tokens)
    ours, _, _ = _train(CURRENT, "current", params="fp32", backend="emulated", switch_at=2 * step_tokens)
    assert theirs.losses[0] == pytest.approx(ours.losses[0], rel=1e-6) and theirs.losses[0] != plain.losses[0]
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-3)


def test_delayed_scaling_keeps_chosen_layers_in_high_precision() -> None:
    """Megatron refuses this combination; our wrapper switches autocast off inside, in those layers only."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from train.model.backend import TransformerEngineBackend

    seen = {}

    class Layer(torch.nn.Module):
        def __init__(self, number: int, kind: str) -> None:
            super().__init__()
            self.layer_number = number
            for name in LINEARS[kind]:
                parent, child = name.split(".")
                if not hasattr(self, parent):
                    setattr(self, parent, torch.nn.Module())
                setattr(getattr(self, parent), child, torch.nn.Linear(2, 2))

        def forward(self, x: int) -> int:
            seen[self.layer_number - 1] = FP8GlobalStateManager.is_fp8_enabled()
            return x

    from tiny import TINY

    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([Layer(index + 1, kind) for index, kind in enumerate(TINY.pattern)])
    precision = PrecisionConfig(scaling="delayed", high_precision_first=2, high_precision_last=1)
    backend = TransformerEngineBackend()
    backend.equip(chunk, model=TINY, precision=precision)
    import transformer_engine.pytorch as te

    with te.autocast(enabled=True):
        for layer in chunk.decoder.layers:
            layer(0)
        assert FP8GlobalStateManager.is_fp8_enabled()
    assert [index for index, low in seen.items() if not low] == [0, 1, 9]
    options = backend.options(TINY, precision)
    assert options["fp8_recipe"] == "delayed" and not options["first_last_layers_bf16"]


def test_the_pinned_versions_have_every_name_we_rely_on(te: Any) -> None:
    """Names, arguments and defaults, read from the packages' own sources."""
    from megatron.core import fp4_utils, fp8_utils
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.extensions import transformer_engine as modules
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig
    from tiny import TINY
    from transformer_engine.common import recipe
    from transformer_engine.pytorch import constants

    from train.model.backend import TransformerEngineBackend
    from train.precision.te import megatron_fields

    names = {f.name: f for f in fields(TransformerConfig)}
    scalings = ("none", "delayed", "current", "blockwise", "mxfp8", "nvfp4")
    classes = {
        "delayed": "DelayedScaling",
        "current": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
        "nvfp4": "NVFP4BlockScaling",
    }
    for scaling in scalings:
        options = TransformerEngineBackend().options(TINY, PrecisionConfig(scaling=scaling, high_precision_first=2))  # type: ignore[arg-type]
        assert options.keys() <= names.keys()
        config = TransformerConfig(num_layers=10, hidden_size=64, num_attention_heads=4, bf16=True, **options)
        if scaling == "none":
            assert not config.fp8 and not config.fp4
            continue
        found = fp4_utils.get_fp4_recipe(config) if config.fp4 else fp8_utils.get_fp8_recipe(config)
        assert isinstance(found, getattr(recipe, classes[scaling])), scaling
        ours = scaling_of(PrecisionConfig(), scaling)
        assert ours is not None
        if not config.fp4:  # gradients are E5M2 exactly where the table says so
            forward, backward = found.fp8_format.value.max_fwd, found.fp8_format.value.max_bwd
            assert (forward, backward) == (ours.input.format.max, ours.grad.format.max)
            assert (found.fp8_format.name == "HYBRID") == (ours.grad.format is E5M2)
        if scaling == "delayed":
            assert (found.amax_history_len, found.amax_compute_algo, found.margin) == (1024, "max", 0)
            assert found.reduce_amax
        if scaling == "blockwise":
            assert (found.x_block_scaling_dim, found.w_block_scaling_dim, found.grad_block_scaling_dim) == (1, 2, 1)
            assert found.fp8_quant_fwd_inp.power_2_scale and found.fp8_quant_fwd_weight.power_2_scale
        if scaling == "current":
            assert not found.fp8_quant_fwd_inp.power_2_scale and found.fp8_quant_fwd_inp.amax_epsilon == 0
        if scaling == "mxfp8":
            assert not found.enable_2d_quantization
        if scaling == "nvfp4":
            weight, into, grad = found.fp4_quant_fwd_weight, found.fp4_quant_fwd_inp, found.fp4_quant_bwd_grad
            assert weight.fp4_2d_quantization == (ours.weight.block == (16, 16))
            assert into.random_hadamard_transform == ours.input_for_weight_grad.hadamard
            assert grad.random_hadamard_transform == ours.grad_for_weight_grad.hadamard
            assert (grad.stochastic_rounding, into.stochastic_rounding) == (ours.grad.stochastic, ours.input.stochastic)
    for name in (
        "TELayerNormColumnParallelLinear",
        "TEColumnParallelLinear",
        "TERowParallelLinear",
        "TENorm",
        "TEDotProductAttention",
    ):
        assert inspect.isclass(getattr(modules, name))
    assert "fp8_param_gather" in {f.name for f in fields(DistributedDataParallelConfig)}
    assert "fp8_recipe" in {f.name for f in fields(OptimizerConfig)}
    assert {"enabled", "recipe"} <= inspect.signature(te.autocast).parameters.keys()
    assert {"enabled", "fp8_recipe", "fp8_group"} <= inspect.signature(te.fp8_autocast).parameters.keys()
    assert {"enabled", "recipe"} <= inspect.signature(te.fp8_model_init).parameters.keys()
    assert all(int(getattr(constants.DType, member.name)) == member.value for member in te_on_cpu.DType)
    assert set(megatron_fields(PrecisionConfig(), "none")) == set(megatron_fields(PrecisionConfig(), "nvfp4"))
