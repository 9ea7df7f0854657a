"""Which version of the CPU kernels this process runs: compiled (for how many SIMD lanes) or plain torch. Each rounds
differently, so checkpoints record it."""

import torch

from train.native import kernels, quantize

NAMES = ("scan", "attention", "passes")


def describe(device: torch.device) -> str:
    """The versions as text, equal texts for equal rounding; "" on other devices than CPUs, where no such kernel runs."""
    if device.type != "cpu":
        return ""
    libraries = {name: kernels.library(name) for name in NAMES} | {"quantize": quantize.library()}
    plain = [name for name, library in libraries.items() if library is None]
    if len(plain) == len(libraries):
        return "plain torch"
    lanes = sorted({libraries[name].stratum_lanes() for name in NAMES if libraries[name] is not None})  # type: ignore[union-attr]
    text = f"compiled for {', '.join(map(str, lanes))} lanes" if lanes else "compiled"
    return f"{text}, plain torch for {', '.join(plain)}" if plain else text


def of_all_ranks(forms: list[str]) -> str:
    """The texts of all ranks as one: their common text if they are equal, else each text with its ranks."""
    ranks: dict[str, list[str]] = {}
    for rank, form in enumerate(forms):
        ranks.setdefault(form, []).append(str(rank))
    if len(ranks) == 1:
        return forms[0]
    named = (
        f"{form} on rank{'s' * (len(r) > 1)} {', '.join(r[:8])}{' ...' * (len(r) > 8)}" for form, r in ranks.items()
    )
    return "; ".join(named)


def are_mixed(text: str) -> bool:
    """Whether a text of `of_all_ranks` is of ranks that round differently."""
    return " on rank" in text
