"""Rotary positions against transformers' Llama, with every scaling."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from train.model.rotary import Rotary, angles_per_token, score_factor

BASE = replace(TINY, position="rope", head_dim=64, rope_base=500_000.0, rope_original_tokens=4096)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("factor", [2.0, 32.0])
def test_scaled_angles_equal_transformers(kind: str, factor: float) -> None:
    model = replace(BASE, rope_scaling=kind, rope_factor=factor)
    parameters = {"rope_type": kind, "rope_theta": model.rope_base, "factor": factor}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = model.rope_original_tokens
    config = LlamaConfig(
        head_dim=64, hidden_size=256, num_attention_heads=4, rope_parameters=parameters,
        max_position_embeddings=int(factor) * 4096,
    )  # fmt: skip
    expected, of_both = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    torch.testing.assert_close(angles_per_token(model), expected, rtol=1e-6, atol=0)
    assert score_factor(model) == pytest.approx(of_both**2, rel=1e-6)  # they multiply queries and keys with it


def test_turning_equals_transformers_and_its_gradient_turns_back() -> None:
    x = torch.randn(30, 2, 3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    positions = torch.cat([torch.arange(5, 20), torch.arange(40, 55)])
    got = Rotary(BASE)(x, positions, length=60)
    config = LlamaConfig(
        head_dim=64, hidden_size=256, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": BASE.rope_base},
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    theirs = apply_rotary_pos_emb(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), cos, sin)[0].permute(2, 0, 1, 3)
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(got, x, weights)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, x, weights)[0], rtol=1e-5, atol=1e-5)
