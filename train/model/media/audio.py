"""The encoder of audio: Whisper's (arXiv 2212.04356), for clips of any length, packed without padding.

    log-mel frames [F, mels] of clips --two convolutions, stride 2--> + sinusoids --PackedEncoder--> stacked [T, width x stack]

Both convolutions run over all clips at once, with zeros between them, so no clip sees another. A placeholder stands for
`data.media.audio_stride` frames: `stack` = stride / 2 neighbouring outputs become one feature; the last one of a clip is filled
up with zeros. Whisper's key projections have no bias; Megatron's do, which changes nothing: softmax ignores what is added to all
scores of a query.
"""

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional as F

from recipes.schema.encoders import AudioConfig
from train.model.media.packed import PackedEncoder, Segments, encoder_config

CONVOLUTION_STRIDE = 2
"""Frames to one position of the encoder (Whisper)."""
_LONGEST_PERIOD = 10_000
"""Of the sinusoids (Whisper, after arXiv 1706.03762)."""


class AudioEncoder(MegatronModule):
    """From log-mel frames to a feature for each `stride` of them."""

    def __init__(
        self,
        encoder: AudioConfig,
        *,
        decoder: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        """decoder: configuration of the language model."""
        assert encoder.stride % CONVOLUTION_STRIDE == 0, "a rule checks it"
        config = encoder_config(encoder, decoder=decoder, activation=F.gelu)
        super().__init__(config=config)
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.conv1 = nn.Conv1d(encoder.mels, encoder.hidden, kernel_size=3, padding=1, device=device, dtype=dtype)
        self.conv2 = nn.Conv1d(
            encoder.hidden,
            encoder.hidden,
            kernel_size=3,
            stride=CONVOLUTION_STRIDE,
            padding=1,
            device=device,
            dtype=dtype,
        )
        self.encoder = PackedEncoder(config, groups=groups)
        self.stack = encoder.stride // CONVOLUTION_STRIDE

    def forward(self, mels: torch.Tensor, clip_frames: torch.Tensor) -> torch.Tensor:
        """mels: [F, mels], of all clips; clip_frames: [clips] int64 on the CPU -> [T, width x stack]. Collective over the
        tensor group."""
        frames = clip_frames.tolist()
        lengths = [-(-count // CONVOLUTION_STRIDE) for count in frames]
        x_TH = self._convolved(mels.to(self.conv1.weight.dtype), frames, lengths)
        x_TH = x_TH + torch.cat([_sinusoids(length, x_TH.shape[1], x_TH.device) for length in lengths]).to(x_TH.dtype)
        x_TH = self.encoder(x_TH[:, None], Segments.of(lengths, device=x_TH.device))[:, 0]
        parts = [F.pad(clip, (0, 0, 0, -len(clip) % self.stack)) for clip in x_TH.split(lengths)]
        return torch.cat(parts).view(-1, self.stack * x_TH.shape[1])

    def _convolved(self, mels: torch.Tensor, frames: list[int], lengths: list[int]) -> torch.Tensor:
        """[positions of all clips, width]"""
        # One even-sized block a clip, with at least two frames of zeros at its end: the convolutions reach one frame further.
        blocks = [CONVOLUTION_STRIDE * (length + 1) for length in lengths]
        begins = [sum(blocks[:index]) for index in range(len(blocks))]
        ramp = joined_ranges(begins, frames, mels.device)
        spread = mels.new_zeros(sum(blocks), mels.shape[1]).index_copy(0, ramp, mels)
        first = F.gelu(self.conv1(spread.t()[None]))
        is_frame = torch.zeros(sum(blocks), dtype=first.dtype, device=mels.device).index_fill(0, ramp, 1.0)
        second = F.gelu(self.conv2(first * is_frame))[0].t()
        return second[joined_ranges([begin // CONVOLUTION_STRIDE for begin in begins], lengths, mels.device)]


def joined_ranges(begins: list[int], lengths: list[int], device: torch.device) -> torch.Tensor:
    """begin, begin + 1, ..., begin + length - 1 of each, one after the other, int64."""
    return torch.cat(
        [torch.arange(begin, begin + length, device=device) for begin, length in zip(begins, lengths, strict=True)]
    )


def _sinusoids(length: int, channels: int, device: torch.device) -> torch.Tensor:
    """[length, channels] fp32: sines, then cosines, of periods from 2 pi on (Whisper)."""
    rates = torch.exp(-math.log(_LONGEST_PERIOD) / (channels // 2 - 1) * torch.arange(channels // 2, device=device))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
