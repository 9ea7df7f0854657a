"""fp32 matrix products on a CPU, by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL, which uses half of the vectors' width on AMD processors with AVX-512; oneDNN uses all of
it: 2.1 times as fast there, 1.1 times with AVX2 (docs/log.md). torch calls oneDNN for fp32 only from compiled graphs,
through the operator used here. In all cases tried oneDNN gave the same bits for any number of threads.
"""

import torch

SMALLEST = 1 << 20
"""Multiplications from which on oneDNN's call, 8 us dearer than MKL's, pays (measured: even at 0.9 million)."""


def multiply(a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """factor times a [m, k] times b [k, n] of any strides, outside autograd. Where `a` is a transposed view (a weight's
    gradient) the result may be one too."""
    if not _goes_to_onednn(a, b):
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)
    product = _oriented(a, b)
    return product if factor == 1 else product.mul_(factor)


def _oriented(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # oneDNN is up to 1.7 times as fast with the wide side of a weight's gradient in its weight's place.
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
