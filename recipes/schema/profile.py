"""Which steps of a run are profiled: the text of `run.profile` as numbers."""

import re

from recipes.schema.errors import Problem
from recipes.schema.run import RunConfig

TABLE = ".table.json"
"""End of the name of the table beside a trace: its operations that took longest."""
MOST_STEPS = 20
"""More steps would make a trace of hundreds of megabytes, which no viewer opens."""


def profiled_steps(run: RunConfig) -> range:
    """The steps to profile, counted from 1; empty without `run.profile`. ValueError if the text is not `3` or `3-5`."""
    if run.profile is None:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", run.profile)
    if match is None:
        raise ValueError(f"run.profile={run.profile!r} does not name steps")
    first = int(match[1])
    return range(first, int(match[2] or first) + 1)


def profile_problems(run: RunConfig) -> list[Problem]:
    """What is wrong with `run.profile`."""
    try:
        steps = profiled_steps(run)
    except ValueError as error:
        return [Problem("run.profile", str(error), "Write a step or a range of steps, such as 100-103.")]
    if run.profile is None:
        return []
    if not steps or not 1 <= steps[0] <= steps[-1] <= run.steps:
        text = f"run.profile={run.profile} is not a range within steps 1 to {run.steps} (run.steps)"
        return [Problem("run.profile", text, f"Name steps of this run, such as {min(10, run.steps)}.")]
    if len(steps) > MOST_STEPS:
        text = f"run.profile={run.profile} names {len(steps):,} steps; at most {MOST_STEPS} fit in a trace"
        return [Problem("run.profile", text, f"Name fewer, such as {steps[0]}-{steps[0] + 3}.")]
    return []
