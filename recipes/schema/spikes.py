"""Fields of `run.spikes`: what happens if a step's loss or gradient is not finite or is an outlier.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, NonNegativeFloat, WindowSteps


@dataclass(frozen=True)
class SpikesConfig:
    """What happens if a step's loss or gradient is not finite, or far above those of the last steps."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop`: NaN or infinity ends the run; outliers are not detected. `skip`: a step with NaN, infinity or an outlier changes
    neither weights nor moments; training continues with the next rows. `rollback`: the run names the documents of such a step,
    goes back to its newest checkpoint, leaves out the step's rows and continues."""
    sigma: NonNegativeFloat = 6.0
    """A loss or a gradient norm more than this many standard deviations above the mean of the window is an outlier (rule and
    default of OLMo-core). 0: only NaN and infinity count."""
    window_steps: WindowSteps = 128
    """Number of earlier steps that a step is compared with (OLMo-core's default). No finite value is an outlier until half of
    them exist."""
    most_in_a_row: Count = 10
    """End the run if more consecutive steps than this would be skipped."""
    most_rollbacks: Count = 3
    """Maximum number of rollbacks; the next spike ends the run."""
    leave_out_steps: Count = 1
    """Number of steps whose rows a rollback leaves out: the step with the spike and those before it, at most back to the
    checkpoint. PaLM left out 200 to 500 (arXiv 2204.02311, section 5.1). 0: only go back."""
