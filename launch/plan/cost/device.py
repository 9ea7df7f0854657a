"""GPUs: peaks, memory, bandwidths, power. `devices.toml` is the only table of devices; the trainer's MFU uses the same peaks.

A device is found by its short name, or by any name that contains its words: `h100`, `DGX-H100`, `NVIDIA H100 80GB HBM3`,
`nvidia_h100_80gb`. Only whole words count: `h1000` is not an H100.
"""

import difflib
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
    """One kind of GPU in its usual machine. Units and sources: devices.toml."""

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
        """Share of the full clock under a power limit: the square root of the power share."""
        return self.power_share**0.5


_SMALLER_VARIANTS = {"mig", "laptop", "d"}
"""Words in names of smaller variants: a slice of a GPU (MIG), a laptop GPU, the RTX 4090 D."""


@cache
def devices() -> dict[str, Device]:
    """Every device of the data file, by its short name."""
    table = tomllib.loads((Path(__file__).parent / "devices.toml").read_text())
    return {name: Device(name=name, **(entry | {"match": tuple(entry["match"])})) for name, entry in table.items()}


def find_device(name: str) -> Device | None:
    """The device with this name; None if it is not in the table, or is a slice or a smaller variant of a device."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & _SMALLER_VARIANTS:
        return None
    matches = [(set(entry.split()), device) for device in devices().values() for entry in device.match]
    hits = [(len(entry), device) for entry, device in matches if entry <= words]
    return max(hits, key=lambda hit: hit[0])[1] if hits else None


def device_named(name: str) -> Device:
    """The device with this name. Raises RecipeError with similar names and the list of devices if there is none."""
    device = find_device(name)
    if device is None:
        plain = "_".join(re.findall(r"[a-z0-9]+", name.lower()))
        near = difflib.get_close_matches(plain, devices(), n=3)
        raise RecipeError(
            f"--device {name}: this device is not in the table."
            + (f" Did you mean {' or '.join(near)}?" if near else "")
            + f" Known devices: {', '.join(devices())}."
        )
    return device
