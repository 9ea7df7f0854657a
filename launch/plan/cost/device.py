"""GPUs as the planner sees them: peaks, memory, bandwidths, power, read from `devices.toml` beside this file.

A device is found by any name people give it: `h100`, `H100 80GB`, `DGX-H100`, `nvidia_h100_80gb`.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from recipes.schema.errors import RecipeError

Format = Literal["bf16", "fp8", "fp4", "fp32"]
"""Operand format of a matrix product."""


@dataclass(frozen=True)
class Device:
    """One kind of GPU in the kind of machine it usually stands in. Units and sources: devices.toml."""

    name: str
    generation: str
    peak: dict[str, float]
    memory_gib: float
    hbm: float
    link: float
    domain: int
    network: float
    node: int
    watts: float
    host_watts: float
    sms: int
    source: str
    match: tuple[str, ...]
    power_share: float = 1.0

    @property
    def clock(self) -> float:
        """Clock under a power limit, of the full clock: its root, between the third (voltage follows) and none."""
        return self.power_share**0.5


@cache
def devices() -> dict[str, Device]:
    """Every device of the data file, by its short name."""
    table = tomllib.loads((Path(__file__).parent / "devices.toml").read_text())
    return {name: Device(name=name, **(entry | {"match": tuple(entry["match"])})) for name, entry in table.items()}


def find_device(name: str) -> Device | None:
    """The device meant by a name as people write it; None if none is."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    hits = [(len(part), device) for device in devices().values() for part in device.match if part in plain]
    return max(hits, key=lambda hit: hit[0])[1] if hits else None


def device_named(name: str) -> Device:
    """Like `find_device`. RecipeError lists the devices where none is meant."""
    device = find_device(name)
    if device is None:
        raise RecipeError(f"--device {name}: no such device is known. Use one of {', '.join(devices())}.")
    return device
