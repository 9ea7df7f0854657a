"""The cost of a teacher in the plan of a distillation run: its bytes on the last stage, and the seconds it adds.

Its model is read from the checkpoint or run folder `objective.teacher`, or, if that is not on this disk, from the model recipe
of the same name. The teacher is counted as `train.distill.teacher` builds it: the whole model on the ranks of the last pipeline
stage, divided by `objective.teacher_tensor`, weights in one format, forward passes only.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.plan.cost.activations import Modules, Shape, hidden_bytes, layer_bytes
from launch.plan.cost.tensors import stage_tensors
from launch.plan.cost.time import Setting, forward_seconds
from recipes.schema.command import RECIPES
from recipes.schema.errors import RecipeError
from recipes.schema.facts import Named, named
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import recipe_in
from recipes.schema.scaling import layer_linears
from recipes.schema.teacher_placement import placement_of
from recipes.schema.teacher_rules import teacher_vocabulary_problems
from recipes.schema.typed import FieldError, build


@dataclass(frozen=True)
class FoundTeacher:
    """The teacher of a recipe, as far as it is known."""

    model: ModelConfig | None = None
    """None if there is no teacher, or its shape is unknown."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class TeacherCost:
    """Memory and time that a teacher adds."""

    weights: int
    """Bytes on each rank of the last stage."""
    workspace: float
    """Temporary bytes of a forward pass there."""
    seconds: float
    """Seconds it adds to each microbatch there."""

    @property
    def bytes(self) -> float:
        return self.weights + self.workspace


def find_teacher(recipe: Recipe, checkpoint: Named | None) -> FoundTeacher:
    """The model of an online teacher. Empty if the run reads cached teacher logits, or does not distil.

    checkpoint: what is at `objective.teacher` on this disk.
    """
    objective = recipe.objective
    if objective.kind != "distill" or objective.teacher is None or objective.teacher_cache is not None:
        return FoundTeacher()
    path = Path(objective.teacher)
    if checkpoint is not None and checkpoint.recipe is not None:
        return FoundTeacher(checkpoint.recipe.model)  # recipes.schema.teacher_rules has checked it
    model, where = model_named(path)
    if model is None:
        return FoundTeacher(
            notes=(
                f"objective.teacher={path} is not on this disk, and no recipe is named {path.name}: the teacher's memory and "
                f"time are not in this plan.",
            )
        )
    notes = [f"objective.teacher={path} is not on this disk: the teacher is planned as {where}."] if where else []
    wrong = teacher_vocabulary_problems(recipe, model, path=path)
    return FoundTeacher(model, tuple(notes), tuple(map(str, wrong)))


def teacher_cost(recipe: Recipe, model: ModelConfig, *, student: Setting, modules: Modules) -> TeacherCost:
    """Memory and time of a teacher. Raises RecipeError if its tensor degree does not fit the student's layout."""
    objective, layout = recipe.objective, student.layout
    tensor = objective.teacher_tensor or layout.tensor
    placement = placement_of(layout, layout.world - 1, tensor=tensor)
    assert placement is not None, "the last rank is on the last stage"
    rows = recipe.run.microbatch_rows
    teacher_rows = rows // placement.teachers if rows % placement.teachers == 0 else rows
    params = recipe.precision.params if objective.teacher_params == "as_student" else objective.teacher_params
    size = 2 if params == "bf16" else 4
    is_low = objective.teacher_scaling != "none"
    pattern = model.pattern.replace("|", "")
    linears = {index: layer_linears(model, kind) for index, kind in enumerate(pattern)} if is_low else {}
    tensors = stage_tensors(model, pattern, tensor=tensor, is_first=True, is_last=True, low=linears)
    weights = sum(one.numel * (4 if one.is_fp32 else size) + 2 * one.numel * one.is_low for one in tensors)
    if tensor != layout.tensor:  # the teacher's head is sharded over the student's tensor ranks instead of its own
        table = model.vocab * model.hidden * size
        weights += table // layout.tensor - (0 if model.tie_embeddings else table // tensor)
    shape = Shape(
        model,
        modules,
        size,
        rows=teacher_rows,
        sequence=student.sequence,
        tensor=tensor,
        context=1,
        split_sequence=False,
    )
    workspace = max(layer_bytes(shape, kind, is_low=is_low) for kind in set(pattern))  # type: ignore[arg-type]
    workspace += 2 * hidden_bytes(shape) + hidden_bytes(replace(shape, rows=rows))
    low = "fp4" if objective.teacher_scaling == "nvfp4" else "fp8"
    seconds = forward_seconds(
        replace(
            student,
            model=model,
            layout=replace(layout, tensor=tensor, pipeline=1, virtual=1, context=1),
            stages=(pattern,),
            rows=teacher_rows,
            low=low if is_low and low in student.device.peak else None,  # type: ignore[arg-type]
            high="bf16" if params == "bf16" and "bf16" in student.device.peak else "fp32",
            scaling=objective.teacher_scaling,
            split_sequence=False,
        )
    )
    return TeacherCost(weights=weights, workspace=workspace, seconds=seconds * placement.row_sets)


def model_named(path: Path) -> tuple[ModelConfig | None, str | None]:
    """(Shape of the model in a checkpoint or run folder, None). If the folder is not on this disk: the model of the model recipe
    or recipe of the same name, and which it is (`model=gemma2_9b`); (None, None) without one."""
    try:
        found = named(str(path)).recipe
        return (found.model if found is not None else build(ModelConfig, recipe_in(path)["model"], "model")), None
    except (OSError, RecipeError, KeyError, FieldError):
        pass  # no such run: look for a recipe of that name
    if (RECIPES / "model" / f"{path.name}.yaml").is_file():
        return build(ModelConfig, _group("model", path.name), "model"), f"model={path.name}"
    if not (RECIPES / f"{path.name}.yaml").is_file():
        return None, None
    whole = _group("", path.name)
    choices = [entry["model"] for entry in whole["defaults"] if isinstance(entry, dict) and "model" in entry]
    if len(choices) != 1:
        return None, None
    return build(ModelConfig, _group("model", choices[0]) | whole.get("model", {}), "model"), f"recipe {path.name}"


def _group(folder: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / folder / f"{name}.yaml").read_text())
