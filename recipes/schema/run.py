"""Fields of the `run` group: name, length and size of a step.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, PositiveInt, Seed


@dataclass(frozen=True)
class RunConfig:
    """Name and length of a run, and the size of a step."""

    name: str
    """Name of the run, whose files are in `folder`/`name`. Letters, digits, blanks and signs; `/` makes nested folders."""
    steps: PositiveInt
    """Total number of optimizer steps (a resumed run counts its earlier steps)."""
    folder: str = "runs"
    """Folder of all runs."""
    seed: Seed = 1234
    """Seed of the initial weights. The data order has its own seed, `data.seed`."""
    global_rows: PositiveInt = 8
    """Rows in one optimizer step, over all ranks. It does not depend on the layout, so training does not either."""
    microbatch_rows: PositiveInt = 8
    """Rows that one rank processes at once; `global_rows` = microbatch_rows x data-parallel size x accumulation."""
    deterministic: bool = True
    """Use deterministic algorithms, so that a resumed run repeats the same bits. On a GPU this costs some speed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    threads: Count = 0
    """CPU threads of a process; 0: divide the machine's cores among the processes on it."""
    stop_after_steps: PositiveInt | None = None
    """Stop, with a checkpoint, after this many steps of this process; null: train to `steps`. For machines with time slices."""
    start_from: str | None = None
    """Checkpoint folder, or run folder (its newest checkpoint), whose weights a new run starts with. Optimizer, step and data
    start from zero. Used to train a pruned model further. Ignored once the run has a checkpoint of its own."""
