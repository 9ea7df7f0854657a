"""Binding of the compiled linear layer for few rows in `few_rows.c`: product, norms, activation and residual at once."""

import contextlib
import ctypes
import mmap
from dataclasses import dataclass

import torch

from train.native.kernels import library
from train.native.passes import FUNCTIONS

i64, i32, f32 = ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Few(ctypes.Structure):
    """Mirror of `Few` in few_rows.c."""

    _fields_ = [
        ("rows", i64), ("inputs", i64), ("outputs", i64), ("groups", i64),
        ("bf16", i32), ("function", i32), ("gated", i32), ("wide", i32),
        ("eps", f32), ("offset", f32), ("post_eps", f32), ("post_offset", f32), ("softcap", f32),
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


class Memory:
    """Memory of the layers of one model: their packed weights in few large blocks, and scratch that they share.

    Blocks are in pages of 2 MiB where the system has them: weights are then read 10 to 20 % faster (docs/log.md).
    """

    BLOCK = 32 << 20

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._scratch = torch.empty(0)

    def take(self, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised numbers, aligned to a line of the cache. Its memory lives as long as the tensor."""
        size = max(1, numbers) * dtype.itemsize
        if self._used + size > len(self._block):
            memory = mmap.mmap(-1, -(-max(size, self.BLOCK) // HUGE_PAGE) * HUGE_PAGE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without such pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._block, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        part = self._block[self._used : self._used + size].view(dtype)
        self._used += -(-size // 64) * 64
        return part

    def scratch(self, floats: int) -> int:
        """Address of memory for one call."""
        if floats > len(self._scratch):
            self._scratch = torch.empty(floats)
        return self._scratch.data_ptr()


HUGE_PAGE = 2 << 20


class FewRows:
    """out = residual + post(cap(f(weight norm(x)))): one linear layer with what surrounds it, prepared once and called often.

    The weight is copied (`pack`). Norms are read where they are: their memory must stay there. All tensors are contiguous and of
    one dtype. wide: the result is fp32. memory: layers of one model share it; they are called one at a time.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        norm: NormWeight | None = None,
        function: str | None = None,
        gated: bool = False,
        post: NormWeight | None = None,
        softcap: float | None = None,
        wide: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self._weight, self._norms = weight, [x.weight for x in (norm, post) if x is not None]
        assert all(x.is_contiguous() and x.dtype == weight.dtype for x in (weight, *self._norms))
        self.outputs, self.inputs = weight.shape
        self.width = self.outputs // 2 if gated else self.outputs
        self._dtype = torch.float32 if wide else weight.dtype
        self._head = Few(
            inputs=self.inputs, outputs=self.outputs, groups=norm.groups if norm else 1,
            bf16=int(weight.dtype == torch.bfloat16), function=FUNCTIONS.index(function) if function else -1,
            gated=int(gated), wide=int(wide), eps=norm.eps if norm else 0.0, offset=norm.offset if norm else 0.0,
            post_eps=post.eps if post else 0.0, post_offset=post.offset if post else 0.0, softcap=softcap or 0.0,
        )  # fmt: skip
        kernels = library("few_rows")
        assert kernels is not None
        self._kernels, self._call = kernels, kernels.stratum_few_rows
        self._memory = memory or Memory()
        self._packed = self._memory.take(kernels.stratum_packed(ctypes.byref(self._head)), weight.dtype)
        self._scratch_of_row = kernels.stratum_few_scratch(ctypes.byref(self._head))
        self._pointers = (norm and norm.weight.data_ptr(), self._packed.data_ptr(), post and post.weight.data_ptr())
        self.pack()

    def pack(self) -> None:
        """Copy the weight in the order in which the product reads it. Call it again after the weight's values have changed."""
        self._kernels.stratum_pack(
            ctypes.byref(self._head), self._weight.data_ptr(), self._packed.data_ptr(), torch.get_num_threads()
        )

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, inputs], contiguous -> [rows, width]."""
        assert x.is_contiguous() and (residual is None or residual.is_contiguous())
        self._head.rows = rows = x.shape[0]
        out = torch.empty(rows, self.width, dtype=self._dtype)
        norm, weight, post = self._pointers
        self._call(
            ctypes.byref(self._head), x.data_ptr(), norm, weight, post, None if residual is None else residual.data_ptr(),
            self._memory.scratch(rows * self._scratch_of_row), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


def line_sums(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of the largest number of each line, the first among equals [N]; log-sum-exp [N], NaN if the line has a NaN)."""
    if not (logits_NV.dtype == torch.float32 and usable(logits_NV)):
        return logits_NV.argmax(-1), logits_NV.logsumexp(-1)
    kernels, logits_NV = library("few_rows"), logits_NV.contiguous()
    assert kernels is not None
    best, log_sums = torch.empty(len(logits_NV), dtype=torch.int64), torch.empty(len(logits_NV))
    sizes = (i64 * 2)(*logits_NV.shape)
    kernels.stratum_line_sums(
        sizes, logits_NV.data_ptr(), best.data_ptr(), log_sums.data_ptr(), torch.get_num_threads()
    )
    return best, log_sums
