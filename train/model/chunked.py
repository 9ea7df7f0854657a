"""The chunked scan in plain torch: the definition that `scan.c` is tested against, and its replacement on GPUs, in float64
and without a compiler.

Formulas and shape letters: module docstring of `train.model.ssd`.
"""

from dataclasses import dataclass

import torch

from train.model.documents import document_starts
from train.native.scan import ScanSizes


@dataclass(frozen=True)
class ScanGrads:
    xbc: torch.Tensor
    """[B, L, C]"""
    dt: torch.Tensor
    """[B, L, H], gradient of dt after softplus"""
    A: torch.Tensor
    D: torch.Tensor


class Chunked:
    """One scan in chunks: tensors [K, Q, ...]. Rows are padded to whole chunks with dt = 0, which leaves the state unchanged.

    Groups and heads are computed one at a time, on strided views of the token-major tensors, which batched products accept
    without a copy, and on Q x Q matrices that fit the cache. (All heads at once would need a transposed copy of every
    operand and write the matrices to memory: 1.9 times slower, docs/log.md.)
    """

    def __init__(
        self,
        xbc_BLC: torch.Tensor,
        dt_LBH: torch.Tensor,
        A_H: torch.Tensor,
        sizes: ScanSizes,
        *,
        document_BL: torch.Tensor | None,
    ) -> None:
        s = self.sizes = sizes
        self.rows, self.length, _ = xbc_BLC.shape
        self.per_row = -(-self.length // s.chunk)
        self.A = A_H
        self.xbc = self.chunked(xbc_BLC)
        self.dt = self.chunked(dt_LBH.transpose(0, 1))  # [K, Q, H]
        self.document = None if document_BL is None else self.chunked(document_BL, fill_last=True)
        self.decay, self.rest = self.running_sums()  # s of the formulas: nearest float and rest, [K, Q, H] each
        self.total = self.decay[:, -1]  # [K, H]

    def running_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s = nearest + rest. The nearest float alone loses small steps after large ones: with two sums near -1000 the error
        of s_i - s_j would be 6e-5, and so would that of exp(s_i - s_j). (nearest_i - nearest_j is exact if the two are close.)

        Sums restart at zero at each document, so that a document's numbers do not depend on the one before it."""
        steps = self.dt * self.A
        s = steps.cumsum(1, dtype=torch.float64)
        if self.document is not None:
            s -= (s - steps).gather(1, document_starts(self.document).unsqueeze(-1).expand_as(s))
        nearest = s.to(self.dt.dtype)
        return nearest, (s - nearest).to(self.dt.dtype)

    def chunked(self, rows_BL: torch.Tensor, *, fill_last: bool = False) -> torch.Tensor:
        """[B, L, ...] -> [K, Q, ...]; an incomplete last chunk is padded with zeros, or with the last value."""
        missing = self.per_row * self.sizes.chunk - self.length
        if missing:
            shape = (self.rows, missing, *rows_BL.shape[2:])
            end = rows_BL[:, -1:].expand(shape) if fill_last else rows_BL.new_zeros(shape)
            rows_BL = torch.cat([rows_BL, end], dim=1)
        return rows_BL.reshape(self.rows * self.per_row, self.sizes.chunk, *rows_BL.shape[2:])

    def unchunk(self, chunks_KQ: torch.Tensor) -> torch.Tensor:
        """[K, Q, ...] -> [B, L, ...] (a view)."""
        return chunks_KQ.view(self.rows, -1, *chunks_KQ.shape[2:])[:, : self.length]

    def forward(
        self, D_H: torch.Tensor, *, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """before: state before the first chunk, or None for zeros.

        -> (y [K, Q, H*P], states before each chunk [G, B, chunks, N, H/G, P], state after the last [B, G, N, H/G, P])."""
        s = self.sizes
        gain = self.state_weights().mul_(self.dt)  # dt is included, so it multiplies x
        at_row, at_column = torch.exp(self.rest), torch.exp(-self.rest).mul_(self.dt)
        added = torch.stack(
            [torch.bmm(self.B(g).transpose(1, 2), self.weighted(self.group_x(g), gain, g)) for g in range(s.groups)]
        )
        states, after = self.pass_states(added, before)
        carry = self.carry_weights()
        y = torch.empty(self.xbc.shape[0], s.chunk, s.heads, s.head_dim, dtype=self.xbc.dtype, device=self.xbc.device)
        for g in range(s.groups):
            scores = self.scores(g)
            carried = torch.bmm(self.C(g), self.flat(states, g)).unflatten(-1, (s.heads_per_group, s.head_dim))
            for index, h in enumerate(self.heads(g)):
                x = self.head_x(h)
                part = torch.bmm(self.decays(h).mul_(scores), x * at_column[:, :, h, None])
                part.addcmul_(carried[:, :, index], carry[:, :, h, None])
                torch.mul(part, at_row[:, :, h, None], out=y[:, :, h]).addcmul_(x, D_H[h])
        return y.flatten(-2), states, after

    def backward(self, grad_y_BLI: torch.Tensor, states: torch.Tensor, D_H: torch.Tensor) -> ScanGrads:
        """Gradients of `forward` with before=None, from the gradient of y and the states that it returned."""
        s = self.sizes
        grad_y = self.chunked(grad_y_BLI).unflatten(-1, (s.heads, s.head_dim))
        carry, gain = self.carry_weights(), self.state_weights()
        at_row, at_column = torch.exp(self.rest), torch.exp(-self.rest)
        grad_xbc = torch.empty_like(self.xbc)
        grad_a = torch.empty_like(self.dt)  # gradient of dt A at each token
        through_x = torch.empty_like(self.dt)  # <x, d(dt x)>
        left = torch.empty_like(self.dt)  # gradient of dt A through each token's share of the chunk's final state
        grad_D = torch.empty_like(D_H)

        carried = [self.weighted(grad_y[:, :, self.span(g)], carry, g) for g in range(s.groups)]
        grad_before = torch.stack([torch.bmm(self.C(g).transpose(1, 2), carried[g]) for g in range(s.groups)])
        grad_added, grad_total = self.pass_states_backward(grad_before, states)
        for g in range(s.groups):
            B, C, scores = self.B(g), self.C(g), self.scores(g)
            before, built = self.flat(states, g), self.flat(grad_added, g)
            grad_C = torch.bmm(carried[g], before.transpose(1, 2))
            entered = torch.bmm(C, before).mul_(carried[g]).unflatten(-1, (s.heads_per_group, s.head_dim)).sum(-1)
            grad_a[:, :, self.span(g)] = entered.flip(1).cumsum(1).flip(1)
            grad_B = torch.bmm(self.weighted(self.group_x(g), gain * self.dt, g), built.transpose(1, 2))
            from_state = torch.bmm(B, built).unflatten(-1, (s.heads_per_group, s.head_dim))
            grad_scores = torch.zeros_like(scores)
            for index, h in enumerate(self.heads(g)):
                x, grad = self.head_x(h), grad_y[:, :, h]
                dt, column = self.dt[:, :, h, None], at_column[:, :, h, None]
                # Inside the chunk: y = M (dt x) with M = decays * scores
                decays, grad_row = self.decays(h), grad * at_row[:, :, h, None]
                pairs = torch.bmm(grad_row, (x * (dt * column)).transpose(1, 2)).mul_(decays)
                grad_scores += pairs
                grad_a[:, :, h] += self.across(pairs.mul_(scores))
                grad_x_dt = torch.bmm(decays.mul_(scores).transpose(1, 2), grad_row)
                # Through the state built here: added = B^T (gain dt x)
                out_of_state = from_state[:, :, index] * gain[:, :, h, None]
                torch.sum(out_of_state * x, -1, out=left[:, :, h])
                grad_x_dt = torch.addcmul(out_of_state, grad_x_dt, column)
                torch.sum(grad_x_dt * x, -1, out=through_x[:, :, h])
                grad_D[h] = torch.sum(grad * x)
                torch.addcmul(grad_x_dt.mul_(dt), grad, D_H[h], out=grad_xbc[..., self.channels(h)])
            grad_scores = self.causal_(grad_scores)
            grad_xbc[..., self.B_channels(g)] = grad_B.baddbmm_(grad_scores.transpose(1, 2), C)
            grad_xbc[..., self.C_channels(g)] = grad_C.baddbmm_(grad_scores, B)

        left.mul_(self.dt)
        grad_a[:, 1:] += left.cumsum(1)[:, :-1]
        grad_a += grad_total.unsqueeze(1)
        return ScanGrads(
            xbc=self.unchunk(grad_xbc),
            dt=self.unchunk(grad_a * self.A + through_x),
            A=(grad_a * self.dt).sum((0, 1)),
            D=grad_D,
        )

    def heads(self, g: int) -> range:
        """Heads of a group."""
        return range(g * self.sizes.heads_per_group, (g + 1) * self.sizes.heads_per_group)

    def span(self, g: int) -> slice:
        """The heads of a group as a slice."""
        return slice(g * self.sizes.heads_per_group, (g + 1) * self.sizes.heads_per_group)

    def channels(self, h: int) -> slice:
        return slice(h * self.sizes.head_dim, (h + 1) * self.sizes.head_dim)

    def B_channels(self, g: int) -> slice:
        return slice(self.sizes.inner + g * self.sizes.state, self.sizes.inner + (g + 1) * self.sizes.state)

    def C_channels(self, g: int) -> slice:
        first = self.sizes.inner + (self.sizes.groups + g) * self.sizes.state
        return slice(first, first + self.sizes.state)

    def head_x(self, h: int) -> torch.Tensor:
        """[K, Q, P] view."""
        return self.xbc[..., self.channels(h)]

    def group_x(self, g: int) -> torch.Tensor:
        """[K, Q, H/G, P] view."""
        return self.xbc[..., : self.sizes.inner].unflatten(-1, (self.sizes.heads, self.sizes.head_dim))[
            :, :, self.span(g)
        ]

    def B(self, g: int) -> torch.Tensor:
        """[K, Q, N] view."""
        return self.xbc[..., self.B_channels(g)]

    def C(self, g: int) -> torch.Tensor:
        """[K, Q, N] view."""
        return self.xbc[..., self.C_channels(g)]

    def weighted(self, values: torch.Tensor, weights: torch.Tensor, g: int) -> torch.Tensor:
        """values [K, Q, H/G, P] of a group times weights [K, Q, H]: [K, Q, H/G*P], one matrix for all its heads."""
        return (values * weights[:, :, self.span(g), None]).flatten(-2)

    def flat(self, states: torch.Tensor, g: int) -> torch.Tensor:
        """States of a group as matrices, [K, N, H/G*P]."""
        return states[g].flatten(0, 1).flatten(-2)

    def decays(self, h: int) -> torch.Tensor:
        """exp(nearest_i - nearest_j) for i >= j, [K, Q, Q]; elsewhere at most 1 (the scores are zero there).

        exp(s_i - s_j) is this times exp(rest_i) and exp(-rest_j). Callers multiply the neighbouring factors of the product
        by those two: they have Q x P elements, and a second pass over Q x Q would cost 5 % of the scan."""
        s_KQ = self.decay[:, :, h]
        return (s_KQ.unsqueeze(-1) - s_KQ.unsqueeze(-2)).clamp_(max=0).exp_()

    def scores(self, g: int) -> torch.Tensor:
        """tril(C B^T) within the chunk and the document, [K, Q, Q]."""
        return self.causal_(torch.bmm(self.C(g), self.B(g).transpose(1, 2)))

    def causal_(self, square: torch.Tensor) -> torch.Tensor:
        """Zero the pairs with j > i or in different documents, in place. [K, Q, Q]."""
        square = square.tril_()
        if self.document is not None:
            square.masked_fill_(self.document.unsqueeze(-1) != self.document.unsqueeze(-2), 0)
        return square

    def across(self, pairs: torch.Tensor) -> torch.Tensor:
        """Sum over i >= k > j of pairs[i, j] (lower triangle), for every k: [K, Q, Q] -> [K, Q]."""
        size = self.sizes.chunk
        before = torch.ones(size, size, dtype=pairs.dtype, device=pairs.device).triu_(1)  # [j, k]: 1 where j < k
        return torch.matmul(pairs, before).tril_().sum(-2)

    def state_weights(self) -> torch.Tensor:
        """exp(s_Q - s_j): decay of token j's contribution up to the end of its chunk, [K, Q, H]."""
        weights = torch.exp((self.decay[:, -1:] - self.decay) + (self.rest[:, -1:] - self.rest))
        if self.document is not None:
            # Fill, do not multiply by zero: between documents the difference has no meaning and exp may be infinite.
            weights.masked_fill_((self.document != self.document[:, -1:]).unsqueeze(-1), 0)
        return weights

    def carry_weights(self) -> torch.Tensor:
        """exp(s_i): decay of the state before the chunk up to token i, [K, Q, H]."""
        weights = torch.exp(self.decay)
        if self.document is not None:
            weights *= (self.document == self.document_before().unsqueeze(-1)).unsqueeze(-1)
        return weights

    def document_before(self) -> torch.Tensor:
        """Document of the token before each chunk, [K]. For a row's first chunk: its first document (the state is zero)."""
        assert self.document is not None
        last = self.document[:, -1].view(self.rows, self.per_row)
        first = self.document[:, 0].view(self.rows, self.per_row)
        return torch.cat([first[:, :1], last[:, :-1]], dim=1).flatten()

    def chunk_decays(self) -> torch.Tensor:
        """exp(s_Q): decay of the state over a whole chunk, [G, B, chunks, 1, H/G, 1]."""
        s = self.sizes
        decays = torch.exp(self.total)
        if self.document is not None:
            decays = decays * (self.document[:, -1] == self.document_before()).unsqueeze(-1)
        by_group = decays.view(self.rows, self.per_row, s.groups, 1, s.heads_per_group, 1)
        return by_group.permute(2, 0, 1, 3, 4, 5)

    def pass_states(self, added: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The recurrence over chunks: added [G, K, N, H/G*P] -> (states before each [G, B, chunks, ...], after the last)."""
        s = self.sizes
        added = added.view(s.groups, self.rows, self.per_row, s.state, s.heads_per_group, s.head_dim)
        decays = self.chunk_decays()
        states = torch.empty_like(added)
        states[:, :, 0] = 0 if before is None else before.transpose(0, 1)
        for c in range(1, self.per_row):
            torch.addcmul(added[:, :, c - 1], states[:, :, c - 1], decays[:, :, c - 1], out=states[:, :, c])
        after = torch.addcmul(added[:, :, -1], states[:, :, -1], decays[:, :, -1])
        return states, after.transpose(0, 1)

    def pass_states_backward(
        self, grad_before: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward of `pass_states` -> (gradient of added, states' shape; gradient of s_Q through the chunk decays [K, H])."""
        grad_before = grad_before.view(states.shape)
        decays = self.chunk_decays()
        grad_added = torch.empty_like(states)
        grad_added[:, :, -1] = 0
        for c in range(self.per_row - 1, 0, -1):
            torch.addcmul(grad_before[:, :, c], grad_added[:, :, c], decays[:, :, c], out=grad_added[:, :, c - 1])
        grad_decays = (grad_added * states).sum((3, 5), keepdim=True) * decays
        return grad_added, grad_decays.permute(1, 2, 0, 3, 4, 5).reshape(-1, self.sizes.heads)
