"""Matrix products checked by sums: algorithm-based fault tolerance (Huang, Abraham 1984, doi 10.1109/TC.1984.1676475).

    C = A B, A [m, k], B [k, n]; signs r [n], each +1 or -1:      C r  ==  A (B r)   up to rounding, for each of the m rows

The sums are computed in float64. The difference in row i that rounding can explain: in the model of Higham and Mary (arXiv
1904.05678 gives its sharper form; SIAM J. Sci. Comput. 41(5), 2019, theorem 3.1) the k rounding errors of an element are
mean-independent and each is at most u times a partial sum, which |a_i| |b_j| bounds. The difference is then a sum of k n bounded
terms without drift, and Azuma's inequality gives

    | sum_j r_j (fl(C) - A B)_ij |  <=  LAMBDA u sqrt(k + 1) |a_i|_2 |B|_F     with probability 1 - 2 exp(-LAMBDA^2 / 2)

(k + 1: one more rounding for a factor.) Random signs, instead of Huang's ones, keep equal columns, whose errors are equal, from
adding up. The bound holds for values of any magnitude and format, because the operands are compared after their rounding.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from train.native.gemm import Multiply, multiply, unchecked

LAMBDA = 8.0
"""A false alarm has a probability of 2 exp(-32), 3e-14, a row: one in 20,000 steps of 1,000 products of 1,000,000 rows."""

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff by format: half the distance from 1 to the next number."""


@dataclass(frozen=True)
class ProductFault:
    """A product whose sums do not agree."""

    product: str
    place: str
    row: int
    column: int | None
    """None: the row is right when it is computed again in float64, so the sums were wrong, not the product."""
    difference: float
    """Of the element, or of the row's sums."""
    bound: float
    """The largest difference that rounding explains."""
    rows: int
    """How many rows of the product disagree."""

    def describe(self) -> str:
        """The fault in one line, without rank and step."""
        if self.column is None:
            return (
                f"{self.product} product of {self.place}: the sums of row {self.row} were wrong, its elements are right"
            )
        more = f" and {self.rows - 1} more rows" if self.rows > 1 else ""
        return (
            f"{self.product} product of {self.place}: row {self.row}, column {self.column}{more} off by "
            f"{self.difference:.3g} (rounding: at most {self.bound:.1g})"
        )


class ProductCheck:
    """Checks the products of one linear layer, and keeps the faults until they are taken."""

    def __init__(self, place: str) -> None:
        """place: the layer, for messages."""
        self.place = place
        self._faults: list[ProductFault] = []

    def multiply(self, product: str, a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
        """As `gemm.multiply`; the result is not changed."""
        c = multiply(a, b, factor=factor)
        fault = compare(a, b, c, factor=factor)
        if fault is not None:
            row, column, difference, bound, rows = fault
            self._faults.append(ProductFault(product, self.place, row, column, difference, bound, rows))
        return c

    def take(self) -> list[ProductFault]:
        """The faults since the last call."""
        found, self._faults = self._faults, []
        return found


def checks_of(module: torch.nn.Module) -> Iterator[ProductCheck]:
    """The checks of a module's linear layers (their attribute `product_check`)."""
    for part in module.modules():
        check = getattr(part, "product_check", None)
        if check is not None:
            yield check


def multiplier_of(linear: torch.nn.Module) -> Multiply:
    """How a linear layer multiplies."""
    check: ProductCheck | None = getattr(linear, "product_check", None)
    return unchecked if check is None else check.multiply


def compare(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, factor: float = 1.0
) -> tuple[int, int | None, float, float, int] | None:
    """(row, column, difference, bound, disagreeing rows) if c is not factor * a b; None if it is, up to rounding. Operands that
    are not finite, or overflow, are left to the checks for NaN and infinity."""
    (m, k), n = a.shape, b.shape[1]
    if not m * k * n:
        return None
    r = signs(n, c.device)
    wide_b = b.double()
    expected = a.double() @ (wide_b @ r) * factor
    norms = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64) * torch.linalg.vector_norm(wide_b) * abs(factor)
    bound = norms * _share(k, n, c.dtype) + _underflow(k, c.dtype) * n
    difference = c.double() @ r - expected
    wrong = ~(difference.abs() <= bound) & bound.isfinite() & (norms < torch.finfo(c.dtype).max)
    if not wrong.any():
        return None
    row = int(wrong.nonzero()[0])
    exact = a[row].double() @ wide_b * factor
    # An element's own bound: its operands' magnitudes instead of the norms.
    limit = (a[row].double().abs() @ wide_b.abs()) * abs(factor) * _share(k, 1, c.dtype) + _underflow(k, c.dtype)
    excess = ((c[row].double() - exact).abs() / limit).nan_to_num(nan=math.inf)
    column = int(excess.argmax())
    rows = int(wrong.sum())
    if excess[column] <= 1 and abs(float((c[row].double() - exact) @ r)) <= float(bound[row]):
        return row, None, float(difference[row].abs()), float(bound[row]), rows
    return row, column, float((c[row, column].double() - exact[column]).abs()), float(limit[column]), rows


def _share(k: int, n: int, dtype: torch.dtype) -> float:
    """The bound as a share of the norms: of the product's rounding, and (certain, not probable) of the sums in float64."""
    return LAMBDA * UNIT[dtype] * math.sqrt(k + 1) + UNIT[torch.float64] * (k + n) * math.sqrt(n)


def _underflow(k: int, dtype: torch.dtype) -> float:
    """What an element may lose because processors may replace subnormal numbers by 0."""
    return 2 * k * torch.finfo(dtype).tiny


@functools.lru_cache(maxsize=64)
def signs(count: int, device: torch.device) -> torch.Tensor:
    """[count] float64 of +1 and -1, always the same."""
    generator = torch.Generator().manual_seed(count)
    return (2.0 * torch.randint(0, 2, (count,), generator=generator) - 1.0).double().to(device)
