"""Fields of the `run` group: name, length and size of a step.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.fields import Count, PositiveInt, Seed
from recipes.schema.integrity import IntegrityConfig
from recipes.schema.memory_copies import MemoryCopiesConfig
from recipes.schema.spikes import SpikesConfig


@dataclass(frozen=True)
class RunConfig:
    """Name and length of a run, and the size of a step."""

    name: str
    """Name of the run; its files are in `folder`/`name`. Letters, digits, blanks and signs; `/` makes nested folders."""
    steps: PositiveInt
    """Total number of optimizer steps, including those before a resume."""
    folder: str = "runs"
    """Folder of all runs."""
    storage: str | None = None
    """Address of object storage for all runs: `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`. Each new checkpoint is copied to
    `storage`/`name` in the background, with metrics.jsonl and recipe.yaml; a run on an empty machine starts from the newest one
    (docs/storage.md). Needs the extra `storage`. null: the folder only."""
    seed: Seed = 1234
    """Seed of the initial weights. The data order has its own seed, `data.seed`."""
    global_rows: PositiveInt = 8
    """Rows in one optimizer step over all ranks, at any layout."""
    microbatch_rows: PositiveInt = 8
    """Rows that one rank processes at once; `global_rows` = `microbatch_rows` x data-parallel size x accumulation."""
    deterministic: bool = True
    """Use deterministic algorithms, so that a resumed run repeats the same bits. Slower on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if available, otherwise the CPU."""
    threads: Count = 0
    """CPU threads per process; 0: the environment variable OMP_NUM_THREADS, or if it is not set the machine's cores divided among
    its processes. (Under torchrun, which sets OMP_NUM_THREADS=1 by itself, 1 counts as not set.)"""
    stop_after_steps: PositiveInt | None = None
    """Save and stop after this many steps of this process, for machines with time slices; null: train to `steps`."""
    start_from: str | None = None
    """Checkpoint folder, or run folder (its newest checkpoint), whose weights a new run starts with. Optimizer, step and data
    start from zero. Ignored once the run has a checkpoint of its own."""
    profile: str | None = None
    """Steps to profile, such as `100-103`. Each of `profile_ranks` writes a trace for https://ui.perfetto.dev into the run's
    folder, with ranges for layers and phases, and a table of the slowest operations. These steps take longer."""
    profile_ranks: tuple[Count, ...] = (0,)
    """Ranks that write a trace; empty: all."""
    profile_memory: bool = False
    """Also record allocations in the trace; on a GPU also write a memory snapshot for https://pytorch.org/memory_viz."""
    garbage_every_steps: Count = 50
    """Steps between runs of Python's cyclic garbage collector. It does not run in between, because a pause of one rank delays
    all ranks. 0: Python decides."""
    memory_copies: MemoryCopiesConfig = field(default_factory=MemoryCopiesConfig)
    """Copies of the training state in memory, for fast recovery after a failure."""
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    """What happens if a loss or gradient is not finite or is an outlier."""
    integrity: IntegrityConfig = field(default_factory=IntegrityConfig)
    """Detection of silent data corruption."""
