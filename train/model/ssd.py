"""The Mamba-2 core: causal convolution, chunked scan and gate; and the single-step form for generation. Training uses C if
possible (`scan.c`), else plain torch (`train.model.chunked`, `.convolution`), which is the definition.

Mamba-2 (arXiv 2405.21060) keeps a state per head and updates it at every token t:

    dt_t = softplus(dt_t + dt_bias)      state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t^T      y_t = C_t state_t + D x_t

Run in chunks of Q tokens this becomes matrix products (section 6 of the paper). With s the running sum of dt A inside a
chunk, the outputs of a chunk are

    y = tril(C B^T  exp(s_i - s_j)) (dt x)  +  exp(s) C state_before  +  D x        state_after = exp(s_Q) state_before
                                                                                      + (B exp(s_Q - s))^T (dt x)

`mamba_core` is one autograd function with a hand-written gradient, for speed on a CPU: the backward pass computes the
Q x Q matrices again instead of storing them. Let a_k = dt_k A, so that s is the running sum of a. The gradient of a_k sums
every path that crosses token k: pairs i >= k > j within the chunk, the state before the chunk seen by tokens i >= k, and
tokens j < k in the state after the chunk. (The shorter formula, <dy_i, y_i> - <dt x_i, d(dt x)_i> summed over i >= k,
relies on cancellation of the pairs on one side of k, and loses three of fp32's seven digits: measured, docs/log.md.)

s is stored as a sum of two floats and restarts at zero at each document (in C and in torch). With one float, differences of
sums near -1000 have errors of 6e-5: with strong and mixed decays (dt 10 and 0.001, A 16) outputs had errors of 2e-4.

Shape letters: L sequence, B rows, D = [z | x | B | C | dt] channels of the in-projection, C convolution channels (x, B, C),
W taps, H heads, P channels of a head, G groups of heads sharing B and C, N state size; Q tokens of a chunk, K chunks of
all rows (K = B * ceil(L / Q)). Arithmetic is fp32 (float64 for float64 inputs) for every storage dtype.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from train.model.chunked import Chunked
from train.model.context import MambaPool, Segments
from train.model.convolution import convolve, convolve_backward
from train.model.documents import document_starts
from train.native import scan as compiled
from train.native.scan import ScanSizes, ScanWeights

StatePair = tuple[torch.Tensor, torch.Tensor]
"""(last W-1 convolution inputs [B, W-1, C], scan state [B, H, N, P]), at least fp32: constant size for texts of any length."""


def mamba_core(
    zxbcdt_LBD: torch.Tensor,
    weights: ScanWeights,
    *,
    sizes: ScanSizes,
    document_BL: torch.Tensor | None = None,
    is_stepwise: bool = False,
) -> torch.Tensor:
    """y * silu(z) of the Mamba-2 recurrence over whole rows, [L, B, H*P] in the input's dtype.

    zxbcdt_LBD: output of the in-projection. document_BL: document index of each token, never decreasing; convolution and
    state restart where it changes. is_stepwise: run the recurrence token by token, where it is compiled: the bits of
    `mamba_core_segments`. Any L. Deterministic. Differentiable once in all tensors but the documents.
    """
    sizes = replace(sizes, chunk=min(sizes.chunk, zxbcdt_LBD.shape[0]))
    return _MambaCore.apply(zxbcdt_LBD, *weights, document_BL, sizes, is_stepwise)


@torch.no_grad()
def mamba_core_continue(
    zxbcdt_LBD: torch.Tensor,
    weights: ScanWeights,
    *,
    sizes: ScanSizes,
    state_pair: StatePair | None,
) -> tuple[torch.Tensor, StatePair]:
    """The same recurrence continued from `state_pair` (None: zeros). -> (y * silu(z) [L, B, H*P], new state)."""
    sizes = replace(sizes, chunk=min(sizes.chunk, zxbcdt_LBD.shape[0]))
    work = _work_dtype(zxbcdt_LBD)
    z, xbc, dt = _split(zxbcdt_LBD, sizes)
    taps = weights.conv_weight_CW.shape[1]
    rows = xbc.shape[1]
    if state_pair is None:
        past = torch.zeros(rows, taps - 1, sizes.conv_channels, dtype=work, device=z.device)
        before = torch.zeros(rows, sizes.heads, sizes.state, sizes.head_dim, dtype=work, device=z.device)
    else:
        past, before = state_pair
    window = torch.cat([past.transpose(0, 1), xbc])
    conv = convolve(window, weights.conv_weight_CW.to(work), weights.conv_bias_C.to(work), document_BL=None)[
        :, taps - 1 :
    ]
    conv = F.silu(conv)
    A = -torch.exp(weights.A_log_H.to(work))
    dt = F.softplus(dt.to(work) + weights.dt_bias_H.to(work))
    if zxbcdt_LBD.shape[0] == 1:
        y, after = _single_step(conv[:, 0], dt[0], A, weights.D_H.to(work), before, sizes)
        y_LBI = y.unsqueeze(0)
    else:
        scan = Chunked(conv, dt, A, sizes, document_BL=None)
        by_group = before.unflatten(1, (sizes.groups, -1)).transpose(2, 3)  # [B, G, N, H/G, P]
        y_KQI, _, after = scan.forward(weights.D_H.to(work), before=by_group)
        after = after.transpose(2, 3).flatten(1, 2)
        y_LBI = scan.unchunk(y_KQI).transpose(0, 1)
    out = (y_LBI * F.silu(z.to(work))).to(zxbcdt_LBD.dtype)
    return out, (window[window.shape[0] - (taps - 1) :].transpose(0, 1), after)


@torch.no_grad()
def mamba_core_segments(
    zxbcdt_TD: torch.Tensor,
    weights: ScanWeights,
    *,
    sizes: ScanSizes,
    segments: Segments,
    pool: MambaPool,
) -> torch.Tensor:
    """The same recurrence for the texts of a step of inference, each continued from its slot of `pool`, which is updated.

    -> y * silu(z), [T, H*P]. A text that begins (`before` is 0) starts from zeros, whatever is in its slot. A trial leaves its
    slot as it is and stores `zxbcdt` of its tokens in `pool.inputs`; the same call with the accepted ones updates the slot.
    """
    if segments.trial_T is not None:
        pool.inputs[: len(segments.trial_T)] = zxbcdt_TD[segments.trial_T]
    if compiled.scan_usable(zxbcdt_TD, sizes):
        out = compiled.scan_segments(
            zxbcdt_TD.float().contiguous(),
            segments.table,
            weights=ScanWeights(*(weight.float() for weight in weights)),
            conv_pool=pool.conv,
            scan_pool=pool.scan,
            sizes=sizes,
            trial_S=segments.trial_S,
            is_stepwise=segments.is_stepwise,
        )
        return out.to(zxbcdt_TD.dtype)
    outputs = []
    alone = segments.segments[segments.singles :]
    together = [segments.segments[: segments.singles]] * (segments.singles > 0)
    for texts in [*together, *([segment] for segment in alone)]:
        slots = torch.tensor([text.slot for text in texts], device=zxbcdt_TD.device)
        is_new = torch.tensor([text.before == 0 for text in texts], device=zxbcdt_TD.device)
        begin, tokens = texts[0].begin, texts[0].tokens
        rows = zxbcdt_TD[begin : begin + tokens * len(texts)].view(len(texts), tokens, -1).transpose(0, 1)
        old = (
            pool.conv[slots].masked_fill_(is_new[:, None, None], 0),
            pool.scan[slots].masked_fill_(is_new[:, None, None, None], 0),
        )
        y, new = mamba_core_continue(rows, weights, sizes=sizes, state_pair=old)
        if not texts[0].is_trial:
            pool.conv[slots], pool.scan[slots] = new
        outputs.append(y.transpose(0, 1).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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
        is_stepwise: bool,
    ) -> torch.Tensor:
        work = _work_dtype(zxbcdt)
        if compiled.scan_usable(zxbcdt, sizes):
            weights = ScanWeights(conv_weight, conv_bias, dt_bias, A_log, D)
            return _forward_compiled(ctx, zxbcdt, weights, document_BL, sizes, is_stepwise=is_stepwise)
        z, xbc, dt_raw = _split(zxbcdt, sizes)
        pre = convolve(xbc, conv_weight.to(work), conv_bias.to(work), document_BL=document_BL)
        dt = F.softplus(dt_raw.to(work) + dt_bias.to(work))
        scan = Chunked(F.silu(pre), dt, -torch.exp(A_log.to(work)), sizes, document_BL=document_BL)
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
        scan = Chunked(F.silu(pre), F.softplus(dt_shifted), A, sizes, document_BL=document_BL)
        grads = scan.backward(grad_y_BLI, states, D.to(work))
        torch.mul(grads.dt.transpose(0, 1), torch.sigmoid(dt_shifted), out=grad_dt)

        # Convolution
        grad_conv_weight, grad_conv_bias = convolve_backward(
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
            None,
        )


def _forward_compiled(
    ctx: Any,
    zxbcdt: torch.Tensor,
    weights: ScanWeights,
    document_BL: torch.Tensor | None,
    sizes: ScanSizes,
    *,
    is_stepwise: bool,
) -> torch.Tensor:
    """The forward pass in `scan.c`."""
    wide = zxbcdt.float().contiguous()
    first_BL = None if document_BL is None else document_starts(document_BL)
    if is_stepwise:
        fp32 = ScanWeights(*(weight.float().contiguous() for weight in weights))
        out, pre, y, states = compiled.scan_steps(wide, fp32, first_BL=first_BL, sizes=sizes)
    else:
        out, pre, y, states = compiled.scan_forward(
            wide,
            conv_weight_CW=weights.conv_weight_CW.float(),
            conv_bias_C=weights.conv_bias_C.float(),
            dt_BLH=F.softplus(_split(wide, sizes)[2] + weights.dt_bias_H.float()).transpose(0, 1).contiguous(),
            A_H=-torch.exp(weights.A_log_H.float()),
            D_H=weights.D_H.float(),
            first_BL=first_BL,
            sizes=sizes,
        )
    ctx.save_for_backward(zxbcdt, *weights, document_BL, pre, y, states)
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
        None,
    )


def _single_step(
    xbc_BC: torch.Tensor,
    dt_BH: torch.Tensor,
    A_H: torch.Tensor,
    D_H: torch.Tensor,
    state_BHNP: torch.Tensor,
    sizes: ScanSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the recurrence. -> (y [B, H*P], new state); `state_BHNP` is not modified."""
    g, n, h, p = sizes.groups, sizes.state, sizes.heads, sizes.head_dim
    x = xbc_BC[:, : sizes.inner].view(-1, h, 1, p)
    B, C = (
        part.view(-1, g, n, 1).repeat_interleave(sizes.heads_per_group, dim=1)
        for part in xbc_BC[:, sizes.inner :].chunk(2, dim=-1)
    )
    dt = dt_BH.view(-1, h, 1, 1)
    after = state_BHNP * torch.exp(dt * A_H.view(h, 1, 1)) + B * (dt * x)
    y = (C * after).sum(2, keepdim=True) + D_H.view(h, 1, 1) * x
    return y.reshape(-1, sizes.inner), after


def _split(zxbcdt: torch.Tensor, sizes: ScanSizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the gate z, the convolution's channels and dt."""
    z, xbc, dt = zxbcdt.split([sizes.inner, sizes.conv_channels, sizes.heads], dim=-1)
    return z, xbc, dt


def _work_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
