"""Encoders against transformers: SigLIP 2's vision tower and Whisper's encoder, outputs and gradients, packed without padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ranks import run_ranks
from tiny import recipe_with
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from recipes.schema.encoders import AudioConfig, VisionConfig
from train.build import check, mesh_of
from train.megatron import use_device
from train.model.backend import ReferenceBackend
from train.model.build import transformer_config
from train.model.media.audio import AudioEncoder
from train.model.media.vision import VisionEncoder

VISION = VisionConfig(layers=3, hidden=48, ffn=96, heads=4, patch=4, positions=8)
AUDIO = AudioConfig(layers=2, hidden=32, ffn=64, heads=4, norm_eps=1e-5, mels=16, stride=4)  # type: ignore[arg-type]


@contextmanager
def one_process() -> Iterator[dict[str, Any]]:
    """What encoders are built with, in a world of one."""
    recipe = recipe_with()
    use_device(torch.device("cpu"))
    with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=0) as mesh:
        config = transformer_config(
            recipe.model,
            parallel=recipe.parallel,
            precision=recipe.precision,
            run=recipe.run,
            backend=ReferenceBackend(),
        )
        yield {"decoder": config, "groups": mesh.groups}


def draw(module: nn.Module) -> None:
    """Every parameter from N(0, 0.2), norms' weights around one, with a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        values = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values + 1 if "norm" in name and name.endswith("weight") else values)


def fused(theirs: nn.Module, kind: str, heads: int) -> torch.Tensor:
    """Query, key and value of each head one after the other, as Megatron has them; no bias counts as zero."""
    parts = [getattr(theirs, name) for name in ("q_proj", "k_proj", "v_proj")]
    values = [getattr(part, kind) for part in parts]
    values = [torch.zeros_like(values[0]) if one is None else one for one in values]
    return torch.stack([one.unflatten(0, (heads, -1)) for one in values], 1).flatten(0, 2)


def pairs(ours: Any, theirs: Any, heads: int) -> Iterator[tuple[nn.Parameter, Any]]:
    """Our parameter of a transformer and theirs, or a function of `attr` ("data" or "grad") that gives theirs."""
    for mine, other in zip(ours.encoder.layers, theirs.layers, strict=True):
        attention, mlp = mine.self_attention, mine.mlp
        output = other.self_attn.out_proj
        norms = [getattr(other, name) for name in ("layer_norm1", "self_attn_layer_norm") if hasattr(other, name)]
        lasts = [getattr(other, name) for name in ("layer_norm2", "final_layer_norm") if hasattr(other, name)]
        fc = other.mlp if hasattr(other, "mlp") else other
        for kind in ("weight", "bias"):
            yield getattr(attention.linear_qkv, kind), (other.self_attn, kind)
            for left, right in (
                (attention.linear_proj, output), (mine.input_layernorm, norms[0]), (mine.pre_mlp_layernorm, lasts[0]),
                (mlp.linear_fc1, fc.fc1), (mlp.linear_fc2, fc.fc2),
            ):  # fmt: skip
                yield getattr(left, kind), getattr(right, kind)


class _Grad:
    """A module's projections with gradients in place of values."""

    def __init__(self, attention: Any) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            part = getattr(attention, name)
            one = type("Part", (), {})()
            one.weight, one.bias = part.weight.grad, None if part.bias is None else part.bias.grad
            setattr(self, name, one)


def copy_and_compare(ours: Any, theirs: Any, others: list[tuple[Any, Any]], heads: int) -> Any:
    """Copy their weights into ours. -> a function that gives the largest difference of gradients, relative to the largest one."""
    both = [*pairs(ours, theirs, heads), *others]
    assert {id(mine) for mine, _ in both} == {id(parameter) for parameter in ours.parameters()}
    with torch.no_grad():
        for mine, other in both:
            value = fused(other[0], other[1], heads) if isinstance(other, tuple) else other
            mine.copy_(value.view_as(mine))

    def gradients() -> float:
        worst = 0.0
        for mine, other in both:
            theirs_grad = fused(_Grad(other[0]), other[1], heads) if isinstance(other, tuple) else other.grad  # type: ignore[arg-type]
            worst = max(worst, relative(mine.grad, theirs_grad.view_as(mine)))
        return worst

    return gradients


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value of theirs."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare_images(_rank: int) -> None:
    """Four images, two of one size, packed; transformers pads them to the longest and masks."""
    grids = [(4, 6), (3, 3), (1, 20), (3, 3)]
    config = Siglip2VisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, patch_size=4, num_patches=64,
        vision_use_head=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = Siglip2VisionModel(config)
    draw(theirs)
    model = getattr(theirs, "vision_model", theirs)
    patches = torch.randint(0, 256, (sum(r * c for r, c in grids), 48), dtype=torch.uint8)
    most = max(r * c for r, c in grids)
    padded, mask = torch.zeros(4, most, 48), torch.zeros(4, most, dtype=torch.int64)
    for at, part in enumerate(patches.split([r * c for r, c in grids])):
        padded[at, : len(part)] = (part.float() / 255 - 0.5) / 0.5
        mask[at, : len(part)] = 1
    expected_padded = theirs(
        pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids)
    ).last_hidden_state
    expected = expected_padded[mask.bool()]
    with one_process() as arguments:
        ours = VisionEncoder(VISION, **arguments)
        gradients = copy_and_compare(
            ours, model.encoder,
            [
                (ours.patch_embedding.weight, model.embeddings.patch_embedding.weight),
                (ours.patch_embedding.bias, model.embeddings.patch_embedding.bias),
                (ours.position_embedding.weight, model.embeddings.position_embedding.weight),
                (ours.encoder.final_layernorm.weight, model.post_layernorm.weight),
                (ours.encoder.final_layernorm.bias, model.post_layernorm.bias),
            ],
            heads=4,
        )  # fmt: skip
        got = ours(patches, torch.tensor(grids))
        assert relative(got, expected) < 1e-5
        weights = torch.randn(expected.shape)
        (expected * weights).sum().backward()
        (got * weights).sum().backward()
        assert gradients() < 1e-4


def compare_clips(_rank: int, frames: list[int]) -> None:
    """Packed clips of any length; transformers encodes each by itself, without padding to 30 seconds."""
    config = WhisperConfig(
        num_mel_bins=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=32,
        max_source_positions=20, attn_implementation="eager", dropout=0.0,
    )  # fmt: skip
    theirs = WhisperEncoder(config).eval()
    positions = theirs.embed_positions.weight.detach().clone()
    draw(theirs)
    mels = torch.randn(sum(frames), 16)
    expected = []
    for clip in mels.split(frames):
        length = -(-len(clip) // 2)
        theirs.embed_positions = nn.Embedding.from_pretrained(positions[:length])
        theirs.max_source_positions = length
        theirs.config.max_source_positions = length
        # transformers wants an even number of frames; Whisper's convolutions end with zeros in any case.
        first = nn.functional.gelu(theirs.conv1(clip.t()[None]))
        second = nn.functional.gelu(theirs.conv2(first)).transpose(1, 2)
        if len(clip) % 2 == 0:
            expected.append(theirs(clip.t()[None]).last_hidden_state[0])
        else:
            hidden = second + positions[:length]
            for layer in theirs.layers:
                found = layer(hidden, None)
                hidden = found if isinstance(found, torch.Tensor) else found[0]
            expected.append(theirs.layer_norm(hidden)[0])
    with one_process() as arguments:
        ours = AudioEncoder(AUDIO, **arguments)
        gradients = copy_and_compare(
            ours, theirs,
            [
                *((getattr(getattr(ours, conv), kind), getattr(getattr(theirs, conv), kind))
                  for conv in ("conv1", "conv2") for kind in ("weight", "bias")),
                (ours.encoder.final_layernorm.weight, theirs.layer_norm.weight),
                (ours.encoder.final_layernorm.bias, theirs.layer_norm.bias),
            ],
            heads=4,
        )  # fmt: skip
        got = ours(mels, torch.tensor(frames))
        stacked = [nn.functional.pad(one, (0, 0, 0, len(one) % 2)).view(-1, 64) for one in expected]
        assert relative(got, torch.cat(stacked)) < 1e-5
        weights = torch.randn(got.shape)
        (torch.cat(stacked) * weights).sum().backward()
        (got * weights).sum().backward()
        assert gradients() < 1e-4


def test_images_of_any_aspect_ratio_equal_siglip_2() -> None:
    run_ranks(1, compare_images)


def test_clips_of_any_length_equal_whisper() -> None:
    run_ranks(1, compare_clips, [40, 17, 3, 40])
