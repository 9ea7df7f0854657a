"""The name of this machine among those of a run, and what tells machines and containers apart."""

import contextlib
import os
import socket
from pathlib import Path


def node_name() -> str:
    """Slurm's name of the node, or the host's name. Several Slurm nodes may be one host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def this_machine() -> str:
    """Identity of this start of the machine and of its process namespace (a container's own); "" if unknown."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        boot += " " + str(Path("/proc/self/ns/pid").readlink())
    return boot
