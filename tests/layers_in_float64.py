"""Layers at any width against transformers' model of the same shape in float64: logits and gradients of one row.

Our weights are stored in `storage` (fp32 or bf16); theirs are the same rounded numbers in float64. (transformers computes norms
and softmax in fp32: 1e-7.) One layer of each kind is a model of its own, because a float64 MLP of 32,768 x 8,192 needs 4 GB.
"""

import gc
from dataclasses import replace

import torch
from parity.peers import peer_of, their_part
from tiny import RECIPE
from torch.nn import functional as F

from recipes.schema.model import ModelConfig
from train.build import build_engine, check, mesh_of
from train.megatron import use_device

VOCAB = 512
"""The head and embedding are not what is compared here."""
_HYBRID = ModelConfig(
    pattern="M", hidden=256, vocab=VOCAB, ffn=1024, heads=4, kv_heads=2, head_dim=64,
    mamba_heads=8, mamba_head_dim=64, mamba_state=64, mamba_groups=2, mamba_chunk=64,
)  # fmt: skip
LAYERS = {
    "Mamba-2": _HYBRID,
    "attention": replace(_HYBRID, pattern="*"),
    "MLP": replace(_HYBRID, pattern="-"),
    "Gemma 2": replace(
        _HYBRID, pattern="w-*-", activation="geglu", position="rope", window_tokens=100, attention_softcap=50.0,
        logit_softcap=30.0, norm_eps=1e-6, norm_offset=1, post_norms=True, scale_embedding=True, tie_embeddings=True,
    ),
}  # fmt: skip
"""In small, for devices: the smoke recipe's widths."""


def differences(model: ModelConfig, *, storage: str, device: torch.device, length: int) -> dict[str, float]:
    """Root-mean-square differences over root-mean-square values: of the logits and of each gradient, by name."""
    peer = peer_of(model)
    if storage == "bf16":
        peer.to(torch.bfloat16)  # as we store them; norms, dt and A too, which ours keep in fp32
    peer.double()
    tokens = torch.randint(0, model.vocab, (1, length + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    expected = peer(tokens, use_cache=False).logits
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    weights = dict(peer.named_parameters())
    recipe = replace(
        RECIPE,
        model=model,
        precision=replace(RECIPE.precision, params=storage),
        run=replace(RECIPE.run, global_rows=1, microbatch_rows=1),
        data=replace(RECIPE.data, row_tokens=length),
    )
    found = {}
    use_device(device)
    with mesh_of(recipe, check(recipe, world=1), device=device, rank=0) as mesh:
        engine = build_engine(recipe, mesh)
        ours = engine.chunks[0].module
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(their_part(name, weights, model).view(parameter.shape))
        tokens, labels = tokens.to(device), labels.to(device)
        positions = torch.arange(length, device=device)[None]
        with torch.no_grad():
            found["logits"] = _difference(ours(tokens, positions, None), expected)
        engine.chunks[0].zero_grad_buffer()
        ours(tokens, positions, None, labels=labels).mean().backward()
        gradients = {name: p.grad for name, p in weights.items()}
        for name, parameter in ours.named_parameters():
            theirs = their_part(name, gradients, model).view(parameter.shape)
            found[f"gradient of {name}"] = _difference(parameter.main_grad, theirs)
    del engine, ours, peer, weights, gradients
    gc.collect()
    return found


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Without a float64 copy of what was computed: a gradient may have half a billion numbers."""
    total, size = 0.0, 0.0
    for mine, theirs in zip(
        got.detach().flatten().split(1 << 24), expected.detach().flatten().split(1 << 24), strict=True
    ):
        total += float((mine.cpu().double() - theirs.double()).square().sum())
        size += float(theirs.double().square().sum())
    return (total / size) ** 0.5
