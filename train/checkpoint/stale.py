"""Checks that weights and moments changed since the last save of this process, or that arithmetic explains why not.

A save is refused as stale if a tensor's fingerprint did not change between two saves, unless

    moments            are zero, or too small to change (a parameter without gradient)
    fp32 weights       the last update is less than two units in the last place of every element (also: learning rate 0)
    bf16 weights       equal their rounded fp32 masters, and the masters changed or one of the above explains them

Adam's update is computed from the state itself (arXiv 1711.05101, algorithm 2), so there is nothing to configure. Muon's needs
whole matrices, so the optimizer keeps the largest element of its last update (`OptimizerPart.largest_update`). A tensor that
was not zero and is all zero now is refused too. Parts of fewer than 16 elements are not checked, because so few elements
can stay equal by chance.
"""

import torch

from train.checkpoint import fingerprint
from train.checkpoint.fingerprint import Sums
from train.checkpoint.pieces import OptimizerPart

MIN_ELEMENTS = 16
_TINY = torch.finfo(torch.float32).tiny
_ULPS = 2.0**-22
"""Two units in the last place of fp32, relative."""

PartSums = dict[str, Sums]
"""Fingerprints of a part's pieces: `weight`, `master` (if stored separately), `exp_avg`, and for AdamW `exp_avg_sq`."""


def problem(part: OptimizerPart, before: PartSums, now: PartSums) -> str | None:
    """The reason why this part of a parameter cannot be the result of training; None if it can.

    before, now: its fingerprints at two saves with updates between them.
    """
    if part.end - part.start < MIN_ELEMENTS:
        return None
    wiped = [name for name, sums in now.items() if sums == fingerprint.ZERO != before.get(name, fingerprint.ZERO)]
    if wiped:
        return f"{wiped[0]} was not zero at the last save and is all zero now"
    still = {name for name, sums in now.items() if before.get(name) == sums}
    for name in part.moments:
        if name in still and bool((part.moments[name].abs() >= 2 * _TINY).any()):
            return f"{name} did not change since the last save"
    exact = "master" if part.has_master else "weight"
    if exact in still and _would_have_moved(part):
        return f"the fp32 {exact} did not change since the last save, although its update is not small"
    if part.has_master and "weight" in still and not _is_rounded_master(part):
        return "the weight did not change since the last save and is not its rounded fp32 master"
    return None


def _would_have_moved(part: OptimizerPart) -> bool:
    """Whether the last update, with decoupled weight decay, exceeds the fp32 rounding of an element."""
    group, weight = part.group, part.master
    if group.get("muon"):
        if part.largest_update is None:
            return False
        # The element with the largest update, or the largest weight, moves at least by the difference of the two.
        largest = weight.abs().max()
        update = group["lr"] * (part.largest_update - group["weight_decay"] * largest).abs()
        return bool(update > 2 * _ULPS * largest + _TINY)
    updates = max(1, int(group["step"]))
    first = part.moments["exp_avg"] / (1 - group["betas"][0] ** updates)
    second = (part.moments["exp_avg_sq"] / (1 - group["betas"][1] ** updates)).sqrt()
    update = group["lr"] * (first / (second + group["eps"]) + group["weight_decay"] * weight)
    return bool((update.abs() > 2 * _ULPS * weight.abs() + _TINY).any())


def _is_rounded_master(part: OptimizerPart) -> bool:
    weight = part.local.data.reshape(-1)[part.start : part.end]
    return type(part.local.source) is not torch.Tensor or torch.equal(weight, part.master.to(weight.dtype))
