"""The causal depthwise convolution of Mamba-2 in plain torch, which does not cross document boundaries, and its gradients.

Shape letters: L sequence, B rows, C channels, W taps.
"""

import torch
from torch.nn import functional as F


def _same_document(document_BL: torch.Tensor, shift: int) -> torch.Tensor:
    """Whether a token and the token `shift` earlier belong to the same document, [L - shift, B, 1]."""
    return (document_BL[:, shift:] == document_BL[:, :-shift]).t().unsqueeze(-1)


def convolve(
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
    for shift in range(1, min(taps, length)):  # one shifted multiply-add per tap
        earlier = x_LBC[:-shift] * _same_document(document_BL, shift)
        out_LBC[shift:].addcmul_(earlier, weight_CW[:, -1 - shift])
    return out


def _correlate(x_LBC: torch.Tensor, weight_CW: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """bias + sum over taps k of weight[k] x[l - (W-1) + k] for l = 0 ... L + W - 2, zeros outside, [B, L + W - 1, C].

    The rows are viewed as channels-last images of width one, for which oneDNN and cuDNN have depthwise kernels.
    """
    length, rows, channels = x_LBC.shape
    taps = weight_CW.shape[1]
    # Explicit strides: at width one the layout is ambiguous, and torch may pick a kernel that is 10 times slower.
    image = (
        x_LBC.transpose(0, 1)
        .contiguous()
        .as_strided((rows, channels, length, 1), (length * channels, 1, channels, channels))
    )
    out = F.conv2d(image, weight_CW.reshape(channels, 1, taps, 1), bias_C, padding=(taps - 1, 0), groups=channels)
    return out.squeeze(-1).transpose(1, 2)


def convolve_backward(
    grad_BLC: torch.Tensor,
    x_LBC: torch.Tensor,
    weight_CW: torch.Tensor,
    *,
    document_BL: torch.Tensor | None,
    grad_input: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `convolve`. Writes the input's into `grad_input` [L, B, C]. -> (gradient of weight, of bias)."""
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
