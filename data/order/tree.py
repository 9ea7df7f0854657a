"""The order of many sources with constant shares. A binary tree, whose leaves are the sources, chooses each row's source.

A node of weight w_v that has drawn n rows gives

    A(n) = floor(n w_a / w_v + 1/2)   to one child, n - A(n) to the other,

so the exact number of draws of any leaf before any position is known without examining other positions, and a row costs the
depth of the tree. Each split adds an error of at most 1/2, and a child inherits the error of its parent in proportion to its
weight: the error of a leaf of weight w is at most (1 + sum of w / w_v over the inner nodes v between it and the root) / 2.
`bound` is the largest of these, about 1 for one heavy and many light sources. Several trees are tried, and the one with the
smallest bound is used: the lightest sources joined first (Huffman), the sorted weights cut in halves, the heaviest sources
split off one by one; each also with the lightest sources in a subtree of their own.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_MOST_HEAVY = 16
"""Largest number of heavy sources that are tried separately from the others."""
_Tree = int | tuple["_Tree", "_Tree"]
"""A source, or two subtrees."""


class ShareTree:
    """The sources of the rows after a position, while shares are constant."""

    def __init__(self, shares: Sequence[Fraction], behind: Sequence[Fraction]) -> None:
        """shares: of each source, summing to 1. behind: owed minus drawn at the position, of each source, summing to 0."""
        self._count = len(shares)
        drawn = [i for i, share in enumerate(shares) if share]
        scale = math.lcm(*(share.denominator for share in shares), *(f.denominator for f in behind))
        self._weights = [int(share * scale) for share in shares]
        trees = _candidates(self._weights, sorted(drawn, key=lambda i: (-shares[i], i)))
        bounds = [_bound(tree, self._weights) for tree in trees]
        which = bounds.index(min(bounds))
        self.bound = bounds[which]
        """Largest |drawn - owed| of any source, in rows, once the difference at the start has been made up."""
        self._behind = [int(f * scale) for f in behind]
        self._scale = scale
        self._nodes: list[tuple[int, int, int, int, int]] = []
        """For each inner node: factor, constant and divisor of A(n), and its two children (source i is -1 - i)."""
        self._root, _, _ = self._add(trees[which])

    def drawn(self, rows: int) -> list[int]:
        """Number of rows of each source among the first `rows`."""
        counts = [0] * self._count
        waiting = [(self._root, rows)]
        while waiting:
            at, n = waiting.pop()
            if at < 0:
                counts[-1 - at] = n
            elif n:
                _, _, _, left, right = self._nodes[at]
                first = self._given(at, n)
                waiting += [(left, first), (right, n - first)]
        return counts

    def sources(self, start: int, stop: int) -> np.ndarray:
        """int16 [stop - start]: the source of each row."""
        out = np.empty(stop - start, dtype=np.int16)
        waiting = [(self._root, start, np.arange(stop - start))]
        while waiting:
            at, n, rows = waiting.pop()
            if not len(rows):
                continue
            if at < 0:
                out[rows] = -1 - at
                continue
            factor, constant, divisor, left, right = self._nodes[at]
            given = [min(max((factor * k + constant) // divisor, 0), k) for k in range(n, n + len(rows) + 1)]
            goes_left = np.array([b > a for a, b in itertools.pairwise(given)])
            waiting += [(left, given[0], rows[goes_left]), (right, n - given[0], rows[~goes_left])]
        return out

    def _given(self, at: int, n: int) -> int:
        factor, constant, divisor, _, _ = self._nodes[at]
        return min(max((factor * n + constant) // divisor, 0), n)

    def _add(self, tree: _Tree) -> tuple[int, int, int]:
        """Add the nodes of a tree. -> its number, weight, and rows owed but not drawn (both in units of 1 / scale)."""
        if isinstance(tree, int):
            return -1 - tree, self._weights[tree], self._behind[tree]
        left, weight, behind = self._add(tree[0])
        right, other_weight, other_behind = self._add(tree[1])
        whole, all_behind, scale = weight + other_weight, behind + other_behind, self._scale
        # floor(f_a + w_a (n - f_v) / w_v + 1/2), with f and w in units of 1 / scale
        constant = 2 * (behind * whole - weight * all_behind) + whole * scale
        self._nodes.append((2 * weight * scale, constant, 2 * whole * scale, left, right))
        return len(self._nodes) - 1, whole, all_behind


def _candidates(shares: Sequence[int], order: Sequence[int]) -> list[_Tree]:
    """The trees to try. order: sources by decreasing share."""
    trees = [_huffman(shares, order), _halves(shares, order)]
    for heavy in range(1, min(len(order), _MOST_HEAVY)):
        light = _halves(shares, order[heavy:])
        trees += [(_huffman(shares, order[:heavy]), light), (_halves(shares, order[:heavy]), light)]
        tree = light
        for source in reversed(order[:heavy]):
            tree = source, tree
        trees.append(tree)
    return trees


def _huffman(shares: Sequence[int], drawn: Sequence[int]) -> _Tree:
    heap: list[tuple[int, int, _Tree]] = [(shares[i], n, i) for n, i in enumerate(drawn)]
    heapq.heapify(heap)
    for number in itertools.count(len(heap)):
        if len(heap) == 1:
            return heap[0][2]
        light, _, one = heapq.heappop(heap)
        next_light, _, other = heapq.heappop(heap)
        heapq.heappush(heap, (light + next_light, number, (one, other)))
    raise AssertionError("the loop ends with one tree")


def _halves(shares: Sequence[int], order: Sequence[int]) -> _Tree:
    """A tree that cuts the sources in halves of similar weight. order: sources by decreasing share."""
    if len(order) == 1:
        return order[0]
    whole = sum(shares[i] for i in order)
    sums = list(itertools.accumulate(shares[i] for i in order[:-1]))
    cut = 1 + min(range(len(sums)), key=lambda n: abs(2 * sums[n] - whole))
    return _halves(shares, order[:cut]), _halves(shares, order[cut:])


def _bound(tree: _Tree, shares: Sequence[int]) -> float:
    """Largest error of a leaf, in rows."""
    worst = 0.0
    waiting: list[tuple[_Tree, float]] = [(tree, 0.0)]
    weights: dict[int, float] = {}

    def weigh(part: _Tree) -> float:
        found = float(shares[part]) if isinstance(part, int) else weigh(part[0]) + weigh(part[1])
        weights[id(part)] = found
        return found

    weigh(tree)
    while waiting:
        part, inverse = waiting.pop()  # inverse: sum of 1 / w_v over the inner nodes above, without the root
        if isinstance(part, int):
            worst = max(worst, (1 + float(shares[part]) * inverse) / 2)
            continue
        inner = inverse if part is tree else inverse + 1 / weights[id(part)]
        waiting += [(part[0], inner), (part[1], inner)]
    return worst
