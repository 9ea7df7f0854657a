"""The name of this machine among those of a run."""

import os
import socket


def node_name() -> str:
    """Slurm's name of the node, or the host's name. Several Slurm nodes may be one host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
