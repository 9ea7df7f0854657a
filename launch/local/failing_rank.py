"""Leaves out a device whose rank fails again and again: a spare GPU takes its place, or the run continues with fewer replicas.

Fewer processes mean fewer data-parallel replicas at the same global batch. The order of rows does not depend on the number of
ranks, so losses are equal to rounding. The run then continues from a checkpoint, because copies in memory need the same layout.
After `launch.regrow_s` it saves, stops and starts again with all processes: a device that failed may be well again.
"""

from dataclasses import dataclass, replace

from recipes.schema.layout import layout_problems
from recipes.schema.recipe import Recipe

_FAILURES = 2
"""Failures of one rank in a row, without progress between them, after which its device is left out."""


@dataclass(frozen=True)
class Team:
    """The processes of the next attempt."""

    processes: int
    devices: tuple[str, ...] = ()
    """GPUs that may be used, by names as in CUDA_VISIBLE_DEVICES; those after the first `processes` are spares. Empty: none."""
    suspect: int | None = None
    """The rank that failed first in the last attempt."""
    failures: int = 0
    """How often in a row."""
    full: "tuple[int, tuple[str, ...]] | None" = None
    """Processes and GPUs before any was left out; None: none is."""

    def after_failure(self, rank: int, *, has_progress: bool) -> "Team":
        """The team with one more failure counted."""
        again = rank == self.suspect and not has_progress
        return replace(self, suspect=rank, failures=self.failures + 1 if again else 1)

    def without_suspect(self, recipe: Recipe, *, may_shrink: bool) -> "tuple[Team, str] | None":
        """(a team without the device that fails, a message); None if it has not failed often enough, or there is no such team.

        may_shrink: whether the run can continue at another layout.
        """
        if self.failures < _FAILURES or self.suspect is None:
            return None
        left = tuple(name for index, name in enumerate(self.devices) if index != self.suspect)
        what = f"rank {self.suspect} failed first {self.failures} times in a row"
        without = f" without GPU {self.devices[self.suspect]}" if left else ""
        if len(left) >= self.processes:
            return replace(self, devices=left, suspect=None, failures=0), f"{what}: continuing{without}, with a spare"
        least = recipe.launch.least_processes
        for count in range(self.processes - 1, (least or self.processes) - 1, -1) if may_shrink else ():
            if not _problems(recipe, count) and (not self.devices or count <= len(left)):
                smaller = Team(count, left, full=self.full or (self.processes, self.devices))
                return smaller, f"{what}: continuing{without} with {count} instead of {self.processes} processes"
        return None

    def grown(self) -> "tuple[Team, str] | None":
        """(the team before any process was left out, a message); None if none is left out."""
        if self.full is None:
            return None
        processes, devices = self.full
        return Team(processes, devices), f"continuing with all {processes} processes again"


def _problems(recipe: Recipe, world: int) -> bool:
    return bool(
        layout_problems(
            model=recipe.model, parallel=recipe.parallel, run=recipe.run, row_tokens=recipe.data.row_tokens, world=world
        )
    )
