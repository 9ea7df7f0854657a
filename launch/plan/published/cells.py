"""Reads numbers from the cells of a table of published runs: `64 (0)`, `1,024`, `8K`, `9.5k`, `8x8`, `8 nodes`, `n/a`."""

import re

from launch.plan.cost.device import Device


def integer(text: str) -> int | None:
    """The integer at the start of a cell: `64 (0)`, `4096(playbook)`, `1,024`, `8K` (8,192); None for `n/a` or nothing."""
    value = number(text, thousand=1024)
    return None if value is None else int(value)


def number(text: str, *, thousand: int = 1000) -> float | None:
    """The number at the start of a cell, times `thousand` for k and its square for M; None if it does not start with one."""
    found = re.match(r"\s*~?(\d[\d,]*(?:\.\d+)?)\s?([kKM](?![A-Za-z]))?", text)
    if not found:
        return None
    power = {"": 0, "k": 1, "m": 2}[(found.group(2) or "").lower()]
    return float(found.group(1).replace(",", "")) * float(thousand) ** power


def gpu_count(text: str, device: Device) -> int | None:
    """The number of GPUs in a cell: `64`, `8x8`, `8 nodes`."""
    product = re.match(r"\s*(\d+)\s*[xX*\u00d7]\s*(\d+)", text)
    if product:
        return int(product.group(1)) * int(product.group(2))
    count = integer(text)
    return count * device.node if count and re.match(r"\s*[\d,]+\s*nodes?\b", text.lower()) else count
