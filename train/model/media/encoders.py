"""Encoders, projectors and the splice: features of a microbatch's images and clips in place of their placeholders' embeddings.

    MediaBatch --VisionEncoder--> [T, width] --Projector--> [T, hidden] --splice--> embeddings [sequence, rows, hidden]
               --AudioEncoder---^

They are part of the chunk with the embedding, so of the first pipeline stage only. Each context rank, and each tensor rank under
sequence parallelism, encodes all media of its rows and keeps the features of its own part of the sequence. The gradients of the
parts add up to the whole: over context ranks where Megatron sums gradients, over tensor ranks in `splice`.
"""

from functools import partial

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from data.batch import MediaBatch
from recipes.schema.encoders import EncoderConfig
from recipes.schema.errors import DataError
from recipes.schema.model import ModelConfig
from train.model.attention import zigzag_positions
from train.model.linear import use_fast_product
from train.model.media.audio import AudioEncoder, joined_ranges
from train.model.media.packed import encoder_config
from train.model.media.vision import VisionEncoder


class Projector(MultimodalProjector):
    """Two linear layers with a GELU between them, both `model.hidden` wide (LLaVA 1.5, arXiv 2310.03744)."""

    def __init__(
        self, encoder: EncoderConfig, inputs: int, *, decoder: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        config = encoder_config(encoder, decoder=decoder, activation=F.gelu)
        config.hidden_size = config.ffn_hidden_size = decoder.hidden_size
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, layers, "mlp", inputs, tp_group=groups.tp)
        use_fast_product(self)


class MediaEncoders(MegatronModule):
    """What a chunk with an embedding has in addition if the model has encoders."""

    def __init__(self, model: ModelConfig, *, decoder: TransformerConfig, groups: ProcessGroupCollection) -> None:
        """decoder: configuration of the language model."""
        super().__init__(config=decoder)
        self.groups = groups
        self.patch_values, self.mels = model.vision.patch**2 * 3, model.audio.mels
        build = partial(Projector, decoder=decoder, groups=groups)
        if model.vision.layers:
            self.vision = VisionEncoder(model.vision, decoder=decoder, groups=groups)
            self.vision_projector = build(model.vision, model.vision.hidden)
        if model.audio.layers:
            self.audio = AudioEncoder(model.audio, decoder=decoder, groups=groups)
            self.audio_projector = build(model.audio, model.audio.hidden * self.audio.stack)

    def splice(self, embedded_SBH: torch.Tensor, media: MediaBatch) -> torch.Tensor:
        """The embeddings of this rank's part of the rows, with features in place of placeholders.

        Not in place. Collective over the tensor group.
        """
        device = embedded_SBH.device
        for name, count in (("vision", len(media.grids)), ("audio", len(media.clip_frames))):
            if count and not hasattr(self, name):
                what = "images" if name == "vision" else "audio"
                raise DataError(
                    f"rows have {count:,} pieces of {what}, and the model has model.{name}.layers=0. Give it such an encoder, "
                    f"or take the source out of data.sources."
                )
        local_S = self._local_places(embedded_SBH.shape[0], device)
        hidden = embedded_SBH
        if hasattr(self, "vision"):
            counts = media.grids.prod(dim=1)
            hidden = self._placed(
                hidden, self._image_features(media, device), local_S, media.image_rows, media.image_slots, counts
            )
        if hasattr(self, "audio"):
            counts = self._features_of(media.clip_frames)
            hidden = self._placed(
                hidden, self._clip_features(media, device), local_S, media.clip_rows, media.clip_slots, counts
            )
        return hidden

    def _image_features(self, media: MediaBatch, device: torch.device) -> torch.Tensor:
        """[T, hidden]; of one blank patch if there is no image, so that every weight gets a gradient in every microbatch."""
        patches, grids = media.patches, media.grids
        if not len(grids):
            patches, grids = patches.new_zeros(1, self.patch_values), grids.new_ones(1, 2)
        features_TH = self.vision(patches.to(device, non_blocking=True), grids)
        return self.vision_projector(features_TH[:, None])[:, 0]

    def _clip_features(self, media: MediaBatch, device: torch.device) -> torch.Tensor:
        """[T, hidden]; of one blank frame if there is no clip."""
        mels, frames = media.mels, media.clip_frames
        if not len(frames):
            mels, frames = mels.new_zeros(1, self.mels), frames.new_ones(1)
        features_TH = self.audio(mels.to(device, non_blocking=True), frames)
        return self.audio_projector(features_TH[:, None])[:, 0]

    def _features_of(self, frames: torch.Tensor) -> torch.Tensor:
        stride = 2 * self.audio.stack
        return (frames + stride - 1) // stride

    def _local_places(self, sequence: int, device: torch.device) -> torch.Tensor:
        """For each slot of the whole row, its index in this rank's part of the sequence; -1: another rank has it."""
        cp, tp = self.groups.cp, self.groups.tp
        parts = tp.size() if self.config.sequence_parallel else 1
        whole = sequence * parts * cp.size()
        mine = zigzag_positions(whole, rank=cp.rank(), ranks=cp.size(), device=device)
        if parts > 1:
            mine = mine.chunk(parts)[tp.rank()]
        local_S = torch.full((whole,), -1, dtype=torch.int64, device=device)
        local_S[mine] = torch.arange(sequence, device=device)
        return local_S

    def _placed(
        self,
        hidden_SBH: torch.Tensor,
        features_TH: torch.Tensor,
        local_S: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        """Features, a run of `counts` for each medium, at the rows and first slots of their runs."""
        if self.config.sequence_parallel:
            features_TH = copy_to_tensor_model_parallel_region(features_TH, group=self.groups.tp)
        device, batch = hidden_SBH.device, hidden_SBH.shape[1]
        if not len(rows):
            return hidden_SBH + 0 * features_TH.sum()
        row_T = rows.repeat_interleave(counts).to(device)
        slot_T = joined_ranges(slots.tolist(), counts.tolist(), device)
        place_T = local_S[slot_T]
        here = place_T >= 0
        flat = hidden_SBH.flatten(0, 1)
        return flat.index_copy(0, (place_T * batch + row_T)[here], features_TH[here].to(flat.dtype)).view_as(hidden_SBH)
