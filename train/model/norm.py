"""RMSNorm as Megatron's specs want it: built from (config, hidden_size, eps), usable under sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim (arXiv 1910.07467), or times 1 + weight where the config centres weights at
    zero (Megatron's `layernorm_zero_centered_gamma`; Gemma).

    Under sequence parallelism each tensor rank sees a part of the sequence, so the weight's gradient is a partial sum;
    the `sequence_parallel` mark tells Megatron to add it up over the tensor group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        fill = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(fill(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden] -> the same shape and dtype; 1 + weight and the product with it are fp32."""
        if not self.zero_centered:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)
