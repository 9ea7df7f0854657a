"""transformers' models of the same shapes as ours, and which of their tensors each of our parameters stands for.

Independent of `train.hf`: written from transformers' and Megatron's layouts, so that tests of the model need no converter.
transformers' Nemotron-H clamps dt from below at `time_step_min`; the model as published does not need it, so its clamp is
opened.
"""

import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, NemotronHConfig, NemotronHForCausalLM

from recipes.schema.model import ModelConfig


def peer_of(model: ModelConfig, *, attention: str = "eager") -> nn.Module:
    """transformers' model of the same shape, with random weights, norms and D away from their start values."""
    torch.manual_seed(0)
    peer = _gemma2(model, attention) if model.post_norms else _nemotron_h(model)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                centre = 0 if model.norm_offset and "mixer.norm" not in name else 1
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return peer


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
    }


def _nemotron_h(model: ModelConfig) -> nn.Module:
    experts = model.experts
    config = NemotronHConfig(
        hybrid_override_pattern=model.pattern,
        num_hidden_layers=len(model.pattern),
        **_sizes(model),
        mamba_num_heads=model.mamba_heads,
        mamba_head_dim=model.mamba_head_dim,
        ssm_state_size=model.mamba_state,
        n_groups=model.mamba_groups,
        conv_kernel=model.mamba_conv,
        chunk_size=model.mamba_chunk,
        tie_word_embeddings=False,
        n_routed_experts=experts.count,
        num_experts_per_tok=experts.top_k,
        moe_intermediate_size=experts.ffn,
        moe_shared_expert_intermediate_size=experts.shared_ffn,
        moe_latent_size=experts.latent or None,
        routed_scaling_factor=experts.scaling,
        n_group=experts.groups,
        topk_group=experts.top_groups,
    )
    peer = NemotronHForCausalLM(config).float()
    for module in peer.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return peer


def _gemma2(model: ModelConfig, attention: str) -> nn.Module:
    kinds = {"w": "sliding_attention", "*": "full_attention"}
    config = Gemma2Config(
        num_hidden_layers=len(model.pattern) // 2,
        layer_types=[kinds[kind] for kind in model.pattern[::2]],
        **_sizes(model),
        query_pre_attn_scalar=int(model.query_scale or model.head_dim),
        sliding_window=model.window_tokens,
        attn_logit_softcapping=model.attention_softcap,
        final_logit_softcapping=model.logit_softcap,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        use_cache=False,
        pad_token_id=None,  # else one row of the embedding is frozen at zero
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation=attention).float()


def their_part(name: str, theirs: dict[str, torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Their tensor (or gradient), in our layout, for one of our parameters. `theirs`: by their parameter names."""
    names = _gemma2_name if model.post_norms else _nemotron_h_name
    if name.startswith("decoder.layers."):
        _, _, index, *rest = name.split(".")
        tail = ".".join(rest)
        if tail == "self_attention.linear_qkv.weight":  # Megatron: per key/value group its queries, its key, its value
            q, k, v = (theirs[names(int(index), f"{x}_proj.weight")].unflatten(0, (-1, model.head_dim)) for x in "qkv")
            per_group = model.heads // model.kv_heads
            groups = [
                torch.cat([q[g * per_group : (g + 1) * per_group], k[g : g + 1], v[g : g + 1]]) for g in range(len(k))
            ]
            return torch.cat(groups).flatten(0, 1)
        if tail == "mlp.linear_fc1.weight" and model.activation in ("swiglu", "geglu"):  # Megatron: gate, then up
            return torch.cat([theirs[names(int(index), f"mlp.{x}_proj.weight")] for x in ("gate", "up")])
        return theirs[names(int(index), tail)]
    whole = {
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight", "model.embeddings.weight"),
        "output_layer.weight": ("lm_head.weight", "lm_head.weight"),
        "decoder.final_norm.weight": ("model.norm.weight", "model.norm_f.weight"),
    }
    return theirs[whole[name][0 if model.post_norms else 1]]


def _nemotron_h_name(index: int, tail: str) -> str:
    if tail in ("norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight"):
        return f"model.layers.{index}.norm.weight"
    same = {
        "self_attention.linear_proj.weight": "o_proj.weight",
        "mlp.linear_fc1.weight": "up_proj.weight",
        "mlp.linear_fc2.weight": "down_proj.weight",
        "mixer.conv1d_weight": "conv1d.weight",
        "mixer.conv1d_bias": "conv1d.bias",
        "mlp.router.weight": "gate.weight",
        "mlp.experts.linear_fc1.weight": "experts.up_proj",
        "mlp.experts.linear_fc2.weight": "experts.down_proj",
        "mlp.shared_experts.linear_fc1.weight": "shared_experts.up_proj.weight",
        "mlp.shared_experts.linear_fc2.weight": "shared_experts.down_proj.weight",
        "mlp.latent_in.weight": "fc1_latent_proj.weight",
        "mlp.latent_out.weight": "fc2_latent_proj.weight",
    }
    return f"model.layers.{index}.mixer.{same.get(tail, tail.removeprefix('mixer.'))}"


def _gemma2_name(index: int, tail: str) -> str:
    is_attention = index % 2 == 0
    same = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
        "post_norm.weight": "post_attention_layernorm.weight" if is_attention else "post_feedforward_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    inner = tail if tail.startswith("mlp.") else f"self_attn.{tail}"
    return f"model.layers.{index // 2}.{same.get(tail, inner)}"
