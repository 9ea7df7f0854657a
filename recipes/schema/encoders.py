"""Fields of the `model.vision` and `model.audio` groups: the encoders of images and audio, their weights, and the rules.

    patches   --vision--> width --projector--> model.hidden, one feature for each patch
    frames    --audio---> width x stride / 2 --projector--> model.hidden, one feature for each `stride` frames

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from recipes.schema.errors import Problem
from recipes.schema.fields import Count, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer that sees both directions, and the projector of its outputs to `model.hidden` (docs/multimodal.md)."""

    layers: Count = 0
    """Transformer layers; 0: the model has no such encoder."""
    hidden: PositiveInt = 768
    """Width of the encoder (SigLIP 2 B and Whisper small: 768)."""
    ffn: PositiveInt = 3072
    """Inner width of its MLPs (SigLIP 2 B and Whisper small: 3,072)."""
    heads: PositiveInt = 12
    """Attention heads, each `hidden` / `heads` wide. Divisible by `parallel.tensor`."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of its LayerNorms (SigLIP 2: 1e-6; Whisper: 1e-5)."""


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Encoder of images and frames: SigLIP 2's vision tower (arXiv 2502.14786)."""

    patch: PositiveInt = 16
    """Side of a patch, in pixels: `data.media.patch`."""
    positions: PositiveInt = 16
    """Side of the square of learned positions, which is scaled to the grid of each image (SigLIP 2 at 256 patches: 16)."""


@dataclass(frozen=True)
class AudioConfig(EncoderConfig):
    """Encoder of audio: Whisper's (arXiv 2212.04356)."""

    mels: Literal[80, 128] = 80
    """Mel bands of a frame: `data.media.mels`."""
    stride: PositiveInt = 8
    """Frames of a placeholder: `data.media.audio_stride`. Even: the convolutions halve the frames, and stride / 2 neighbouring
    outputs become one feature."""


@dataclass(frozen=True)
class EncoderWeight:
    """One parameter of an encoder or projector."""

    shape: tuple[int, ...]
    split: bool
    """Whether each tensor rank has a part of it."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


def encoder_weights(vision: VisionConfig, audio: AudioConfig, hidden: int) -> dict[str, EncoderWeight]:
    """Every parameter of encoders and projectors by its name in the whole model. hidden: `model.hidden`."""
    found: dict[str, EncoderWeight] = {}
    if vision.layers:
        width = vision.hidden
        found |= _linear("media.vision.patch_embedding", (width, 3 * vision.patch**2))
        found["media.vision.position_embedding.weight"] = EncoderWeight((vision.positions**2, width), split=False)
        found |= dict(_transformer("media.vision.encoder", vision))
        found |= _projector("media.vision_projector.encoder", width, hidden)
    if audio.layers:
        width = audio.hidden
        found |= _linear("media.audio.conv1", (width, audio.mels, 3))
        found |= _linear("media.audio.conv2", (width, width, 3))
        found |= dict(_transformer("media.audio.encoder", audio))
        found |= _projector("media.audio_projector.encoder", width * audio.stride // 2, hidden)
    return found


def _linear(
    name: str, shape: tuple[int, ...], *, split: Literal["no", "columns", "rows"] = "no"
) -> dict[str, EncoderWeight]:
    return {
        f"{name}.weight": EncoderWeight(shape, split=split != "no"),
        f"{name}.bias": EncoderWeight(shape[:1], split=split == "columns"),
    }


def _projector(name: str, inputs: int, hidden: int) -> dict[str, EncoderWeight]:
    first = _linear(f"{name}.linear_fc1", (hidden, inputs), split="columns")
    return first | _linear(f"{name}.linear_fc2", (hidden, hidden), split="rows")


def _transformer(name: str, encoder: EncoderConfig) -> Iterator[tuple[str, EncoderWeight]]:
    width, ffn = encoder.hidden, encoder.ffn
    for layer in range(encoder.layers):
        prefix = f"{name}.layers.{layer}"
        yield from _linear(f"{prefix}.input_layernorm", (width,)).items()
        yield from _linear(f"{prefix}.self_attention.linear_proj", (width, width), split="rows").items()
        yield from _linear(f"{prefix}.self_attention.linear_qkv", (3 * width, width), split="columns").items()
        yield from _linear(f"{prefix}.pre_mlp_layernorm", (width,)).items()
        yield from _linear(f"{prefix}.mlp.linear_fc1", (ffn, width), split="columns").items()
        yield from _linear(f"{prefix}.mlp.linear_fc2", (width, ffn), split="rows").items()
    yield from _linear(f"{name}.final_layernorm", (width,)).items()


def encoder_shape_problems(vision: VisionConfig, audio: AudioConfig, *, hidden: int, tensor: int) -> list[Problem]:
    """Sizes of the encoders that do not divide each other, or that `parallel.tensor` does not divide."""
    found = []
    for name, encoder in (("vision", vision), ("audio", audio)):
        if not encoder.layers:
            continue
        key = f"model.{name}"
        if encoder.hidden % encoder.heads:
            text = f"{key}.heads={encoder.heads} does not divide {key}.hidden={encoder.hidden}."
            found.append(Problem(f"{key}.heads", text, "Use heads of equal width, such as 64."))
        sizes = {f"{key}.heads": encoder.heads, f"{key}.ffn": encoder.ffn, "model.hidden": hidden}
        if wrong := [f"{size}={value}" for size, value in sizes.items() if value % tensor]:
            text = f"parallel.tensor={tensor} does not divide {', '.join(wrong)}."
            fit = math.gcd(*sizes.values())
            choices = [str(degree) for degree in range(1, fit + 1) if fit % degree == 0]
            found.append(Problem("parallel.tensor", text, f"Use {', '.join(choices)}, or change the sizes."))
    if audio.layers and audio.stride % 2:
        text = f"model.audio.stride={audio.stride} is odd, and the convolutions of the encoder halve the frames."
        found.append(Problem("model.audio.stride", text, "Use an even number here and in data.media.audio_stride."))
    if audio.layers and (audio.hidden % 2 or audio.hidden < 4):
        text = f"model.audio.hidden={audio.hidden} does not fit positions of sines and cosines."
        found.append(Problem("model.audio.hidden", text, "Use an even width of at least 4."))
    return found
