"""A real Slurm of several nodes on this machine, started and stopped by the tests (tests/launch/slurm/slurm_rig.sh)."""

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "launch" / "slurm" / "slurm_rig.sh"


def reason_to_skip() -> str | None:
    """Why Slurm cannot be started here; None if it can. With STRATUM_TEST_SLURM=required always None."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(name) is None]
    if missing and os.environ.get("STRATUM_TEST_SLURM") != "required":
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    return None


@contextmanager
def slurm_rig(nodes: int) -> Iterator[Path]:
    """A running cluster; Slurm's commands find it by $SLURM_CONF while the context is open. -> its folder."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    with _reserved_ports(30 + nodes) as port:
        yield from _cluster(nodes, port)


def _cluster(nodes: int, port: int) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {**os.environ, "SLURM_RIG": str(folder), "SLURM_RIG_PORT": str(port)}
    environment["SLURM_RIG_OWNER"] = str(os.getpid())
    conf = str(folder / "etc" / "slurm.conf")  # named in every command: the machine may belong to another cluster
    try:
        subprocess.run(["bash", str(SCRIPT), "start", str(nodes)], env=environment, check=True, timeout=300)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", conf)
            yield folder
    finally:
        ours = {**environment, "SLURM_CONF": conf}
        subprocess.run(["scancel", "--user", str(os.getuid())], env=ours, check=False, capture_output=True)
        subprocess.run(["bash", str(SCRIPT), "stop"], env=environment, check=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for[T](ask: Callable[[], T], *, timeout_s: float = 300.0) -> T:
    """The first true result of `ask`, which is called four times a second."""
    deadline = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"Slurm did not reach the expected state within {timeout_s:g} s"
        time.sleep(0.25)
    return answer


@contextmanager
def _reserved_ports(count: int) -> Iterator[int]:
    """The first of `count` consecutive free ports, reserved against other clusters of these tests while the context is open,
    because two that start together would both find them free. Reserved by an abstract Unix socket, as in `launch.local.ports`."""
    for first in random.SystemRandom().sample(range(16800, 19800, 100), 30):
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0stratum-slurm-{first}")
            except OSError:
                continue
            if all(_is_free(port) for port in range(first, first + count)):
                yield first
                return
    raise AssertionError("no free ports between 16800 and 19800")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
