"""`stratum doctor --deep`: products, memory, disk, all-reduce and clock of this node, in a minute (train.resilience.node_check).

The checks need torch, so they run in processes of their own: a check that hangs or dies is a finding, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from launch.doctor.machine import SETUP, Finding, Machine

if TYPE_CHECKING:
    from pathlib import Path

BUDGET_S = 60.0
_MODULE = "train.resilience.node_check"


def deep(machine: Machine, *, folder: Path, budget_s: float = BUDGET_S) -> list[Finding]:
    """The findings of the deep checks; one if they cannot run, or do not end in time. folder: where runs will be stored."""
    cards = (machine.run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()
    processes = len(cards) or min(2, os.cpu_count() or 1)
    command = [sys.executable, "-P", "-m", _MODULE, str(folder)]
    ranks: list[subprocess.Popen[str]] = []
    from launch.local.ports import reserved_port  # not readable by the oldest Pythons that this room supports

    with reserved_port() as port:
        variables = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if sys.platform == "linux":
            variables["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(processes):
            out = subprocess.DEVNULL if rank else subprocess.PIPE
            variables["RANK"] = str(rank)
            environment = {**os.environ, **variables}
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=out, text=True, errors="replace")
            )
        try:
            output, errors = ranks[0].communicate(timeout=budget_s)
        except subprocess.TimeoutExpired:
            text = f"no end after {budget_s:g} s"
            remedy = "a device, the disk or the network hangs: leave the node out"
            return [Finding("deep checks", "deep checks", "wrong", text, remedy)]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    try:
        return [Finding("deep checks", **one) for one in json.loads(output)]
    except (ValueError, TypeError):
        last = (errors.strip().splitlines() or ["no output"])[-1]
        remedy = SETUP if "No module named" in last else "run it by hand: " + " ".join(command[1:])
        return [Finding("deep checks", "deep checks", "wrong", f"status {ranks[0].returncode}: {last[:200]}", remedy)]
