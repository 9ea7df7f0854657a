"""Our hybrid against transformers' Nemotron-H, an independent implementation: logits, loss and every gradient in fp32.

transformers clamps dt from below at `time_step_min`; the model as published does not need it, so its clamp is opened.
"""

import pytest
import torch
from ranks import run_ranks
from tiny import ROW_TOKENS, engine_of, recipe_with, rows_of
from torch.nn import functional as F
from transformers import NemotronHConfig, NemotronHForCausalLM

from train.config import ModelConfig


def oracle_of(model: ModelConfig) -> NemotronHForCausalLM:
    """transformers' model of the same shape, with random weights."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        hybrid_override_pattern=model.pattern,
        num_hidden_layers=len(model.pattern),
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        mamba_num_heads=model.mamba_heads,
        mamba_head_dim=model.mamba_head_dim,
        ssm_state_size=model.mamba_state,
        n_groups=model.mamba_groups,
        conv_kernel=model.mamba_conv,
        chunk_size=model.mamba_chunk,
        tie_word_embeddings=False,
    )
    oracle = NemotronHForCausalLM(config).float()
    for module in oracle.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("norm.weight") or name.endswith("norm_f.weight") or name.endswith(".D"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return oracle


def our_parts(name: str, oracle: dict[str, torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The oracle's tensor that one of our parameters corresponds to."""
    if name == "embedding.word_embeddings.weight":
        return oracle["model.embeddings.weight"]
    if name == "output_layer.weight":
        return oracle["lm_head.weight"]
    if name == "decoder.final_norm.weight":
        return oracle["model.norm_f.weight"]
    _, _, index, *rest = name.split(".")
    layer, tail = f"model.layers.{index}.", ".".join(rest)
    if tail in ("norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight"):
        return oracle[layer + "norm.weight"]
    if tail == "self_attention.linear_qkv.weight":  # Megatron: per key/value group its queries, its key, its value
        q, k, v = (oracle[f"{layer}mixer.{x}_proj.weight"].unflatten(0, (-1, model.head_dim)) for x in "qkv")
        per_group = model.heads // model.kv_heads
        groups = [
            torch.cat([q[g * per_group : (g + 1) * per_group], k[g : g + 1], v[g : g + 1]]) for g in range(len(k))
        ]
        return torch.cat(groups).flatten(0, 1)
    same = {
        "self_attention.linear_proj.weight": "mixer.o_proj.weight",
        "mlp.linear_fc1.weight": "mixer.up_proj.weight",
        "mlp.linear_fc2.weight": "mixer.down_proj.weight",
        "mixer.conv1d_weight": "mixer.conv1d.weight",
        "mixer.conv1d_bias": "mixer.conv1d.bias",
    }
    return oracle[layer + same.get(tail, tail)]


def compare(rank: int, changes: dict[str, object]) -> dict[str, float]:
    """Relative differences: of the logits, the loss, and the worst gradient, by name."""
    recipe = recipe_with(**changes)
    oracle = oracle_of(recipe.model)
    weights = dict(oracle.named_parameters())
    rows = rows_of(0, torch.arange(2).numpy())
    logits = oracle(rows.tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in weights.items()}
    found = {}
    with engine_of(recipe, rank=rank, world=1) as engine:
        ours = engine.chunks[0].module
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(our_parts(name, weights, recipe.model))
        positions = torch.arange(ROW_TOKENS).expand_as(rows.tokens)
        with torch.no_grad():
            got = ours(rows.tokens, positions, None)
        found["logits"] = float((got - logits).abs().max() / logits.abs().max())
        engine.chunks[0].zero_grad_buffer()
        mean = ours(rows.tokens, positions, None, labels=rows.labels).mean()
        mean.backward()
        found["loss"] = abs(float(mean) / float(loss) - 1)
        for name, parameter in ours.named_parameters():
            expected = our_parts(name, gradients, recipe.model)
            found[f"gradient of {name}"] = float((parameter.main_grad - expected).abs().max() / expected.abs().max())
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.pattern": "MM-*M*", "model.mamba_groups": 1, "model.kv_heads": 1, "model.hidden": 48},
        {"model.pattern": "M*-", "model.mamba_groups": 4, "model.kv_heads": 4, "model.mamba_chunk": 24},
    ],
)
def test_logits_loss_and_gradients_equal_transformers(changes: dict[str, object]) -> None:
    found = run_ranks(1, compare, changes)[0]
    assert found.pop("logits") < 2e-5
    assert found.pop("loss") < 1e-6
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-4, f"{worst}: {found[worst]:.1e}"
    assert len(found) > 10
