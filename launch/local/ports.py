"""Reserves a rendezvous port for a run, so that two runs on one machine never use the same port.

A port found by binding to port 0 and closing the socket may be taken before rank 0 listens on it: the kernel also gives these
ports to outgoing connections, and gloo opens dozens. So the port is below that range. A name in Linux's abstract socket space,
bound as long as the run lasts, reserves it against other runs. This leaves no file to clean up: the kernel frees the name when
the process dies. Slurm jobs use 20000 to 31999 (launch/slurm/job_script.py).
"""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

PORTS = range(32000, 32768)
"""Above the ports of Slurm's jobs, below the first that Linux gives to outgoing connections by default."""


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of this machine. No other caller gets it while the context is open, here or in a process forked inside it.

    Raises OSError if all ports are taken.
    """
    port, claim = _claim()
    with claim:
        yield port


def _claim() -> tuple[int, socket.socket]:
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0stratum-port-{port}")
            with socket.socket() as probe:
                probe.bind(("", port))
            return port, claim
        except OSError:  # another run has reserved it, or a process listens on it
            claim.close()
    raise OSError(f"no free port from {PORTS[0]} to {PORTS[-1]}: end some of the runs on this machine")
