"""Fields of the `checkpoint` group: when to save and what to keep.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: Count = 100
    """Save at every multiple of this step; 0 saves at the end only."""
    keep_last: PositiveInt = 2
    """Checkpoints kept, newest first. Older ones are deleted when the next is durable, never before."""
    keep_every_steps: Count = 0
    """Also keep every checkpoint at a multiple of this step for good; 0 keeps none."""
    background: bool = True
    """Write while training continues, from a copy in host memory (as big as this rank's part of the checkpoint); false waits
    for the disk at each save."""
    retries: Count = 2
    """Times a failed save is tried again from the same copy."""
    retry_wait_s: NonNegativeFloat = 5.0
    """Seconds before the first retry; doubled for each further one."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a save has failed for good: end the run with an error at the next step, or warn and go on to the next save. With
    `continue`, lines of metrics.jsonl that the disk refuses wait in memory until it has space."""
    resume: Literal["auto", "never", "required"] = "auto"
    """`auto` continues where the run's folder left off; `never` refuses a folder that already holds checkpoints;
    `required` refuses one that holds none."""
    allow: tuple[Literal["data_order", "arithmetic", "another_function"], ...] = ()
    """Kinds of recipe changes that a resume may bring: `data_order` (other rows from here on), `arithmetic` (other numbers
    from the same rows, e.g. optim.lr). Changes that are safe need no word. Reading weights (`run.start_from`, generation)
    asks for the same word where angles, caps or epsilons differ from the checkpoint's, and for `another_function` where
    heads, activation, norms or kinds of layers do; a resume is never allowed those."""
