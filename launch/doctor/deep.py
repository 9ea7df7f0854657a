"""`stratum doctor --deep`: products, memory, disk, all-reduce and clock of this node, in a minute (train.resilience.node_check).

The checks need torch, so they run in processes of their own: a check that hangs or dies is a finding, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from launch.doctor.gpu import visible_gpus
from launch.doctor.machine import SETUP, Finding, Machine

if TYPE_CHECKING:
    from pathlib import Path

BUDGET_S = 60.0
_MODULE = "train.resilience.node_check"


def deep(machine: Machine, *, folder: Path, budget_s: float = BUDGET_S) -> list[Finding]:
    """The findings of the deep checks; one if they cannot run, or do not end in time. folder: where runs will be stored."""
    processes = visible_gpus(machine) or min(2, os.cpu_count() or 1)
    command = [sys.executable, "-P", "-m", _MODULE, str(folder)]
    ranks: list[subprocess.Popen[str]] = []
    from launch.local.ports import reserved_port  # not readable by the oldest Pythons that this room supports

    with contextlib.ExitStack() as stack:
        output, *errors = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(processes + 1)
        ]
        variables = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(stack.enter_context(reserved_port())),
        }
        if sys.platform == "linux":
            variables["GLOO_SOCKET_IFNAME"] = "lo"
        ends = time.monotonic() + budget_s
        try:
            for rank in range(processes):
                environment = {**os.environ, **variables, "RANK": str(rank)}
                out = subprocess.DEVNULL if rank else output
                ranks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=errors[rank], text=True))
            # Rank 0 would wait for a process that died.
            while ranks[0].poll() is None and not any(process.poll() for process in ranks) and time.monotonic() < ends:
                time.sleep(0.05)
            states = [process.poll() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        output.seek(0)
        try:
            return [Finding("deep checks", **one) for one in json.loads(output.read())]
        except (ValueError, TypeError):
            pass
        if not any(states):
            text = f"no end after {budget_s:g} s"
            remedy = "a device, the disk or the network hangs: leave the node out"
            return [Finding("deep checks", "deep checks", "wrong", text, remedy)]
        first = max(
            rank for rank, state in enumerate(states) if state
        )  # not rank 0, if it may only have lost another one
        errors[first].seek(0)
        last = (errors[first].read().strip().splitlines() or ["no output"])[-1]
        remedy = SETUP if "No module named" in last else "run it by hand: " + " ".join(command[1:])
        text = f"device {first}, status {states[first]}: {last[:200]}"
        return [Finding("deep checks", "deep checks", "wrong", text, remedy)]
