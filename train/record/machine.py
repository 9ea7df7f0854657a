"""Description of a run's machine, its peak FLOP/s, and peak memory use."""

import math
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.plan.cost.device import find_device
from train.native.gemm import multiply


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device, FLOP/s. GPU: published bf16 peak by name (None if unknown). CPU: measured in fp32 (0.2 s), for all
    threads of this process together.
    """
    if device.type == "cuda":
        return peak_by_name(torch.cuda.get_device_name(device))
    size = 1024
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        multiply(square, square)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_by_name(name: str) -> float | None:
    """Dense bf16 peak of a GPU by its driver's name for it, FLOP/s; None if it is not in `launch/plan/cost/devices.toml`."""
    device = find_device(name)
    return device.peak["bf16"] if device is not None else None


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "time": time.time(),
    }


def _cpu_name() -> str:
    """The processor's name on Linux, elsewhere its architecture."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated by torch on a GPU, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
