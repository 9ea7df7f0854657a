"""`stratum doctor`: is this machine ready? Each line is ok, absent or wrong, with what to do about it.

It checks Python, the project's packages against their pinned versions, GPUs and driver, CUDA and NCCL, compilers, disk,
memory, shared memory, limits, fabric and Slurm. It needs only Python (3.8 or newer, so that it can say that a newer one is
needed): run it before anything is installed (`python3 -m launch.doctor`), and on every node of a cluster before the first job.

The checks for GPU machines (`launch/doctor/gpu.py`) have **not been run on one**.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data.system.node import node_name
from launch.doctor.deep import deep
from launch.doctor.gpu import ON_GPU, cuda, fabric, gpus
from launch.doctor.machine import ELSEWHERE, SETUP, Finding, Machine, package, pins, project_file
from recipes.schema import units
from recipes.schema.terminal import fitted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

_INTERFACE = (
    "for gloo on several nodes, torchrun needs GLOO_SOCKET_IFNAME=NAME (`ip -brief address`); `launch slurm` sets it"
)
_MARKS = {"ok": "\033[32m", "absent": "\033[33m", "wrong": "\033[1;31m"}
"""Colours of the states."""
_FILE_WIDTH = 200
_ALIGNED = 100
"""Columns from which names and findings are aligned: a finding then has about 60."""
FIXED = ("torch", "megatron-core", "hydra-core", "datasets", "wandb")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One message without control characters. `recipes` has more, but needs what may not be installed yet."""
        sys.stderr.write("error: " + repr(message)[1:-1] + "\n")
        raise SystemExit(2)


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum doctor`. -> 0 if nothing is wrong, 1 if something will fail."""
    parser = _Parser(
        prog="stratum doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Is this machine ready to train? Needs nothing but Python.",
        epilog="""examples:
  stratum doctor                                      this machine as it is
  stratum doctor --gpu --json                         what training on GPUs needs, for scripts
  stratum doctor --qualify                            tests and speed of this machine's GPUs, 40 minutes, a report to send
  stratum doctor --qualify --dry-run                  the schedule of that
  srun --ntasks-per-node=1 stratum doctor --deep      every node of an allocation; a failing one prints its name

Before anything is installed, in a checkout: python3 -m launch.doctor
Exit status: 0 nothing is wrong; 1 something will fail. `absent` is fine for what you do not use.""",
    )
    parser.add_argument("--gpu", action="store_true", help="also require what training on GPUs needs")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will be stored (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--deep", action="store_true", help="also compute, copy, write and sum for up to a minute")
    parser.add_argument(
        "--qualify", action="store_true", help="test the GPUs and measure training steps (needs the packages)"
    )
    parser.add_argument("--dry-run", action="store_true", help="with --qualify: print the schedule")
    parser.add_argument("--rehearse", action="store_true", help="with --qualify: the same path on a CPU, small shapes")
    parser.add_argument("--minutes", type=float, default=40.0, help="with --qualify: budget (default: 40)")
    own = parser.parse_args(list(arguments))
    if own.qualify:
        return _qualify(own)
    if own.dry_run or own.rehearse:
        parser.error("--dry-run and --rehearse belong to --qualify. Add it.")
    machine = Machine()
    findings = [_needed(one) if own.gpu else one for one in look(machine, folder=own.folder)]
    findings += deep(machine, folder=own.folder) if own.deep else []
    wrong = [one for one in findings if one.state == "wrong"]
    if own.json:
        sys.stdout.write(
            json.dumps({"node": node_name(), "ready": not wrong, "findings": [asdict(one) for one in findings]}) + "\n"
        )
    else:
        text = fitted(report(findings, columns=shutil.get_terminal_size((_FILE_WIDTH, 24)).columns), sys.stdout)
        sys.stdout.write(colored(text) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text)
        if wrong:
            sys.stdout.write(f"{node_name()} is not ready: {', '.join(one.what for one in wrong)}.\n")
    return 1 if wrong else 0


def _qualify(own: argparse.Namespace) -> int:
    """Run, or print, the schedule. -> 1 if a piece failed or had no time, or if there is no GPU to test."""
    # Start-up: the rest of doctor runs before any package is installed; these need optional ones.
    from launch.doctor import qualify
    from launch.doctor.qualify_report import Reporter  # likewise

    folder = (own.folder / f"qualify-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    options = qualify.options_of(folder, budget_minutes=own.minutes, rehearse=own.rehearse)
    if own.dry_run:
        sys.stdout.write(qualify.dry_run(options))
        return 0
    if not options.gpus and not options.rehearse:
        sys.stderr.write(
            "error: no GPU can be used (nvidia-smi, CUDA_VISIBLE_DEVICES). Run `stratum doctor`, or add --rehearse for a CPU "
            "rehearsal.\n"
        )
        return 1
    results = qualify.run(qualify.schedule(options), options, Reporter(options))
    sys.stdout.write((folder / "report.md").read_text(encoding="utf-8") + f"\nTo send back: {folder}\n")
    return 1 if any(one.state in ("failed", "out of time", "not started") for one in results) else 0


def look(machine: Machine, *, folder: Path) -> list[Finding]:
    """All findings. folder: where runs will be stored."""
    cards = list(gpus(machine))
    has_gpu = any(one.state == "ok" for one in cards)
    return [
        *_python(machine),
        *_packages(machine),
        *cards,
        *cuda(machine, has_gpu=has_gpu),
        *_system(machine, folder=folder, has_gpu=has_gpu),
        *fabric(machine, has_gpu=has_gpu),
        *_cluster(machine),
    ]


def report(findings: list[Finding], *, columns: int = _FILE_WIDTH) -> str:
    """Findings as aligned lines, by topic. columns: of the terminal; a narrow one gets no column of names."""
    width = max(len(one.what) for one in findings) if columns >= _ALIGNED else 0
    lines: list[str] = []
    topic = ""
    for one in findings:
        if one.topic != topic:
            topic = one.topic
            lines.append(f"\n{topic}" if lines else topic)
        lines.append(f"  {one.state:7} {one.what:{width}}{'  ' if width else ': '}{one.found}")
        if one.remedy:
            lines.append(f"  {'':7} {'':{width}}{'  ' if width else ''}-> {one.remedy}")
    counts = {state: sum(one.state == state for one in findings) for state in _MARKS}
    lines.append(f"\n{counts['ok']} ok, {counts['absent']} absent, {counts['wrong']} wrong.")
    return "\n".join(lines) + "\n"


def colored(text: str) -> str:
    """The report with each state in its colour."""
    return re.sub(
        rf"^  ({'|'.join(_MARKS)})(?= )",
        lambda found: f"  {_MARKS[found[1]]}{found[1]}\033[0m",
        text,
        flags=re.MULTILINE,
    )


def _needed(one: Finding) -> Finding:
    """A finding on a machine that must train on GPUs: absent becomes wrong for GPU and CUDA."""
    if one.state == "absent" and one.topic in ("GPU", "CUDA"):
        return Finding(one.topic, one.what, "wrong", one.found, one.remedy)
    return one


def _python(machine: Machine) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    text = project_file(machine, "pyproject.toml")
    found = re.search(r"requires-python\s*=\s*\">=3\.(\d+),<3\.(\d+)\"", text)
    low, high = (int(found[1]), int(found[2])) if found else (12, 14)
    good = (3, low) <= sys.version_info[:2] < (3, high)
    yield Finding(
        "Python", "Python", "ok" if good else "wrong", f"{version} ({sys.executable})",
        "" if good else f"3.{low} to 3.{high - 1} is needed; `make setup` finds one or says how to get it",
    )  # fmt: skip
    if not (machine.project / "pyproject.toml").is_file():
        yield Finding("Python", "environment", "ok", f"installed as a package in {sys.prefix}")
        return
    environment = machine.project / ".venv"
    made = (environment / ".stratum-installed").is_file()
    inside = Path(sys.prefix).resolve() == environment.resolve()
    yield Finding(
        "Python", "environment", "ok" if made or inside else "absent",
        (".venv" + ("" if inside else " (not the Python that runs this; the packages below are those of .venv)"))
        if made or inside else "no finished .venv",
        "" if made or inside else SETUP,
    )  # fmt: skip


def _packages(machine: Machine) -> Iterator[Finding]:
    pinned = pins(machine)
    have = machine.packages()
    for name in FIXED:
        yield package("packages", name, pinned.get(name), have.get(name), missing="wrong")
    rest = {name: pin for name, pin in pinned.items() if name not in (*FIXED, *ON_GPU)}
    other = [f"{name} {have[name]} (pinned {pin})" for name, pin in rest.items() if name in have and have[name] != pin]
    lacking = [name for name in rest if name not in have and sys.platform in ELSEWHERE.get(name, (sys.platform,))]
    if len(lacking) == len(rest):
        return
    yield Finding(
        "packages", f"{len(rest)} others", "absent" if other or lacking else "ok",
        "; ".join(filter(None, [
            f"{len(other)} in another version: {', '.join(other[:3])}" if other else "",
            f"{len(lacking)} missing: {', '.join(lacking[:5])}" if lacking else "",
        ])) or "all as pinned in constraints.txt",
        SETUP + ": it installs what was tested" if other or lacking else "",
    )  # fmt: skip


def _system(machine: Machine, *, folder: Path, has_gpu: bool) -> Iterator[Finding]:
    compiler = next((name for name in (os.environ.get("CC", "cc"), "gcc", "clang") if shutil.which(name)), None)
    # Triton compiles a small C file for each kernel that it starts: mamba-ssm's and FlexAttention's need it.
    without = (
        "none: Triton's kernels cannot start" if has_gpu else "none: plain torch is used, several times slower on a CPU"
    )
    yield Finding(
        "machine", "C compiler", "ok" if compiler else "wrong" if has_gpu else "absent", compiler or without,
        "" if compiler else "install gcc, or set CC",
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("machine", "processors", "ok", f"{cores} for this process")
    memory = _memory(machine)
    if memory is not None:
        yield Finding(
            "machine", "memory", "ok" if memory > 7.5 * units.GIB else "absent", units.gib(memory),
            "" if memory > 7.5 * units.GIB else "the smoke recipe and its tests need 8 GiB",
        )  # fmt: skip
    place = folder
    while not os.path.exists(place) and place != place.parent:  # a name that is too long does not exist either
        place = place.parent
    usage = shutil.disk_usage(place)
    enough = usage.free > 20e9
    yield Finding(
        "machine", "disk", "ok" if enough else "wrong" if usage.free < 1e9 else "absent",
        f"{units.size(usage.free)} free for {folder}",
        "" if enough else "a checkpoint has 14 bytes per parameter (bf16) and two are kept: free some space, or set run.folder",
    )  # fmt: skip
    writable = os.access(place, os.W_OK)
    if not writable:
        yield Finding(
            "machine", "run folder", "wrong", f"{place} cannot be written", "set run.folder, or make it writable"
        )
    shared = machine.root / "dev/shm"
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        yield Finding(
            "machine", "shared memory", "ok" if size >= units.GIB else "wrong", f"{units.gib(size)} in /dev/shm",
            "" if size >= units.GIB else "NCCL needs more: start the container with --ipc=host or --shm-size=16g",
        )  # fmt: skip
    yield from _limits(machine)
    try:
        address = socket.gethostbyname(socket.gethostname())
        is_loopback = address.startswith("127.")
        yield Finding(
            "machine", "own name", "absent" if is_loopback else "ok", f"{socket.gethostname()} is {address}",
            _INTERFACE if is_loopback else "",
        )  # fmt: skip
    except OSError:
        yield Finding(
            "machine", "own name", "wrong", f"{socket.gethostname()} has no address",
            f"other nodes cannot find this one: add it to /etc/hosts or DNS. {_INTERFACE}",
        )  # fmt: skip


def _limits(machine: Machine) -> Iterator[Finding]:
    try:
        import resource  # not on every system
    except ImportError:
        return
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    yield Finding(
        "machine", "open files", "ok" if unlimited or files >= 4096 else "absent", "unlimited" if unlimited else f"{files:,}",
        "" if unlimited or files >= 4096 else "many ranks and shards may need more: ulimit -n 65536",
    )  # fmt: skip
    if list((machine.root / "sys/class/infiniband").glob("*")):
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        good = locked == resource.RLIM_INFINITY
        yield Finding(
            "machine", "locked memory", "ok" if good else "wrong", "unlimited" if good else f"{locked:,} bytes",
            "" if good else "RDMA cannot register buffers: ulimit -l unlimited; in Slurm: PropagateResourceLimitsExcept=MEMLOCK",
        )  # fmt: skip


def _cluster(machine: Machine) -> Iterator[Finding]:
    slurm = machine.run("sbatch", "--version")
    without = "sbatch finds no cluster (no slurm.conf)" if shutil.which("sbatch") else "no sbatch here"
    yield Finding(
        "cluster", "Slurm", "ok" if slurm else "absent", slurm or f"{without}: `stratum launch local` and torchrun work"
    )
    containers = [name for name in ("enroot", "apptainer", "singularity", "docker", "podman") if shutil.which(name)]
    if containers:
        yield Finding("cluster", "containers", "ok", ", ".join(containers))


def _memory(machine: Machine) -> int | None:
    """Bytes this process may use: the machine's memory, or the limit of its control group."""
    total = re.search(r"MemTotal:\s+(\d+) kB", machine.read("proc/meminfo"))
    if total is None:
        return None
    size = int(total[1]) * 1024
    limit = machine.read("sys/fs/cgroup/memory.max")
    return min(size, int(limit)) if limit.isdigit() else size
