"""Fields of `run.spikes`: what happens when a step's loss or gradient is not finite, or an outlier.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, NonNegativeFloat, WindowSteps


@dataclass(frozen=True)
class SpikesConfig:
    """What happens when a step's loss or gradient is not finite, or far above those of the last steps."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop`: NaN or infinity ends the run; outliers are not looked for. `skip`: such a step, or an outlier, changes neither
    weights nor moments, and training continues with the next rows. `rollback`: the run names the step's documents, goes back to
    its newest checkpoint, leaves the step's rows out and continues."""
    sigma: NonNegativeFloat = 6.0
    """A loss or a gradient norm more than this many standard deviations above the mean of the window is an outlier (the default
    and the rule are OLMo-core's). 0: only NaN and infinity count."""
    window_steps: WindowSteps = 128
    """Number of earlier steps that a step is compared with (OLMo-core's default). Until half of them exist no finite value is an
    outlier."""
    most_in_a_row: Count = 10
    """End the run if more steps in a row than this would be skipped."""
    most_rollbacks: Count = 3
    """End the run at the spike after this many rollbacks."""
    leave_out_steps: Count = 1
    """Of a rollback: leave out the rows of so many steps, the last of which is the step with the spike; at most those since the
    checkpoint. PaLM left out 200 to 500 (arXiv 2204.02311, section 5.1). 0: none, only go back."""
