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
    """Save at every multiple of this step; 0: save at the end only."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep. Older ones are deleted only after the next one is complete on disk."""
    keep_every_steps: Count = 0
    """Also keep every checkpoint at a multiple of this step forever; 0: none."""
    keep_local: PositiveInt | None = None
    """With `run.storage`: number of newest checkpoints to keep in the run's folder, at most `keep_last`. Those of
    `keep_every_steps` stay there only until they are copied. null: the folder keeps the same checkpoints as the storage."""
    on_storage_failure: Literal["continue", "stop"] = "continue"
    """After all retries of a copy to `run.storage` failed: warn and try again later, or end the run with an error at the next
    step."""
    background: bool = True
    """Write while training continues, from a copy in host memory (as large as this rank's part of the checkpoint). false:
    training waits for the disk at each save."""
    retries: Count = 2
    """Number of retries of a failed save, from the same copy."""
    retry_wait_s: NonNegativeFloat = 5.0
    """Seconds before the first retry. Each further wait is twice as long."""
    on_failure: Literal["stop", "continue"] = "stop"
    """After all retries of a save failed: end the run with an error at the next step, or warn and continue to the next save. With
    `continue`, lines of metrics.jsonl that the disk refuses wait in memory until it has space."""
    resume: Literal["auto", "never", "required"] = "auto"
    """`auto` continues from the newest checkpoint in the run's folder, if there is one; `never` refuses a folder with
    checkpoints; `required` refuses a folder without checkpoints."""
    allow: tuple[Literal["data_order", "arithmetic", "another_function"], ...] = ()
    """Kinds of recipe changes that a resume allows: `data_order` (other rows from here on), `arithmetic` (other numbers from the
    same rows, e.g. `optim.lr`). Safe changes are always allowed. Reading weights (`run.start_from`, generation) needs
    `arithmetic` if rotary angles, soft caps or epsilons differ from the checkpoint's, and `another_function` if heads,
    activation, norms or kinds of layers differ. A resume never allows `another_function`."""
