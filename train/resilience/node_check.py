"""Does this node compute, store and send the right numbers, and fast enough? Seconds for each check; before a run.

    FOLDER, devices --> one process for each device --> findings, as JSON on stdout of rank 0

Products of small integers are exact in every format, so each wrong element is found. Speeds on a GPU are compared with shares of
the data sheet (launch/plan/cost/devices.toml). The shares are assumptions, **not run on a GPU**. `stratum doctor --deep` starts
this.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from launch.plan.cost.device import Device, find_device

_SLOW = 0.5
"""Share of the data sheet's figure below which a device is called wrong. Large products and copies reach 0.6 to 0.9."""
_UNEQUAL = 0.8
"""Share of the median of the node's GPUs below which one of them is called wrong."""
_DISK_BYTES = 64 << 20
_CLOCK_S = 5.0
"""Largest difference of this node's clock and the file server's."""
_SET_S = 0.2
"""Largest jump of the clock during the checks."""
_TIMEOUT_S = 45.0
"""For the all-reduce, less than the budget of `stratum doctor --deep`."""


@dataclass(frozen=True)
class Checked:
    """One result."""

    what: str
    state: Literal["ok", "absent", "wrong"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Speed:
    """What a device's process found: wrong numbers, and its rate per second."""

    wrong: int
    rate: float


def product(
    device: torch.device, *, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mm
) -> Speed:
    """Multiply matrices of -1, 0 and 1 (one of eight is not 0), whose products are exact also in bf16.

    -> rows with a wrong element, by Freivalds's check in float64 on the CPU, and FLOP/s. multiply: a test gives another product.
    """
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randint(0, 16, (size, size), generator=generator) for _ in range(2)]
    left, right = ((draw == 0).double() - (draw == 1).double() for draw in draws)
    signs = torch.randint(0, 2, (size, 4), generator=generator).double() * 2 - 1
    expected = left @ (right @ signs)
    here, there = left.to(device, dtype), right.to(device, dtype)
    times, wrong = [], torch.zeros(size, dtype=torch.bool)
    for _ in range(3):
        _finish(device)
        begun = time.perf_counter()
        found = multiply(here, there)
        _finish(device)
        times.append(time.perf_counter() - begun)
        wrong |= (found.cpu().double() @ signs != expected).any(1)
    return Speed(int(wrong.sum()), 2 * size**3 / min(times))


def memory(device: torch.device, *, size: int, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Speed:
    """Fill `size` bytes with random words, copy them, and compare both with the words. -> wrong words, bytes/s of the copy."""
    words = torch.randint(-(2**62), 2**62, (1 << 17,), generator=torch.Generator().manual_seed(2))
    block, wrong, seconds, count = words.to(device), 0, 0.0, max(1, size // (2 * words.nbytes))
    filled = block.repeat(count)
    _finish(device)
    begun = time.perf_counter()
    copied = copy(filled)
    _finish(device)
    seconds = time.perf_counter() - begun
    for tensor in (filled, copied):
        wrong += sum(int((part != block).sum()) for part in tensor.split(len(words)))
    return Speed(wrong, 2 * filled.nbytes / seconds)


def disk(folder: Path) -> Checked:
    """Write a file, drop it from the page cache, and read it back. No name: nodes share the folder, and a check may be killed."""
    content = os.urandom(1 << 20) * (_DISK_BYTES >> 20)
    remedy = "look at dmesg and the file system, or set run.folder to another one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            begun = time.perf_counter()
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            written, begun = time.perf_counter() - begun, time.perf_counter()
            stream.seek(0)
            is_same = stream.read() == content
            read = time.perf_counter() - begun
    except OSError as error:
        return Checked("disk", "wrong", f"{folder}: {error.strerror}", remedy)
    text = f"{_DISK_BYTES / written / 1e6:,.0f} MB/s written, {_DISK_BYTES / read / 1e6:,.0f} MB/s read in {folder}"
    return (
        Checked("disk", "ok", text) if is_same else Checked("disk", "wrong", f"{text}; other bytes came back", remedy)
    )


def clock(folder: Path, *, ticked_s: float, passed_s: float) -> Checked:
    """Compare this node's clock with the file server's, and its progress with the monotonic clock's. ticked_s, passed_s: of both
    since the start of the checks."""
    before = time.time()
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            server = os.fstat(stream.fileno()).st_mtime
    except OSError as error:
        return Checked("clock", "wrong", f"{folder}: {error.strerror}", "set run.folder, or make it writable")
    away = max(before - server, server - time.time(), 0.0)
    text = f"{away:.2f} s from the file server's, {abs(ticked_s - passed_s):.3f} s from the monotonic clock"
    if away > _CLOCK_S or abs(ticked_s - passed_s) > _SET_S:
        return Checked(
            "clock", "wrong", text, "start the time service (chronyc tracking); logs and booked time need it"
        )
    return Checked("clock", "ok", text)


def all_reduce(device: torch.device) -> Speed:
    """Sum small integers over all processes. Collective. -> wrong elements, bytes/s that each process sends."""
    world, rank = dist.get_world_size(), dist.get_rank()
    count = (256 << 20 if device.type == "cuda" else 16 << 20) // 4
    begun, wrong = 0.0, 0
    for _ in range(2):  # the first one connects
        tensor = torch.full((count,), float(rank + 1), device=device)
        _finish(device)
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        _finish(device)
        seconds = time.perf_counter() - begun
        wrong += int((tensor != world * (world + 1) / 2).sum())
    return Speed(wrong, 2 * (world - 1) / world * 4 * count / seconds)


def judged(what: str, speeds: list[Speed], *, unit: str, expected: float | None) -> Checked:
    """The line of all devices. expected: the rate by the data sheet; None for a device without one, whose rate is only shown."""
    scale = {"FLOP/s": (1e12, "TFLOP/s"), "B/s": (1e9, "GB/s")}[unit]
    slowest, middle = min(speeds, key=lambda one: one.rate), statistics.median(one.rate for one in speeds)
    text = f"{slowest.rate / scale[0]:,.3g} {scale[1]}" + (f", the slowest of {len(speeds)}" if len(speeds) > 1 else "")
    bad = [str(index) for index, one in enumerate(speeds) if one.wrong]
    if bad:
        return Checked(what, "wrong", f"wrong numbers from device {', '.join(bad)}", "take the node out of service")
    if expected is not None:
        text += f" ({slowest.rate / expected:.0%} of the data sheet)"
        slow = [str(i) for i, one in enumerate(speeds) if one.rate < max(_SLOW * expected, _UNEQUAL * middle)]
        if slow:
            remedy = "look for power or heat limits (nvidia-smi -q -d PERFORMANCE) and other processes"
            return Checked(what, "wrong", f"device {', '.join(slow)}: {text}", remedy)
    return Checked(what, "ok", text)


def check_node(folder: Path, *, rank: int, processes: int) -> list[Checked]:
    """All checks. Collective over the node's processes; the results are complete on rank 0."""
    ticked, passed = time.time(), time.monotonic()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    known: Device | None = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        known = find_device(torch.cuda.get_device_name(device))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=_TIMEOUT_S))
    try:
        size = int(0.8 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else (256 << 20) // processes
        mine = [product(device), memory(device, size=size), all_reduce(device)]
        gathered: list[list[Speed]] = [[] for _ in range(processes)]
        dist.all_gather_object(gathered, mine)
        if rank:
            return []
        products, copies, sums = ([own[index] for own in gathered] for index in range(3))
        found = [
            judged("products", products, unit="FLOP/s", expected=known.peak.get("bf16") if known else None),
            judged("memory", copies, unit="B/s", expected=known.hbm if known else None),
            disk(folder),
        ]
        if processes > 1:
            found.append(judged("all-reduce", sums, unit="B/s", expected=known.link if known else None))
        else:
            found.append(Checked("all-reduce", "absent", "one process: nothing to sum"))
        return [*found, clock(folder, ticked_s=time.time() - ticked, passed_s=time.monotonic() - passed)]
    finally:
        dist.destroy_process_group()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Entry point of each process, with torchrun's variables. -> 1 if a check is wrong."""
    found = check_node(Path(sys.argv[1]), rank=int(os.environ["RANK"]), processes=int(os.environ["WORLD_SIZE"]))
    if found:
        sys.stdout.write(json.dumps([asdict(one) for one in found]) + "\n")
    return int(any(one.state == "wrong" for one in found))


if __name__ == "__main__":
    sys.exit(main())
