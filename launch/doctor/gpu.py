"""GPUs, driver, CUDA and fabric, for `stratum doctor`. Written from NVIDIA's documentation; **not run on a GPU**."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from launch.doctor.machine import SETUP, Finding, Machine, package, pins
from recipes.schema import units

if TYPE_CHECKING:
    from collections.abc import Iterator

ON_GPU = ("transformer-engine", "mamba-ssm", "causal-conv1d")
DRIVERS = {"13": (580, 0), "12": (525, 60)}
"""Oldest driver for each major version of CUDA (CUDA Compatibility guide, minor version compatibility)."""
_GPU_FIELDS = (
    "name",
    "memory.total",
    "driver_version",
    "compute_cap",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
)


def visible_gpus(machine: Machine) -> int:
    """Number of GPUs that a process started here can use: the driver's, or those that CUDA_VISIBLE_DEVICES leaves of them."""
    listed = len((machine.run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return listed
    return min(listed, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def gpus(machine: Machine) -> Iterator[Finding]:
    """The GPUs: kinds, formats, memory errors."""
    text = machine.run("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    if not text:
        has_card = any(
            machine.read(str(path.relative_to(machine.root))) == "0x10de"
            for path in (machine.root / "sys/bus/pci/devices").glob("*/vendor")
        )
        why = "an NVIDIA card, but no working driver" if has_card else "none: training runs on the CPU"
        remedy = "install NVIDIA's driver (580 or newer) and, in a container, its container toolkit" if has_card else ""
        yield Finding("GPU", "GPUs", "wrong" if has_card else "absent", why, remedy)
        return
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    kinds = sorted({(row[0], row[1]) for row in rows})
    described = ", ".join(
        f"{sum((row[0], row[1]) == kind for row in rows)} x {kind[0]} ({_gib(kind[1])})" for kind in kinds
    )
    yield Finding(
        "GPU", "GPUs", "ok" if len(kinds) == 1 else "absent", described,
        "" if len(kinds) == 1 else "the slowest and smallest GPU limits all: select equal ones with CUDA_VISIBLE_DEVICES",
    )  # fmt: skip
    capability = min(float(row[3]) for row in rows if row[3].replace(".", "", 1).isdigit()) if rows else 0.0
    formats = "FP8, MXFP8, NVFP4" if capability >= 10 else "FP8" if capability >= 8.9 else "none"
    yield Finding(
        "GPU", "low precision", "ok" if capability >= 8.9 else "absent", f"{formats} (compute capability {capability:g})",
        "" if capability >= 8.9 else "use precision=bf16: FP8 needs Ada, Hopper or Blackwell",
    )  # fmt: skip
    broken = [str(place) for place, row in enumerate(rows) if row[4].isdigit() and int(row[4])]
    if broken:
        yield Finding(
            "GPU", "memory errors", "wrong", f"uncorrectable ECC errors on GPU {', '.join(broken)}",
            "drain the node and reset the GPU; look for Xid in dmesg",
        )  # fmt: skip
    if any(row[5] == "Enabled" for row in rows):
        yield Finding(
            "GPU", "MIG", "absent", "GPUs are cut into instances (MIG)", "turn MIG off to train on several GPUs"
        )


def cuda(machine: Machine, *, has_gpu: bool) -> Iterator[Finding]:
    """The driver compared with torch's CUDA, and the packages that only GPUs need."""
    pinned, have = pins(machine), machine.packages()
    built = machine.torch_cuda()
    driver = machine.run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if built is None:
        yield Finding("CUDA", "torch's CUDA", "absent", "no torch with CUDA is installed", SETUP)
    elif not has_gpu or not driver:
        yield Finding("CUDA", "torch's CUDA", "ok", f"{built} (there is no driver to compare with)")
    else:
        oldest = DRIVERS.get(built.split(".")[0], (0, 0))
        words = driver.splitlines()[0].split(".")
        here = (int(words[0]), int(words[1]) if len(words) > 1 else 0)
        yield Finding(
            "CUDA", "driver", "ok" if here >= oldest else "wrong", f"{driver.splitlines()[0]} for torch's CUDA {built}",
            "" if here >= oldest else f"CUDA {built} needs driver {oldest[0]}.{oldest[1]:02d} or newer",
        )  # fmt: skip
    nccl = next((f"{name} {version}" for name, version in have.items() if name.startswith("nvidia-nccl")), None)
    yield Finding("CUDA", "NCCL", "ok" if nccl else "absent", nccl or "not installed", "" if nccl else SETUP)
    for name in ON_GPU:
        remedy = (
            SETUP
            if has_gpu
            else "nothing to do here: only GPUs use it (`make setup` installs it where nvidia-smi works)"
        )
        yield package("CUDA", name, pinned.get(name), have.get(name), missing="absent", remedy=remedy)
    compiler = machine.run("nvcc", "--version")
    release = re.search(r"release ([\d.]+)", compiler or "")
    yield Finding(
        "CUDA", "nvcc", "ok" if release else "absent", release[1] if release else "not found",
        "" if release else "builds mamba-ssm and causal-conv1d if they have no wheel: install torch's CUDA toolkit",
    )  # fmt: skip


def fabric(machine: Machine, *, has_gpu: bool) -> Iterator[Finding]:
    """RDMA ports, NVLink, GPUDirect."""
    ports = []
    for port in sorted((machine.root / "sys/class/infiniband").glob("*/ports/*")):
        where = str(port.relative_to(machine.root))
        ports.append(
            (f"{port.parent.parent.name}:{port.name}", machine.read(f"{where}/state"), machine.read(f"{where}/rate"))
        )
    active = [(name, rate) for name, state, rate in ports if "ACTIVE" in state]
    down = [name for name, state, _ in ports if "ACTIVE" not in state]
    if ports:
        rates = ", ".join(f"{name} at {rate.split(' (')[0]}" for name, rate in active)
        yield Finding(
            "fabric", "RDMA ports", "ok" if active and not down else "wrong" if not active else "absent",
            (rates or "none active") + (f"; down: {', '.join(down)}" if down else ""),
            "" if not down else "check the cable and `ibstat`, or list the working ports in NCCL_IB_HCA",
        )  # fmt: skip
    else:
        yield Finding("fabric", "RDMA ports", "absent", "none: several nodes would communicate over TCP")
    if not has_gpu:
        return
    topology = machine.run("nvidia-smi", "topo", "-m") or ""
    links = sorted(set(re.findall(r"\bNV(\d+)\b", topology)), key=int)
    several = len(re.findall(r"^GPU\d+", topology, re.MULTILINE)) > 1
    if several:
        yield Finding(
            "fabric", "NVLink", "ok" if links else "absent", f"{'/'.join(links)} links a pair" if links else "none between GPUs",
            "" if links else "parallel.tensor over PCIe is slow: use pipeline and data parallelism, or check the fabric manager",
        )  # fmt: skip
    if ports:
        direct = (machine.root / "sys/module/nvidia_peermem").exists()
        yield Finding(
            "fabric", "GPUDirect RDMA", "ok" if direct else "absent", "nvidia_peermem" + ("" if direct else " is not loaded"),
            "" if direct else "modprobe nvidia_peermem, unless the kernel has DMA-BUF (see the output of NCCL_DEBUG=INFO)",
        )  # fmt: skip


def _gib(mebibytes: str) -> str:
    return units.gib(int(mebibytes) * 2**20) if mebibytes.isdigit() else mebibytes
