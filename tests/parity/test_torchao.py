"""Our block quantisers against torchao's, which shares no code with Transformer Engine. Run by `make test-oracle`."""

import sys
from pathlib import Path

import pytest
import torch
from matrices import matrices, same

from recipes.schema.scaling import E4M3, Operand
from train.precision.quantize import quantize

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", autouse=True)
def torchao() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".oracle" / "precision"))


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
def test_blocks_with_fp32_scales_are_torchaos(native: bool) -> None:
    from torchao.prototype.blockwise_fp8_training import kernels

    for name, x in matrices().items():
        if name in ("zero", "tiny", "half zero"):
            continue  # torchao puts a floor of 1e-12 under amax, Transformer Engine does not
        x = x.float()
        data, inverse = kernels.torch_blockwise_scale_act_quant_lhs(x)
        rows = quantize(x, Operand(E4M3, "fp32", (1, 128)), "rows", torch_only=not native)
        assert same(rows.values, data.float() * inverse.repeat_interleave(128, 1)), name
        data, inverse = kernels.torch_blockwise_scale_weight_quant(x)
        square = quantize(x, Operand(E4M3, "fp32", (128, 128)), "rows", torch_only=not native)
        assert same(square.values, data.float() * inverse.repeat_interleave(128, 0).repeat_interleave(128, 1)), name


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
def test_mxfp8_is_torchaos_with_scales_rounded_up(native: bool) -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    for name, x in matrices().items():
        if name == "tiny":
            continue  # at the smallest scale torchao follows an older Transformer Engine, which did not scale at all
        scale, data = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
        want = data.float() * scale.view(torch.uint8).int().sub(127).float().exp2().repeat_interleave(32, 1)
        assert same(quantize(x, Operand(E4M3, "e8m0", (1, 32)), "rows", torch_only=not native).values, want), name
        turned = quantize(x.t().contiguous(), Operand(E4M3, "e8m0", (1, 32)), "columns", torch_only=not native)
        assert same(turned.values.t(), want), name
