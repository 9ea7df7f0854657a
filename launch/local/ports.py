"""Ports that two worlds on one machine never share.

A port found by binding to port 0 and closing the socket may be taken before rank 0 listens on it: the kernel gives such
numbers to every outgoing connection, and gloo opens dozens. So a port is chosen below that range, and a name in Linux's
abstract socket space, bound as long as the world runs, reserves it against other worlds: there is no file to clean up, and the
kernel frees the name when the process dies. Slurm jobs use 20000 to 31999 (launch/slurm/job_script.py).
"""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

PORTS = range(32000, 32768)
"""Above the ports of Slurm's jobs, below the first that Linux gives to outgoing connections by default."""


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this machine on which nobody listens. No other caller gets it while the context is open, here or in a process
    forked inside it.

    Raises OSError if all are taken.
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
        except OSError:  # another world has it, or some process listens there
            claim.close()
    raise OSError(f"no free port from {PORTS[0]} to {PORTS[-1]}: end some of the runs on this machine")
