"""A tiny model with encoders, and synthetic rows with images and clips: a function of step and position only."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tiny import ROW_TOKENS, recipe_with, rows_of

from data.batch import Batch, MediaBatch
from recipes.schema.encoders import AudioConfig, VisionConfig
from recipes.schema.recipe import Recipe

VISION = VisionConfig(layers=2, hidden=32, ffn=64, heads=4, patch=2, positions=4)
AUDIO = AudioConfig(layers=2, hidden=32, ffn=64, heads=4, norm_eps=1e-5, stride=4)


def media_recipe(**changes: Any) -> Recipe:
    """`recipe_with` for a model that reads images and audio."""
    return recipe_with(**{"model.vision": VISION, "model.audio": AUDIO, **changes})


def media_rows(step: int, positions: np.ndarray) -> Batch:
    """`rows_of` in which each second row has two images, and each third one a clip; what follows a placeholder is not learned
    if it is one too."""
    generators = [np.random.default_rng((step, int(p), 3)) for p in positions]
    images, clips = [], []
    batch = rows_of(step, positions)
    learned = torch.ones(batch.tokens.shape, dtype=torch.bool)
    for row, (position, random) in enumerate(zip(positions, generators, strict=True)):
        if position % 2 == 0:
            for slot in (3, 40):
                rows, columns = int(random.integers(1, 4)), int(random.integers(1, 5))
                pixels = random.integers(0, 256, (rows * columns, 3 * VISION.patch**2), dtype=np.uint8)
                images.append((pixels, [rows, columns], row, slot))
                learned[row, slot - 1 : slot + rows * columns - 1] = False
        if position % 3 == 0:
            frames = int(random.integers(5, 30))
            clips.append((random.standard_normal((frames, AUDIO.mels), dtype=np.float32), frames, row, 20))
            learned[row, 19 : 20 + -(-frames // AUDIO.stride) - 1] = False
    assert ROW_TOKENS > 40 + 12
    media = MediaBatch(
        patches=torch.from_numpy(np.concatenate([np.empty((0, 12), np.uint8), *(one[0] for one in images)])),
        grids=torch.tensor([one[1] for one in images], dtype=torch.int64).reshape(-1, 2),
        image_rows=torch.tensor([one[2] for one in images], dtype=torch.int64),
        image_slots=torch.tensor([one[3] for one in images], dtype=torch.int64),
        mels=torch.from_numpy(np.concatenate([np.empty((0, 80), np.float32), *(one[0] for one in clips)])),
        clip_frames=torch.tensor([one[1] for one in clips], dtype=torch.int64),
        clip_rows=torch.tensor([one[2] for one in clips], dtype=torch.int64),
        clip_slots=torch.tensor([one[3] for one in clips], dtype=torch.int64),
    )
    return replace(batch, learned=learned, media=media)
