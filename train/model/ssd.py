"""The Mamba-2 core in plain torch: causal convolution, chunked scan, gate; and its single-step form for generation.

Mamba-2 (arXiv 2405.21060) keeps a state per head and updates it at every token t:

    dt_t = softplus(dt_t + dt_bias)      state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t^T      y_t = C_t state_t + D x_t

Run in chunks of Q tokens this becomes matrix products (section 6 of the paper). With s the running sum of dt A inside a
chunk, the outputs of a chunk are

    y = tril(C B^T  exp(s_i - s_j)) (dt x)  +  exp(s) C state_before  +  D x        state_after = exp(s_Q) state_before
                                                                                      + (B exp(s_Q - s))^T (dt x)

`mamba_core` is one autograd function with the gradient written out, because that is where the time goes on a CPU: the
Q x Q matrices are rebuilt in the backward pass instead of kept. The gradient of a_k = dt_k A, of which s is the running
sum, adds up what passes over token k: pairs i >= k > j within the chunk, what enters from before the chunk to i >= k,
what leaves from j < k at its end. (The shorter way, <dy_i, y_i> - <dt x_i, d(dt x)_i> summed over i >= k, lets pairs on
one side of k cancel instead of leaving them out, and costs three of fp32's seven digits: measured, docs/log.md.)

Shape letters: L sequence, B rows, D = [z | x | B | C | dt] channels of the in-projection, C convolution channels (x, B, C),
W taps, H heads, P channels of a head, G groups of heads sharing B and C, N state size; Q tokens of a chunk, K chunks of
all rows (K = B * ceil(L / Q)). Arithmetic is fp32 (float64 for float64 inputs) whatever the storage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from train.model import compiled
from train.model.documents import document_starts

StatePair = tuple[torch.Tensor, torch.Tensor]
"""(last W-1 convolution inputs [W-1, B, C], scan state [B, G, N, H/G, P] fp32): constant size whatever was read."""


@dataclass(frozen=True)
class ScanSizes:
    """Sizes of the scan on this rank."""

    heads: int
    head_dim: int
    state: int
    groups: int
    chunk: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups


def mamba_core(
    zxbcdt_LBD: torch.Tensor,
    *,
    conv_weight_CW: torch.Tensor,
    conv_bias_C: torch.Tensor,
    dt_bias_H: torch.Tensor,
    A_log_H: torch.Tensor,
    D_H: torch.Tensor,
    heads: int,
    head_dim: int,
    state: int,
    groups: int,
    chunk: int,
    document_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """y * silu(z) of the Mamba-2 recurrence over whole rows, [L, B, H*P] in the input's dtype.

    zxbcdt_LBD: output of the in-projection. document_BL: increasing document index of each token; convolution and state
    start anew where it changes. Any L. Deterministic. Differentiable once in all tensors but the documents.
    """
    sizes = ScanSizes(heads=heads, head_dim=head_dim, state=state, groups=groups, chunk=min(chunk, zxbcdt_LBD.shape[0]))
    return _MambaCore.apply(zxbcdt_LBD, conv_weight_CW, conv_bias_C, dt_bias_H, A_log_H, D_H, document_BL, sizes)


@torch.no_grad()
def mamba_core_continue(
    zxbcdt_LBD: torch.Tensor,
    *,
    conv_weight_CW: torch.Tensor,
    conv_bias_C: torch.Tensor,
    dt_bias_H: torch.Tensor,
    A_log_H: torch.Tensor,
    D_H: torch.Tensor,
    heads: int,
    head_dim: int,
    state: int,
    groups: int,
    chunk: int,
    state_pair: StatePair | None,
) -> tuple[torch.Tensor, StatePair]:
    """The same recurrence continued from `state_pair` (None: from nothing). -> (y * silu(z) [L, B, H*P], new state)."""
    sizes = ScanSizes(heads=heads, head_dim=head_dim, state=state, groups=groups, chunk=min(chunk, zxbcdt_LBD.shape[0]))
    work = _work_dtype(zxbcdt_LBD)
    z, xbc, dt = _split(zxbcdt_LBD, sizes)
    taps = conv_weight_CW.shape[1]
    rows = xbc.shape[1]
    if state_pair is None:
        past = xbc.new_zeros(taps - 1, rows, sizes.conv_channels)
        before = torch.zeros(rows, groups, state, sizes.heads_per_group, head_dim, dtype=work, device=z.device)
    else:
        past, before = state_pair
    window = torch.cat([past, xbc])
    conv = _conv(window, conv_weight_CW.to(work), conv_bias_C.to(work), document_BL=None)[:, taps - 1 :]
    conv = F.silu(conv)
    A = -torch.exp(A_log_H.to(work))
    dt = F.softplus(dt.to(work) + dt_bias_H.to(work))
    if zxbcdt_LBD.shape[0] == 1:
        y, after = _single_step(conv[:, 0], dt[0], A, D_H.to(work), before, sizes)
        y_LBI = y.unsqueeze(0)
    else:
        scan = _Chunked(conv, dt, A, sizes, document_BL=None)
        y_KQI, _, after = scan.forward(D_H.to(work), before=before)
        y_LBI = scan.unchunk(y_KQI).transpose(0, 1)
    out = (y_LBI * F.silu(z.to(work))).to(zxbcdt_LBD.dtype)
    return out, (window[window.shape[0] - (taps - 1) :].clone(), after)


def group_rms_norm(y: torch.Tensor, weight: torch.Tensor, *, groups: int, eps: float) -> torch.Tensor:
    """RMSNorm over each of `groups` equal parts of the last dim, times weight. y: [..., channels] -> the same."""
    if groups == 1:
        return F.rms_norm(y, weight.shape, weight, eps)
    parts = y.unflatten(-1, (groups, y.shape[-1] // groups))
    return F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight


class _MambaCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: torch.Tensor,
        conv_weight: torch.Tensor,
        conv_bias: torch.Tensor,
        dt_bias: torch.Tensor,
        A_log: torch.Tensor,
        D: torch.Tensor,
        document_BL: torch.Tensor | None,
        sizes: ScanSizes,
    ) -> torch.Tensor:
        work = _work_dtype(zxbcdt)
        if compiled.scan_usable(zxbcdt, sizes):
            return _forward_compiled(ctx, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, document_BL, sizes)
        z, xbc, dt_raw = _split(zxbcdt, sizes)
        pre = _conv(xbc, conv_weight.to(work), conv_bias.to(work), document_BL=document_BL)
        dt = F.softplus(dt_raw.to(work) + dt_bias.to(work))
        scan = _Chunked(F.silu(pre), dt, -torch.exp(A_log.to(work)), sizes, document_BL=document_BL)
        y_KQI, states, _ = scan.forward(D.to(work), before=None)
        y_BLI = scan.unchunk(y_KQI)
        out = torch.empty(*zxbcdt.shape[:2], sizes.inner, dtype=work, device=zxbcdt.device)
        torch.mul(y_BLI.transpose(0, 1), F.silu(z.to(work)), out=out)
        ctx.save_for_backward(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, document_BL, pre, y_BLI, states)
        ctx.sizes, ctx.is_compiled = sizes, False
        return out.to(zxbcdt.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if ctx.is_compiled:
            return _backward_compiled(ctx, grad_out)
        zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, document_BL, pre, y_BLI, states = ctx.saved_tensors
        sizes: ScanSizes = ctx.sizes
        work = _work_dtype(zxbcdt)
        z, xbc, dt_raw = _split(zxbcdt, sizes)
        grad_zxbcdt = torch.empty(zxbcdt.shape, dtype=work, device=zxbcdt.device)
        grad_z, grad_xbc, grad_dt = _split(grad_zxbcdt, sizes)

        # Gate: out = y silu(z)
        grad_out, z = grad_out.to(work), z.to(work)
        grad_y_BLI = torch.empty_like(y_BLI)
        torch.mul(grad_out, F.silu(z), out=grad_y_BLI.transpose(0, 1))
        grad_z.copy_(torch.ops.aten.silu_backward(grad_out * y_BLI.transpose(0, 1), z))

        # Scan
        dt_shifted = dt_raw.to(work) + dt_bias.to(work)
        A = -torch.exp(A_log.to(work))
        scan = _Chunked(F.silu(pre), F.softplus(dt_shifted), A, sizes, document_BL=document_BL)
        grads = scan.backward(grad_y_BLI, states, D.to(work))
        torch.mul(grads.dt.transpose(0, 1), torch.sigmoid(dt_shifted), out=grad_dt)

        # Convolution
        grad_conv_weight, grad_conv_bias = _conv_backward(
            torch.ops.aten.silu_backward(grads.xbc, pre),
            xbc,
            conv_weight.to(work),
            document_BL=document_BL,
            grad_input=grad_xbc,
        )
        return (
            grad_zxbcdt.to(zxbcdt.dtype),
            grad_conv_weight.to(conv_weight.dtype),
            grad_conv_bias.to(conv_bias.dtype),
            grad_dt.sum((0, 1)).to(dt_bias.dtype),
            (grads.A * A).to(A_log.dtype),
            grads.D.to(D.dtype),
            None,
            None,
        )


def _forward_compiled(
    ctx: Any,
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    document_BL: torch.Tensor | None,
    sizes: ScanSizes,
) -> torch.Tensor:
    """The forward pass in `scan.c`."""
    wide = zxbcdt.float().contiguous()
    _, _, dt_raw = _split(wide, sizes)
    out, pre, y, states = compiled.scan_forward(
        wide,
        conv_weight_CW=conv_weight.float(),
        conv_bias_C=conv_bias.float(),
        dt_BLH=F.softplus(dt_raw + dt_bias.float()).transpose(0, 1).contiguous(),
        A_H=-torch.exp(A_log.float()),
        D_H=D.float(),
        first_BL=None if document_BL is None else document_starts(document_BL),
        sizes=sizes,
    )
    ctx.save_for_backward(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, document_BL, pre, y, states)
    ctx.sizes, ctx.is_compiled = sizes, True
    return out.to(zxbcdt.dtype)


def _backward_compiled(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The backward pass in `scan.c`."""
    zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, document_BL, pre, y, states = ctx.saved_tensors
    sizes: ScanSizes = ctx.sizes
    wide = zxbcdt.float().contiguous()
    grad_zxbcdt = torch.empty_like(wide)
    dt_shifted = _split(wide, sizes)[2] + dt_bias.float()
    A = -torch.exp(A_log.float())
    grad_weight, grad_bias, grad_dt, grad_A, grad_D = compiled.scan_backward(
        grad_out.float().contiguous(),
        wide,
        conv_weight_CW=conv_weight.float(),
        dt_BLH=F.softplus(dt_shifted).transpose(0, 1).contiguous(),
        A_H=A,
        D_H=D.float(),
        first_BL=None if document_BL is None else document_starts(document_BL),
        pre=pre,
        y=y,
        states=states,
        grad_zxbcdt=grad_zxbcdt,
        sizes=sizes,
    )
    grad_raw = grad_dt.transpose(0, 1) * torch.sigmoid(dt_shifted)
    _split(grad_zxbcdt, sizes)[2].copy_(grad_raw)
    return (
        grad_zxbcdt.to(zxbcdt.dtype),
        grad_weight.to(conv_weight.dtype),
        grad_bias.to(conv_bias.dtype),
        grad_raw.sum((0, 1)).to(dt_bias.dtype),
        (grad_A * A).to(A_log.dtype),
        grad_D.to(D.dtype),
        None,
        None,
    )


@dataclass(frozen=True)
class _ScanGrads:
    xbc: torch.Tensor
    """[B, L, C]"""
    dt: torch.Tensor
    """[B, L, H], of dt after softplus"""
    A: torch.Tensor
    D: torch.Tensor


class _Chunked:
    """One scan laid out in chunks: tensors [K, Q, ...], rows padded to whole chunks with dt = 0, which changes nothing.

    Heads are taken one by one and groups one by one: each then works on strided views of the token-major tensors, which
    batched products take without a copy, and on Q x Q matrices that stay in the cache. (All heads at once needs a
    transposed copy of every operand and streams the matrices through memory: 1.9 times slower, docs/log.md.)
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
        self.decay = torch.cumsum(self.dt * A_H, dim=1)  # s in the module text, [K, Q, H], never increasing
        self.total = self.decay[:, -1]  # [K, H]
        self.document = None if document_BL is None else self.chunked(document_BL, fill_last=True)

    def chunked(self, rows_BL: torch.Tensor, *, fill_last: bool = False) -> torch.Tensor:
        """[B, L, ...] -> [K, Q, ...]; a ragged end is filled with zeros, or with the last value."""
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
        """-> (y [K, Q, H*P], states before each chunk [G, B, chunks, N, H/G, P], state after the last [B, G, N, H/G, P])."""
        s = self.sizes
        gain = self.state_weights().mul_(self.dt)  # of x instead of dt x
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
                part = torch.bmm(self.decays(h).mul_(scores), x * self.dt[:, :, h, None])
                part.addcmul_(carried[:, :, index], carry[:, :, h, None])
                y[:, :, h] = part.addcmul_(x, D_H[h])
        return y.flatten(-2), states, after

    def backward(self, grad_y_BLI: torch.Tensor, states: torch.Tensor, D_H: torch.Tensor) -> _ScanGrads:
        """Gradients of `forward` (without `before`), given its output's and the states it returned."""
        s = self.sizes
        grad_y = self.chunked(grad_y_BLI).unflatten(-1, (s.heads, s.head_dim))
        carry, gain = self.carry_weights(), self.state_weights()
        grad_xbc = torch.empty_like(self.xbc)
        grad_a = torch.empty_like(self.dt)  # of dt A at each token
        through_x = torch.empty_like(self.dt)  # <x, d(dt x)>
        left = torch.empty_like(self.dt)  # what the state built in this chunk takes from each token
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
                dt = self.dt[:, :, h, None]
                # Inside the chunk: y = M (dt x) with M = decays * scores
                decays = self.decays(h)
                pairs = torch.bmm(grad, (x * dt).transpose(1, 2)).mul_(decays)
                grad_scores += pairs
                grad_a[:, :, h] += self.across(pairs.mul_(scores))
                grad_x_dt = torch.bmm(decays.mul_(scores).transpose(1, 2), grad)
                # Through the state built here: added = B^T (gain dt x)
                out_of_state = from_state[:, :, index] * gain[:, :, h, None]
                torch.sum(out_of_state * x, -1, out=left[:, :, h])
                grad_x_dt += out_of_state
                torch.sum(grad_x_dt * x, -1, out=through_x[:, :, h])
                grad_D[h] = torch.sum(grad * x)
                torch.addcmul(grad_x_dt.mul_(dt), grad, D_H[h], out=grad_xbc[..., self.channels(h)])
            grad_scores = self.causal_(grad_scores)
            grad_xbc[..., self.B_channels(g)] = grad_B.baddbmm_(grad_scores.transpose(1, 2), C)
            grad_xbc[..., self.C_channels(g)] = grad_C.baddbmm_(grad_scores, B)

        left.mul_(self.dt)
        grad_a[:, 1:] += left.cumsum(1)[:, :-1]
        grad_a += grad_total.unsqueeze(1)
        return _ScanGrads(
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
        """exp(s_i - s_j) for i >= j, [K, Q, Q]; above the diagonal 1, to be masked by the scores."""
        s_KQ = self.decay[:, :, h]
        return (s_KQ.unsqueeze(-1) - s_KQ.unsqueeze(-2)).clamp_(max=0).exp_()

    def scores(self, g: int) -> torch.Tensor:
        """tril(C B^T) within the chunk and the document, [K, Q, Q]."""
        return self.causal_(torch.bmm(self.C(g), self.B(g).transpose(1, 2)))

    def causal_(self, square: torch.Tensor) -> torch.Tensor:
        """Zero what looks ahead or into another document, in place. [K, Q, Q]."""
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
        """exp(s_Q - s_j): how much of token j is left in the state at the end of its chunk, [K, Q, H]."""
        weights = torch.exp(self.total.unsqueeze(1) - self.decay)
        if self.document is not None:
            weights *= (self.document == self.document[:, -1:]).unsqueeze(-1)
        return weights

    def carry_weights(self) -> torch.Tensor:
        """exp(s_i): how much of the state before the chunk token i still sees, [K, Q, H]."""
        weights = torch.exp(self.decay)
        if self.document is not None:
            weights *= (self.document == self.document_before().unsqueeze(-1)).unsqueeze(-1)
        return weights

    def document_before(self) -> torch.Tensor:
        """Document of the token before each chunk, [K]; a row's first chunk has none (its own first is as good)."""
        assert self.document is not None
        last = self.document[:, -1].view(self.rows, self.per_row)
        first = self.document[:, 0].view(self.rows, self.per_row)
        return torch.cat([first[:, :1], last[:, :-1]], dim=1).flatten()

    def chunk_decays(self) -> torch.Tensor:
        """exp(s_Q): what is left after a chunk of the state before it, [G, B, chunks, 1, H/G, 1]."""
        s = self.sizes
        decays = torch.exp(self.total)
        if self.document is not None:
            decays = decays * (self.document[:, -1] == self.document_before()).unsqueeze(-1)
        by_group = decays.view(self.rows, self.per_row, s.groups, 1, s.heads_per_group, 1)
        return by_group.permute(2, 0, 1, 3, 4, 5)

    def pass_states(self, added: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the state over the chunks: added [G, K, N, H/G*P] -> (before each chunk [G, B, chunks, ...], after the last)."""
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
        """Gradients of `pass_states`: -> (of added, shaped as the states; of s_Q through the chunk decays [K, H])."""
        grad_before = grad_before.view(states.shape)
        decays = self.chunk_decays()
        grad_added = torch.empty_like(states)
        grad_added[:, :, -1] = 0
        for c in range(self.per_row - 1, 0, -1):
            torch.addcmul(grad_before[:, :, c], grad_added[:, :, c], decays[:, :, c], out=grad_added[:, :, c - 1])
        grad_decays = (grad_added * states).sum((3, 5), keepdim=True) * decays
        return grad_added, grad_decays.permute(1, 2, 0, 3, 4, 5).reshape(-1, self.sizes.heads)


def _single_step(
    xbc_BC: torch.Tensor,
    dt_BH: torch.Tensor,
    A_H: torch.Tensor,
    D_H: torch.Tensor,
    state: torch.Tensor,
    sizes: ScanSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the recurrence. -> (y [B, H*P], new state); the state given is left alone."""
    g, n, hg = sizes.groups, sizes.state, sizes.heads_per_group
    x = xbc_BC[:, : sizes.inner].view(-1, g, 1, hg, sizes.head_dim)
    B = xbc_BC[:, sizes.inner : sizes.inner + g * n].view(-1, g, n, 1, 1)
    C = xbc_BC[:, sizes.inner + g * n :].view(-1, g, n, 1, 1)
    dt = dt_BH.view(-1, g, 1, hg, 1)
    after = state * torch.exp(dt * A_H.view(g, 1, hg, 1)) + B * (dt * x)
    y = (C * after).sum(2, keepdim=True) + D_H.view(g, 1, hg, 1) * x
    return y.reshape(-1, sizes.inner), after


def _split(zxbcdt: torch.Tensor, sizes: ScanSizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the gate z, the convolution's channels and dt."""
    z, xbc, dt = zxbcdt.split([sizes.inner, sizes.conv_channels, sizes.heads], dim=-1)
    return z, xbc, dt


def _work_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _same_document(document_BL: torch.Tensor, shift: int) -> torch.Tensor:
    """Whether a token and the one `shift` before it share a document, [L - shift, B, 1]."""
    return (document_BL[:, shift:] == document_BL[:, :-shift]).t().unsqueeze(-1)


def _conv(
    x_LBC: torch.Tensor, weight_CW: torch.Tensor, bias_C: torch.Tensor, *, document_BL: torch.Tensor | None
) -> torch.Tensor:
    """Causal depthwise convolution without its activation, [B, L, C]."""
    work = weight_CW.dtype
    length, rows, channels = x_LBC.shape
    x_LBC = x_LBC.to(work)
    taps = weight_CW.shape[1]
    if document_BL is None:
        return _correlate(x_LBC, weight_CW, bias_C)[:, :length]
    out = torch.empty(rows, length, channels, dtype=work, device=x_LBC.device)
    out_LBC = out.transpose(0, 1)
    torch.mul(x_LBC, weight_CW[:, -1], out=out_LBC)
    out_LBC.add_(bias_C)
    for shift in range(1, min(taps, length)):  # one shifted multiply-add per tap, cut where documents end
        earlier = x_LBC[:-shift] * _same_document(document_BL, shift)
        out_LBC[shift:].addcmul_(earlier, weight_CW[:, -1 - shift])
    return out


def _correlate(x_LBC: torch.Tensor, weight_CW: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """bias + sum over taps k of weight[k] x[l - (W-1) + k] for l = 0 ... L + W - 2, zeros outside, [B, L + W - 1, C].

    The rows are seen as channels-last images of width one, which the depthwise kernels of oneDNN and cuDNN take.
    """
    length, rows, channels = x_LBC.shape
    taps = weight_CW.shape[1]
    # Strides are spelled out: those of a width of one are ambiguous, and read the other way the kernel is 10 times slower.
    image = (
        x_LBC.transpose(0, 1)
        .contiguous()
        .as_strided((rows, channels, length, 1), (length * channels, 1, channels, channels))
    )
    out = F.conv2d(image, weight_CW.reshape(channels, 1, taps, 1), bias_C, padding=(taps - 1, 0), groups=channels)
    return out.squeeze(-1).transpose(1, 2)


def _conv_backward(
    grad_BLC: torch.Tensor,
    x_LBC: torch.Tensor,
    weight_CW: torch.Tensor,
    *,
    document_BL: torch.Tensor | None,
    grad_input: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `_conv`: writes the input's into `grad_input` [L, B, C], -> (of the weight, of the bias)."""
    grad = grad_BLC.transpose(0, 1)
    x_LBC = x_LBC.to(weight_CW.dtype)
    taps = weight_CW.shape[1]
    if document_BL is None:
        grad_input.copy_(
            _correlate(grad, weight_CW.flip(1), torch.zeros_like(weight_CW[:, 0]))[:, taps - 1 :].transpose(0, 1)
        )
    else:
        torch.mul(grad, weight_CW[:, -1], out=grad_input)
    grad_weight = torch.zeros_like(weight_CW)
    grad_weight[:, -1] = (x_LBC * grad).sum((0, 1))
    for shift in range(1, min(taps, x_LBC.shape[0])):
        later = grad[shift:]
        if document_BL is not None:
            later = later * _same_document(document_BL, shift)
            grad_input[:-shift].addcmul_(later, weight_CW[:, -1 - shift])
        grad_weight[:, -1 - shift] = (x_LBC[:-shift] * later).sum((0, 1))
    return grad_weight, grad.sum((0, 1))
