"""Binding of the compiled linear layer for few rows in `few_rows.c`: product, norms, activation and residual at once."""

import ctypes
from dataclasses import dataclass

import torch

from train.native.kernels import library
from train.native.passes import FUNCTIONS

i64, i32, f32 = ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Few(ctypes.Structure):
    """Mirror of `Few` in few_rows.c."""

    _fields_ = [
        ("rows", i64), ("inputs", i64), ("outputs", i64), ("groups", i64),
        ("bf16", i32), ("function", i32), ("gated", i32), ("unused", i32),
        ("eps", f32), ("offset", f32), ("post_eps", f32), ("post_offset", f32),
    ]  # fmt: skip


@dataclass(frozen=True)
class NormWeight:
    """An RMSNorm: out = x / rms(x) * (offset + weight), over each of `groups` parts."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    groups: int = 1


def usable(x: torch.Tensor) -> bool:
    """Whether the compiled version supports this tensor: fp32 or bf16 on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and library("few_rows") is not None


class FewRows:
    """out = residual + post(f(weight norm(x))): one linear layer with what surrounds it, prepared once and called often.

    All tensors are contiguous and of one dtype; their memory must stay where it is. Values may change.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        norm: NormWeight | None = None,
        function: str | None = None,
        gated: bool = False,
        post: NormWeight | None = None,
    ) -> None:
        tensors = [weight, *(x.weight for x in (norm, post) if x is not None)]
        assert all(x.is_contiguous() and x.dtype == weight.dtype for x in tensors)
        self._weights = tensors  # kept alive: the kernel reads their memory
        self.outputs, self.inputs = weight.shape
        self.width = self.outputs // 2 if gated else self.outputs
        self._pointers = [norm and norm.weight.data_ptr(), weight.data_ptr(), post and post.weight.data_ptr()]
        self._head = Few(
            inputs=self.inputs, outputs=self.outputs, groups=norm.groups if norm else 1,
            bf16=int(weight.dtype == torch.bfloat16), function=FUNCTIONS.index(function) if function else -1,
            gated=int(gated), eps=norm.eps if norm else 0.0, offset=norm.offset if norm else 0.0,
            post_eps=post.eps if post else 0.0, post_offset=post.offset if post else 0.0,
        )  # fmt: skip
        kernels = library("few_rows")
        assert kernels is not None
        self._call = kernels.stratum_few_rows

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, inputs], contiguous -> [rows, width]."""
        rows = x.shape[0]
        assert x.is_contiguous() and (residual is None or residual.is_contiguous())
        out = x.new_empty(rows, self.width)
        scratch = torch.empty(rows * (self.inputs + self.outputs))
        self._head.rows = rows
        norm, weight, post = self._pointers
        self._call(
            ctypes.byref(self._head), x.data_ptr(), norm, weight, post, None if residual is None else residual.data_ptr(),
            scratch.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
