"""Which ranks of the student's last pipeline stage form a teacher (`train.distill.teacher` explains why that stage)."""

from dataclasses import dataclass

from recipes.schema.errors import Problem, refuse
from recipes.schema.layout import Layout


@dataclass(frozen=True)
class TeacherPlacement:
    """The position of a rank among the ranks of the student's last stage, and its groups. Rank numbers are within the stage."""

    index: int
    """Number of this rank among the `ranks` of the last stage."""
    ranks: int
    sharing: int
    """Neighbouring ranks that read the same rows: the student's tensor x context."""
    tensor: int
    """The teacher's tensor degree."""

    @property
    def teachers(self) -> int:
        """Number of teachers that serve the same rows; each reads 1 / teachers of them."""
        return max(1, self.sharing // self.tensor)

    @property
    def row_sets(self) -> int:
        """Number of sets of rows that one teacher serves."""
        return max(1, self.tensor // self.sharing)

    @property
    def teacher_group(self) -> list[int]:
        """The ranks that form this rank's teacher."""
        first = self.index // self.tensor * self.tensor
        return list(range(first, first + self.tensor))

    @property
    def replicas(self) -> list[int]:
        """The ranks that have the same part of the teacher's weights."""
        return list(range(self.index % self.tensor, self.ranks, self.tensor))

    @property
    def exchange_group(self) -> list[int]:
        """One rank of each teacher that serves these rows; they exchange hidden states."""
        if self.teachers == 1:
            return [self.index]
        first = self.index // self.sharing * self.sharing + self.index % self.tensor
        return [first + self.tensor * teacher for teacher in range(self.teachers)]


def placement_of(layout: Layout, rank: int, *, tensor: int) -> TeacherPlacement | None:
    """The placement of `rank`; None for a rank of an earlier stage. RecipeError if the teacher's degree does not fit."""
    refuse(degree_problems(layout, tensor=tensor))
    ranks = layout.world // layout.pipeline
    first = layout.world - ranks
    return TeacherPlacement(rank - first, ranks, layout.tensor * layout.context, tensor) if rank >= first else None


def degree_problems(layout: Layout, *, tensor: int) -> list[Problem]:
    """A tensor degree of the teacher that does not divide the ranks of the student's last stage."""
    ranks = layout.world // layout.pipeline
    sharing = layout.tensor * layout.context
    if ranks % tensor == 0 and (sharing % tensor == 0 or tensor % sharing == 0):
        return []
    fit = [n for n in range(1, ranks + 1) if ranks % n == 0 and (sharing % n == 0 or n % sharing == 0)]
    text = (
        f"objective.teacher_tensor={tensor}: the teacher runs on the {ranks} ranks of the last pipeline stage, of which "
        f"{sharing} share the same rows."
    )
    return [Problem("objective.teacher_tensor", text, f"Use {', '.join(map(str, fit))}.")]
