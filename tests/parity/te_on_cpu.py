"""Transformer Engine's real Python layer on a machine without a GPU: a stand-in for its compiled extension, in torch.

What runs is the package's own modules, autocast, recipes' bookkeeping and reference quantisers; what stands in are the
entry points of `transformer_engine_torch` that Linear, LayerNormLinear and RMSNorm call. Anything else raises when it is
used, with its name. `install()` must come before the first import of Megatron or transformer_engine in a process (the
tests' conftest calls it where STRATUM_TEST_TE=1): it makes torch say that there is a GPU and sends "cuda" tensors to the
CPU, so nothing else can share that process.
"""

import contextlib
import enum
import importlib.util
import os
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PACKAGES = Path(__file__).resolve().parents[2] / ".oracle" / "precision"
VERSION = "2.20.2"


class DType(enum.IntEnum):
    """Numbers of transformer_engine::DType; read back from the package's own constants in the contract test."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class Missing:
    """An entry point that has no stand-in: may be named, not used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self._name} has no stand-in on a CPU")

    __call__ = __index__ = __bool__ = _refuse

    def __int__(self) -> int:
        if self._name.startswith("NVTE"):  # tables of enum members are made at import; nothing here reads them
            return zlib.crc32(self._name.encode())
        return self._refuse()

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")


class CudaIsCpu(TorchFunctionMode):
    """device="cuda" means the CPU, wherever it is written."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _cpu_for(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_cpu_for(argument) for argument in args)
        return func(*args, **kwargs)


def _cpu_for(device: Any) -> Any:
    is_cuda = str(device).startswith("cuda") if isinstance(device, str | torch.device) else False
    return torch.device("cpu") if is_cuda else device


def install() -> Any:
    """Import Transformer Engine over the stand-in. -> the `transformer_engine.pytorch` package."""
    sys.path.insert(0, str(PACKAGES))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package's own switch: do not load the compiled library
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling would look for the GPU's Triton
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scaling moves on by the package's own Python
    extension = _extension()
    sys.modules["transformer_engine_torch"] = extension
    found = importlib.util.find_spec("transformer_engine")
    assert found is not None and found.submodule_search_locations, "run `bash tests/parity/install.sh` first"
    package = types.ModuleType("transformer_engine")  # its own __init__ would import .pytorch too early
    package.__path__ = list(found.submodule_search_locations)  # type: ignore[attr-defined]
    package.__spec__ = found
    package.__version__ = VERSION  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = package
    _pretend_a_gpu()

    import transformer_engine.common as common

    common.load_framework_extension = lambda *args, **kwargs: None
    package.common = common  # type: ignore[attr-defined]
    import transformer_engine.pytorch as te

    package.pytorch = te  # type: ignore[attr-defined]
    import transformer_engine.pytorch.cpp_extensions as entry_points
    import transformer_engine.pytorch.cpp_extensions.gemm as gemm

    entry_points.__getattr__ = _missing  # type: ignore[method-assign,assignment]
    gemm.get_cublas_workspace = lambda *args: torch.empty(1, dtype=torch.uint8)
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment,method-assign]
    torch.nn.Parameter.is_cuda = torch.Tensor.is_cuda
    CudaIsCpu().__enter__()
    return te


def _pretend_a_gpu() -> None:

    gpu = types.SimpleNamespace(multi_processor_count=132, name="none", major=10, minor=0, total_memory=80 << 30)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *args, **kwargs: gpu.name
    torch.cuda.get_device_properties = lambda *args, **kwargs: gpu  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args, **kwargs: (gpu.major, gpu.minor)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]


def _extension() -> types.ModuleType:
    module: Any = types.ModuleType("transformer_engine_torch")
    module.DType = DType
    module.NVTE_Fused_Attn_Backend = enum.IntEnum(
        "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    )
    forward = [f"GEMM{n}_{part}" for n in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")]
    backward = [f"GRAD_{part}{n}" for n in (1, 2, 3) for part in ("OUTPUT", "INPUT")]
    module.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", {name: i for i, name in enumerate(forward)})
    module.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", {name: i for i, name in enumerate(backward)})
    module.rmsnorm_fwd, module.rmsnorm_bwd, module.generic_gemm = rmsnorm_fwd, rmsnorm_bwd, generic_gemm
    module.multi_tensor_l2norm = multi_tensor_l2norm
    module.multi_tensor_scale = module.multi_tensor_scale_tensor = multi_tensor_scale
    module.quantize, module.dequantize, module.fp8_transpose = quantize, dequantize, fp8_transpose
    module.get_cudnn_version = lambda: 92400
    module.get_cublasLt_version = lambda: 130000
    module.__getattr__ = _missing
    return module


def _missing(name: str) -> Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(name)


def _dtype(given: Any, default: torch.dtype) -> torch.dtype:
    from transformer_engine.pytorch.constants import DType as TheirDType
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    if given is None:
        return default
    return given if isinstance(given, torch.dtype) else TE_DType_To_Torch[TheirDType.cast(given)]


def rmsnorm_fwd(
    x: torch.Tensor, w: torch.Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, zero_centered: bool
) -> tuple[Any, None, torch.Tensor]:
    """y = x / rms(x) * w in fp32, then quantised if the caller requests it."""
    exact = x.float()
    inverse = torch.rsqrt(exact.square().mean(-1) + eps)
    y = (exact * inverse[:, None] * (w.float() + float(zero_centered))).to(_dtype(dtype, x.dtype))
    if quantizer is not None:
        return quantizer(y), None, inverse
    if out is not None:
        out.copy_(y)
        return out, None, inverse
    return y, None, inverse


def rmsnorm_bwd(
    grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, w: torch.Tensor, margin: int, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and w."""
    unit = x.float() * inverse[:, None]
    scaled = grad.float() * (w.float() + float(zero_centered))
    grad_x = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse[:, None]
    return grad_x.to(x.dtype), (grad.float() * unit).sum(0).to(w.dtype)


def generic_gemm(
    A: torch.Tensor,
    transpose_A: bool,
    B: torch.Tensor,
    transpose_B: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **others: Any,
) -> tuple[Any, torch.Tensor | None, None, None]:
    """op(B) op(A) in fp32: cuBLAS's column-major product, read row-major. FP8 codes are multiplied, the sum is scaled."""
    assert not gelu and others.get("comm_overlap") is None
    (a, scale_a), (b, scale_b) = _codes(A), _codes(B)
    lead = None if transpose_B else b.shape[:-1]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    y = (b.t() if transpose_B else b) @ (a.t() if transpose_A else a) * (scale_a * scale_b)
    grad_bias = None
    if bias is not None:
        if grad:
            grad_bias = b.sum(0).to(bias.dtype)
        else:
            y = y + bias.float()
    y = y.to(_dtype(out_dtype, torch.float32))
    if lead is not None and len(lead) > 1:
        y = y.view(*lead, -1)
    if out is not None:
        out.copy_(y.view(out.shape) + out if accumulate else y.view(out.shape))
        y = out
    return y if quantizer is None else quantizer(y), grad_bias, None, None


def multi_tensor_l2norm(
    chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of all tensors together."""
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in lists[0]])
    return torch.linalg.vector_norm(norms).view(1), norms


def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], scale: Any) -> None:
    """Second list = first list * scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def quantize(tensor: torch.Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Per-tensor FP8: with the quantiser's scale (delayed scaling; notes the amax), or one from the tensor."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    kind = _FP8[int(quantizer.dtype)]
    most = torch.finfo(kind).max
    amax = tensor.detach().float().abs().max()
    if isinstance(quantizer, Float8Quantizer):
        scale = quantizer.scale.clone()
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    elif isinstance(quantizer, Float8CurrentScalingQuantizer):
        scale = torch.where(amax > 0, torch.div(torch.tensor(most), amax), 1.0).view(1)
    else:
        return Missing(f"quantize for {type(quantizer).__name__}")._refuse()
    data = (tensor.detach().float() * scale).clamp(-most, most).to(kind).view(torch.uint8)
    if out is not None:
        out._data.copy_(data)
        out._scale_inv.copy_(scale.reciprocal())
        out._transpose, out._transpose_invalid = None, True
        return out
    made = Float8Quantizer(scale, torch.zeros(1), quantizer.dtype)
    made.internal = quantizer.internal
    result = made.create_tensor_from_data(data, fake_dtype=tensor.dtype, internal=quantizer.internal)
    result._quantizer = quantizer
    return result


_FP8 = {DType.kFloat8E4M3.value: torch.float8_e4m3fn, DType.kFloat8E5M2.value: torch.float8_e5m2}


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    """FP8 storage to a plain tensor."""
    return _plain(tensor).to(_dtype(dtype, torch.float32))


def fp8_transpose(data: torch.Tensor, dtype: Any, out: Any = None) -> torch.Tensor:
    """Codes with rows and columns exchanged."""
    return data.reshape(-1, data.shape[-1]).t().contiguous()


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, *, scale_a: Any, scale_b: Any, out_dtype: Any, **_: Any
) -> torch.Tensor:
    """`torch._scaled_mm` of two FP8 matrices with a scale each: the product of the codes in fp32, scaled. (torch's own on a
    CPU depends on the processor.)"""
    return ((a.float() @ b.float()) * (float(scale_a) * float(scale_b))).to(out_dtype)


def _codes(tensor: Any) -> tuple[torch.Tensor, float]:
    """(fp32 values, scale) of FP8 storage in either orientation; of a plain tensor, the tensor itself and 1."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.float(), 1.0
    data = tensor._data if tensor._data is not None else tensor._transpose.t().contiguous()
    return data.view(_FP8[int(tensor._fp8_dtype)]).float(), float(tensor._scale_inv)


def _plain(tensor: Any) -> torch.Tensor:
    """fp32 values that a plain tensor or FP8 storage stands for."""
    codes, scale = _codes(tensor)
    return codes * scale
