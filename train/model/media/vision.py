"""The encoder of images and frames: SigLIP 2's NaFlex vision tower (arXiv 2502.14786) without its pooling head.

    uint8 patches [T, patch x patch x 3], grids --> pixels in -1 to 1 --> linear + position --> PackedEncoder --> [T, width]

The position of a patch is a learned grid of embeddings, scaled to the image's own grid, bilinear with antialiasing, as in
transformers' `Siglip2VisionModel`. So an image of any aspect ratio has positions in two dimensions.
"""

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional as F

from recipes.schema.encoders import VisionConfig
from train.model.media.packed import PackedEncoder, Segments, encoder_config


class VisionEncoder(MegatronModule):
    """From patches to a feature each."""

    def __init__(
        self,
        encoder: VisionConfig,
        *,
        decoder: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        """decoder: configuration of the language model."""
        config = encoder_config(encoder, decoder=decoder, activation=partial(F.gelu, approximate="tanh"))
        super().__init__(config=config)
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.patch_embedding = nn.Linear(encoder.patch**2 * 3, encoder.hidden, device=device, dtype=dtype)
        self.position_embedding = nn.Embedding(encoder.positions**2, encoder.hidden, device=device, dtype=dtype)
        self.encoder = PackedEncoder(config, groups=groups)
        self.side = encoder.positions

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """patches: [T, patch x patch x 3] uint8, of all images; grids: [images, 2] int64 on the CPU -> [T, width].
        Collective over the tensor group."""
        dtype = self.patch_embedding.weight.dtype
        pixels = patches.to(torch.float32).div(127.5).sub(1.0).to(dtype)
        sizes = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
        x_TH = self.patch_embedding(pixels) + self._positions(sizes).to(dtype)
        segments = Segments.of([rows * columns for rows, columns in sizes], device=patches.device)
        return self.encoder(x_TH[:, None], segments)[:, 0]

    def _positions(self, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """[T, width] fp32"""
        # Called, not read as `.weight`: Megatron waits for gathered weights in a hook of the module.
        everywhere = torch.arange(self.side**2, device=self.position_embedding.weight.device)
        grid = self.position_embedding(everywhere).float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        scaled = {
            size: F.interpolate(grid, size=size, mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).t()
            for size in dict.fromkeys(sizes)
        }
        return torch.cat([scaled[size] for size in sizes])
