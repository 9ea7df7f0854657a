"""fp32 matrix products on a CPU, by the faster of the two libraries in torch.

torch uses MKL for fp32 products; on AMD processors with AVX-512 MKL uses half of the vector width. oneDNN uses all of it:
2.1 times as fast there, 1.1 times with AVX2 (docs/log.md). torch itself calls oneDNN for fp32 only in compiled graphs,
through the operator used here. In all cases tried oneDNN gave the same bits for any number of threads.
"""

from typing import Protocol

import torch

SMALLEST = 1 << 20
"""oneDNN is used from this many multiplications on: a call costs 8 us more than MKL's (measured: equal at 0.9 million)."""


def multiply(a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """factor * a [m, k] * b [k, n], of any strides, outside autograd. If `a` is a transposed view (as for a weight's
    gradient), the result may be one too."""
    if not _goes_to_onednn(a, b):
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)
    product = _oriented(a, b)
    return product if factor == 1 else product.mul_(factor)


class Multiply(Protocol):
    """A product of two matrices, such as `unchecked`, or one that checks it (`train.native.product_check`)."""

    def __call__(self, product: str, a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
        """factor * a [m, k] * b [k, n]. product: its name for messages."""
        ...


def unchecked(product: str, a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """The product without a check."""
    del product
    return multiply(a, b, factor=factor)


def multiply_groups(
    rows: torch.Tensor,
    matrices: torch.Tensor,
    counts: list[int],
    *,
    in_one_call: bool | None = None,
    multiply: Multiply = unchecked,
    product: str = "forward",
) -> torch.Tensor:
    """Products of groups of rows with a matrix each, summed in fp32, in the dtype of the rows; outside autograd.

    rows [n, k], sorted by group; matrices [groups, k, m]; counts: rows of each group -> [n, m].

    in_one_call: use torch's grouped product. None: for bf16 on a GPU. On a CPU it takes 2 to 3 times as long in fp32 as one
    product of oneDNN for each group, whose call costs 8 us (docs/experts.md). multiply, product: of each group; a check needs one
    product for each group.
    """
    if in_one_call is None:
        in_one_call = rows.is_cuda and rows.dtype == torch.bfloat16 and multiply is unchecked
    if in_one_call:
        ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
        return torch._grouped_mm(rows, matrices, offs=ends)
    wide = torch.promote_types(rows.dtype, torch.float32)
    found = [
        multiply(f"expert {index} {product}", part.to(wide), matrix.to(wide))
        for index, (part, matrix) in enumerate(zip(rows.split(counts), matrices, strict=True))
    ]
    return (found[0] if len(found) == 1 else torch.cat(found)).to(rows.dtype)


def _oriented(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # For a weight's gradient oneDNN is up to 1.7 times as fast if its "weight" argument is the wider operand.
    if a.stride(0) == 1 and a.shape[0] > b.shape[1]:
        return _product(b.t(), a).t()
    return _product(a, b.t())


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _goes_to_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
