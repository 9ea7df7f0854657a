"""Integer codes in 32-bit words, as compressed-tensors' `pack-quantized` stores them.

Code i of a row is stored in bits i * b to i * b + b - 1 of the row's words, lowest bit first, as the unsigned number
code + 2^(b-1). Zero bits fill the last word of a row.
"""

import sys

import torch

from recipes.schema.errors import BackendError


def pack(codes: torch.Tensor, *, bits: int) -> torch.Tensor:
    """int8 codes [rows, columns] of 4 or 8 bits -> int32 words [rows, ceil(columns * bits / 32)]."""
    _check_byte_order()
    numbers = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    numbers = torch.nn.functional.pad(numbers, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    return numbers.contiguous().view(torch.int32)


def unpack(words: torch.Tensor, *, bits: int, columns: int) -> torch.Tensor:
    """Reverse `pack`: int32 words -> int8 codes [rows, columns]."""
    _check_byte_order()
    numbers = words.contiguous().view(torch.uint8)
    if bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
    return (numbers[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise BackendError("packed weights are read and written on little-endian machines only.")
