"""Images: bytes -> RGB -> patches, with limits. One of the few modules that import Pillow.

    bytes --open_image--> Pillow image, RGB, upright --patches_of--> uint8 [rows x columns, patch x patch x 3]

The grid is SigLIP 2's (NaFlex, arXiv 2502.14786): the image is scaled at its aspect ratio, bilinear, to the largest grid of whole
patches within a number of patches. Size and format are checked before pixels are decoded. Only formats without scripts or
references to other files are opened. A bad image is a ValueError that says why, as the rest of a sentence about it.
"""

import io
import math
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are opened. (EPS would run Ghostscript.)"""
_SCALE_STEP = 1e-5
"""Accuracy at which SigLIP 2 searches for the scale."""
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def open_image(content: bytes, *, most_pixels: int) -> Image:
    """The decoded image as RGB, turned upright, transparent parts on white. ValueError says why it cannot be used."""
    try:
        with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > most_pixels:
                raise ValueError(f"has {width:,} x {height:,} pixels, more than data.media.most_pixels={most_pixels:,}")
            if (frames := getattr(opened, "n_frames", 1)) > 1:
                raise ValueError(f"is an animation of {frames:,} pictures. Convert it to a video, or keep one picture")
            opened.load()
            return _as_rgb(PIL.ImageOps.exif_transpose(opened))
    except ValueError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"is not an image of a known format ({', '.join(_FORMATS)})") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"has too many pixels: {error}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _as_rgb(image: Image) -> Image:
    """RGB of 8 bits. CMYK goes through Pillow's conversion, grey of 16 bits is scaled, transparent parts lie on white."""
    if image.mode in _SIXTEEN_BITS:
        # Pillow's own conversion cuts values above 255 off.
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("has grey values outside of 16 bits")
        return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("has floating-point pixels, whose range is not known. Convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        transparent = image.convert("RGBA")
        white = PIL.Image.new("RGBA", transparent.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")


def grid_of(width: int, height: int, *, patch: int, most_patches: int) -> tuple[int, int]:
    """(rows, columns) of patches of an image: SigLIP 2's search (transformers' `get_image_size_for_max_num_patches`).

    ValueError for an image so narrow that no scale fits.
    """

    def side(scale: float, size: int) -> int:
        return max(1, math.ceil(size * scale / patch))

    low, high = _SCALE_STEP / 10, 100.0
    while high - low >= _SCALE_STEP:
        scale = (low + high) / 2
        if side(scale, height) * side(scale, width) <= most_patches:
            low = scale
        else:
            high = scale
    rows, columns = side(low, height), side(low, width)
    if rows * columns > most_patches:
        raise ValueError(f"of {width:,} x {height:,} pixels is too narrow for {most_patches:,} patches")
    return rows, columns


def patches_of(image: Image, grid: tuple[int, int], *, patch: int) -> np.ndarray:
    """uint8 [rows x columns, patch x patch x 3]: the image scaled to a grid of patches, row by row; in a patch pixel by pixel."""
    rows, columns = grid
    scaled = image.resize((columns * patch, rows * patch), PIL.Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled).reshape(rows, patch, columns, patch, 3)
    return np.ascontiguousarray(pixels.transpose(0, 2, 1, 3, 4)).reshape(rows * columns, patch * patch * 3)


def image_of(patches: np.ndarray, grid: tuple[int, int], *, patch: int) -> Image:
    """The inverse of `patches_of`: the image as the model sees it."""
    rows, columns = grid
    pixels = patches.reshape(rows, columns, patch, patch, 3).transpose(0, 2, 1, 3, 4)
    return PIL.Image.fromarray(np.ascontiguousarray(pixels).reshape(rows * patch, columns * patch, 3))


def from_pixels(pixels: Any) -> Image:
    """An image of uint8 [height, width, 3]."""
    return PIL.Image.fromarray(pixels)
