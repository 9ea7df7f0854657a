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
from train.build import check, mesh_of
from train.megatron import use_device
from train.model.backend import choose_backend
from train.model.build import build_model
from train.parallel.wrap import wrap_chunks

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
    """Root-mean-square differences over root-mean-square values: of the logits and of each gradient, by name.

    Ours runs first and leaves only its logits and gradients; of the float64 gradients, one of theirs is in memory at a time.
    """
    peer = peer_of(model)
    if storage == "bf16":
        peer.to(torch.bfloat16)  # as we store them; norms, dt and A too, which ours keep in fp32
    tokens = torch.randint(0, model.vocab, (1, length + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    logits, gradients = _ours(model, dict(peer.named_parameters()), tokens, labels, storage=storage, device=device)
    gc.collect()
    peer.double()
    found = {}

    def measure(names: list[str]) -> None:
        """Compare the gradients of one of our parameters with all of theirs that it holds, then drop both."""
        ours = owner[names[0]]
        theirs = their_part(ours, {name: weights[name].grad for name in names}, model)
        got = gradients.pop(ours)
        found[f"gradient of {ours}"] = _difference(got, theirs.view(got.shape))
        for name in names:
            weights[name].grad = None

    weights = dict(peer.named_parameters())
    owner, parts = _owners(list(gradients), weights, model)
    waiting = {ours: set(names) for ours, names in parts.items()}

    def arrived(name: str) -> None:
        waiting[owner[name]].discard(name)
        if not waiting[owner[name]]:
            measure(parts[owner[name]])

    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived(name))  # type: ignore[misc]
    expected = peer(tokens, use_cache=False).logits
    found["logits"] = _difference(logits, expected)
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    assert not gradients, f"without a gradient of theirs: {sorted(gradients)}"
    return found


def _ours(
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    storage: str,
    device: torch.device,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Our logits and gradients, by our names, with their weights."""
    length = tokens.shape[1]
    recipe = replace(
        RECIPE,
        model=model,
        precision=replace(RECIPE.precision, params=storage),
        run=replace(RECIPE.run, global_rows=1, microbatch_rows=1),
        data=replace(RECIPE.data, row_tokens=length),
    )
    use_device(device)
    with mesh_of(recipe, check(recipe, world=1), device=device, rank=0) as mesh:
        chunks = build_model(
            model,
            parallel=recipe.parallel,
            precision=recipe.precision,
            run=recipe.run,
            row_tokens=length,
            mesh=mesh,
            backend=choose_backend(recipe.precision, device),
        )
        (chunk,) = wrap_chunks(chunks, parallel=recipe.parallel, mesh=mesh)  # no optimizer: it takes 12 bytes a weight
        ours = chunk.module
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(their_part(name, weights, model).view(parameter.shape))
        tokens, labels = tokens.to(device), labels.to(device)
        positions = torch.arange(length, device=device)[None]
        with torch.no_grad():
            logits = ours(tokens, positions, None)
        chunk.zero_grad_buffer()
        ours(tokens, positions, None, labels=labels).mean().backward()
        return logits, {name: parameter.main_grad for name, parameter in ours.named_parameters()}


def _owners(
    ours: list[str], weights: dict[str, torch.Tensor], model: ModelConfig
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """By their name, our parameter that holds theirs; by ours, the names of theirs."""

    class Asked(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            names.append(name)
            return torch.empty(weights[name].shape, device="meta")

    owner, parts = {}, {}
    for mine in ours:
        names: list[str] = []
        their_part(mine, Asked(), model)
        parts[mine] = names
        owner |= dict.fromkeys(names, mine)
    return owner, parts


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Without a float64 copy of what was computed: a gradient may have half a billion numbers."""
    total, size = 0.0, 0.0
    for mine, theirs in zip(
        got.detach().flatten().split(1 << 24), expected.detach().flatten().split(1 << 24), strict=True
    ):
        total += float((mine.cpu().double() - theirs.double()).square().sum())
        size += float(theirs.double().square().sum())
    return (total / size) ** 0.5
