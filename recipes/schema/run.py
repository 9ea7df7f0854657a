"""Fields of the `run` group: name, length and size of a step.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, PositiveInt, Seed


@dataclass(frozen=True)
class RunConfig:
    """What one run is called, how long it lasts, and how big a step is."""

    name: str
    """Name of the run: its files are in `folder`/`name`. Letters, digits, blanks and signs; `/` makes a folder in a folder."""
    steps: PositiveInt
    """Optimizer steps to train in all (a resumed run counts the steps before it)."""
    folder: str = "runs"
    """Folder of all runs."""
    seed: Seed = 1234
    """Seed of the initial weights. The data order has its own, `data.seed`."""
    global_rows: PositiveInt = 8
    """Rows in one optimizer step, over all ranks. Independent of the layout, so is the training."""
    microbatch_rows: PositiveInt = 8
    """Rows one rank runs at once; `global_rows` = microbatch_rows x data-parallel size x accumulation."""
    deterministic: bool = True
    """Use deterministic algorithms, so that a resumed run repeats the same bits. On a GPU this costs some speed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    threads: Count = 0
    """CPU threads of a process; 0 shares the machine's cores among the processes on it."""
    stop_after_steps: PositiveInt | None = None
    """Stop (with a checkpoint) after this many steps of this process; null runs to `steps`. For time-sliced machines."""
    start_from: str | None = None
    """Checkpoint (or run folder: its newest) whose weights a new run begins with; optimizer, step and data start from zero. A
    pruned model is trained further this way. Read only while the run has no checkpoint of its own."""
