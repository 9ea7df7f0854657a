"""Matrices to quantise, for tests of low precision."""

import torch


def matrices(rows: int = 256, columns: int = 384) -> dict[str, torch.Tensor]:
    """Inputs that have gone wrong somewhere: ordinary, of wild range, constant, zero, huge, tiny, with a zero block."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=g)
    wild = normal * torch.exp(6 * torch.randn(rows, columns, generator=g))
    half = normal.clone()
    half[: rows // 2] = 0
    return {
        "normal": normal,
        "wild": wild,
        "constant": torch.full((rows, columns), 0.3),
        "zero": torch.zeros(rows, columns),
        "huge": normal * 1e37,
        "tiny": normal * 1e-38,
        "half zero": half,
        "bf16": normal.bfloat16(),
        "wild bf16": wild.bfloat16(),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.float(), b.float())
