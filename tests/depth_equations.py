"""A model of attention and MLP layers with further depths (`model.mtp`), from the paper's equations (arXiv 2412.19437, section
2.2) in plain torch: one row at a time, without caches, in the dtype of its weights. The layers of the model and of a depth are
`*-` with the sizes of `tiny.TINY`.
"""

import math

import torch
import torch.nn.functional as F

from recipes.schema.mtp import MtpConfig

Weights = dict[str, torch.Tensor]
"""By name in the whole model."""


def logits_of_depths(w: Weights, mtp: MtpConfig, tokens: torch.Tensor, documents: torch.Tensor) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of the next token, then of each further depth; attention stays inside documents."""
    table, head = w["embedding.word_embeddings.weight"], w["output_layer.weight"]
    length = len(tokens)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (documents[:, None] == documents[None])
    hidden = _norm(_layers(table[tokens], w, "decoder.", seen), w["decoder.final_norm.weight"])
    found = [hidden @ head.T]
    for k in range(1, mtp.depths + 1):
        at = f"mtp.layers.{0 if mtp.repeated else k - 1}."
        later = torch.cat([tokens[k:], tokens.new_zeros(k)])
        both = [_norm(table[later], w[f"{at}enorm.weight"]), _norm(hidden, w[f"{at}hnorm.weight"])]
        x = torch.cat(both, -1) @ w[f"{at}eh_proj.weight"].T
        hidden = _norm(_layers(x, w, f"{at}mtp_model_layer.", seen), w[f"{at}final_layernorm.weight"])
        found.append(hidden @ head.T)
    return found


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _layers(x: torch.Tensor, w: Weights, place: str, seen: torch.Tensor) -> torch.Tensor:
    """Attention (4 query heads, 2 key heads of 16) and a squared-ReLU MLP, on [sequence, hidden]."""
    at = f"{place}layers.0."
    normed = _norm(x, w[f"{at}input_layernorm.weight"])
    groups = (normed @ w[f"{at}self_attention.linear_qkv.weight"].T).unflatten(-1, (2, 4, 16))  # 2 queries, key, value
    heads = []
    for group in range(2):
        key, value = groups[:, group, 2], groups[:, group, 3]
        for query in range(2):
            scores = groups[:, group, query] @ key.T / math.sqrt(16)
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ value)
    x = x + torch.cat(heads, -1) @ w[f"{at}self_attention.linear_proj.weight"].T
    at = f"{place}layers.1."
    inner = _norm(x, w[f"{at}pre_mlp_layernorm.weight"]) @ w[f"{at}mlp.linear_fc1.weight"].T
    return x + F.relu(inner).square() @ w[f"{at}mlp.linear_fc2.weight"].T
