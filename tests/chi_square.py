"""Whether counts follow given probabilities."""

import torch


def surprise(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of counts as far from the expected ones as these, by Pearson's chi-square test. Both in float64."""
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return float(torch.special.gammaincc((possible.sum() - 1).double() / 2, statistic / 2))
