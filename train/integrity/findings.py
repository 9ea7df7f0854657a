"""What a check found, in a form that all ranks exchange, and the file of suspects that it ends in."""

import json
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data.system.node import node_name
from recipes.schema.run_folder import SUSPECTS

Kind = Literal["transient", "persistent", "wrong input", "state", "transit"]


@dataclass(frozen=True)
class Finding:
    """A wrong number, and the rank at fault."""

    detector: str
    kind: Kind
    step: int
    """The step that was being computed, counted from 1."""
    ranks: tuple[int, ...]
    """The rank at fault; several if they cannot be told apart."""
    hosts: tuple[str, ...]
    clean_step: int
    """The last step at which this check found nothing. Checkpoints after it may be affected."""
    text: str

    def describe(self) -> str:
        """The finding in one line."""
        who = " or ".join(f"rank {rank} on {host}" for rank, host in zip(self.ranks, self.hosts, strict=True))
        return f"step {self.step}: {who}: {self.text} ({self.kind}, found by {self.detector})"


def host_name() -> str:
    """Name of this machine, as a launcher can exclude it."""
    return node_name()


def odd_ones(values: Sequence[Hashable]) -> list[int] | None:
    """Indices of the values that differ from the majority; None without a majority of at least two, or if all are equal."""
    common, count = Counter(values).most_common(1)[0]
    if count == len(values) or count < 2 or 2 * count <= len(values):
        return None
    return [index for index, value in enumerate(values) if value != common]


def write_suspects(folder: Path, findings: Sequence[Finding]) -> None:
    """Append findings to the run's file of suspects. A full disk must not hide them: the error message names them too."""
    try:
        with (folder / SUSPECTS).open("a") as stream:
            for finding in findings:
                stream.write(json.dumps(asdict(finding) | {"time": time.time()}) + "\n")
    except OSError:
        return
