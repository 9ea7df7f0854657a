"""Fields of `run.memory_copies`: copies of the training state in the memory of nodes.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import Count


@dataclass(frozen=True)
class MemoryCopiesConfig:
    """Copies of the training state in the memory of nodes, for a start without reading storage (docs/resilience.md)."""

    every_steps: Count = 0
    """Copy the state of every rank into memory at every multiple of this step, while training continues. 0, the default: no
    copies, because they need host memory: two copies of a rank's state, and two of its peer's."""
    peer_nodes: Count = 1
    """Send a second copy to the node this many nodes further on, so that a run survives the loss of a node. Use 1, or the number
    of nodes that share a switch or a power supply. 0: no second copy; a run then survives a killed process only. No effect on
    one node."""
    folder: str = "/dev/shm"
    """Folder of the copies on every node, in memory (tmpfs). Only this user can read them. They are removed when the run ends
    without an error."""
