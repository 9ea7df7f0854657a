"""Where a run starts: from the newest checkpoint that verifies, after reporting what changed; otherwise from step 0.

survey of the folder -> is this resume allowed? (mode, tokenizer, data, recipe) -> load and verify -> one table for the user
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recipes.schema.changes import Difference, differences
from recipes.schema.errors import CheckpointError, refuse
from recipes.schema.facts import newest_of
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.rules import kernels_differ, named_teacher, required_problem, resume_problems
from recipes.schema.run_folder import METRICS, read_metrics
from recipes.schema.schedule import learning_rate_factor
from train.checkpoint.manager import CheckpointFolder, LoadedCheckpoint
from train.checkpoint.manifest import Manifest, RunState, describe_layout
from train.engine import Engine

TEACHER = "teacher"
"""Key of a checkpoint's lineage: the teacher that the model learned from (`train.distill.teacher.identity`)."""


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    state: RunState
    """Step, position and lineage that training continues from; the next save copies its other fields."""
    text: str | None
    """The text to show the user."""
    path: Path | None = None
    """The checkpoint; None at step 0, and if the run continues from copies in memory."""
    stream: dict[str, torch.Tensor] = field(default_factory=dict)
    """State of the stream (`train.checkpoint.stream_state`), if it does not come from a checkpoint."""


def resume(checkpoints: CheckpointFolder, engine: Engine, *, recipe: Recipe, new: RunState) -> Start:
    """Load the newest checkpoint that verifies, if the recipe allows it. Collective over the world.

    new: the state of the run at step 0, with this recipe, data and tokenizer. The step, position and lineage of a loaded
    checkpoint replace its own. Raises CheckpointError, DataError, RecipeError.
    """
    good, _ = checkpoints.survey(engine.mesh)
    if good:
        path, manifest = good[0]
        refuse(
            resume_problems(
                recipe,
                manifest,
                place=str(path),
                tokenizer=new.tokenizer,
                data_hash=new.data_hash,
                kernels=new.kernels,
                taught_by=engine.teacher,
            )
        )
    found = checkpoints.resume(engine)
    if found is None:
        if recipe.checkpoint.resume == "required":
            refuse([required_problem(checkpoints.folder)], CheckpointError)
        lineage = new.lineage | _taught_by(engine)
        return Start(replace(new, lineage=lineage), _from_zero(checkpoints) or _learning(engine))
    # Loading may fall back to an older checkpoint than the one checked above: its rules are checked too.
    start = continue_from(found, engine, recipe=recipe, new=new)
    return replace(start, path=found.path)


def continue_from(
    found: LoadedCheckpoint,
    engine: Engine,
    *,
    recipe: Recipe,
    new: RunState,
    stream: dict[str, torch.Tensor] | None = None,
) -> Start:
    """The start of a run from what the engine was filled from. new: as in `resume`. Raises RecipeError if the recipe has changed
    in a way that a resume does not allow."""
    manifest = found.manifest
    refuse(
        resume_problems(
            recipe,
            manifest,
            place=str(found.path),
            tokenizer=new.tokenizer,
            data_hash=new.data_hash,
            kernels=new.kernels,
            taught_by=engine.teacher,
        )
    )
    lineage = manifest.lineage | _taught_by(engine)
    state = replace(
        new,
        step=manifest.step,
        position=manifest.position,
        tokens=manifest.tokens,
        lineage=lineage,
        ledger=manifest.ledger,
    )
    return Start(state, _audit(found, engine, recipe=recipe, new=new), stream=stream or {})


def _audit(found: LoadedCheckpoint, engine: Engine, *, recipe: Recipe, new: RunState) -> str:
    """The table that a user sees on resume: the saved value, the value now, and the effect of each difference."""
    manifest = found.manifest
    now = engine.mesh.layout.describe()
    teacher = engine.teacher
    then = describe_layout(manifest.layout)
    is_grpo = recipe.objective.kind == "grpo"
    rows = [
        ("", "saved", "now"),
        ("step", f"{manifest.step:,}", _next_step(manifest.step, recipe.run.steps)),
        ("tokens", f"{manifest.tokens:,}", ""),
        ("position", f"{'prompt' if is_grpo else 'row'} {manifest.position:,}", "the next one"),
        ("learning rate", _rate(manifest.recipe, manifest), _rate(new.recipe, manifest)),
        ("layout", then, now if now != then else "the same"),
        (
            "optimizer",
            "fresh moments" if manifest.updates is None else f"{manifest.updates:,} updates",
            "none saved: starts fresh" if manifest.updates is None else "the same",
        ),
        (
            "random state",
            "",
            "restored" if then == now else "seeded by seed and step (another layout)",
        ),
        (
            "weights",
            manifest.fingerprint[:16] if manifest.tensors else "",
            "verified: fingerprints agree after loading",
        ),
        ("data", manifest.data_hash[:12] or "unknown", _same_data(manifest, new.data_hash)),
    ]
    if manifest.ledger.left_out or manifest.ledger.skipped_steps:
        rows.append(("spikes", manifest.ledger.describe(), "the same"))
    if manifest.kernels or new.kernels:
        now_run = "the same" if manifest.kernels == new.kernels else new.kernels or "none: not on a CPU"
        differ = kernels_differ(manifest.kernels, new.kernels)
        rows.append(("kernels", manifest.kernels or "unknown", f"{now_run}{'    bits will differ (allowed)' * differ}"))
    before = manifest.lineage.get(TEACHER)
    if before or teacher:
        same = before and teacher and before["fingerprint"] == teacher["fingerprint"]
        rows.append(("teacher", named_teacher(before), "the same" if same else named_teacher(teacher)))
    for change in _changes(manifest, new.recipe):
        allowed = "" if change.kind == "safe" else " (allowed)"
        verb = "safe" if change.kind == "safe" else f"changes {change.kind}"
        rows.append((change.key, str(change.old), f"{change.new}    {verb}{allowed}"))
    width = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {a:<{width[0]}}  {b:<{width[1]}}  {c}".rstrip() for a, b, c in rows]
    notes = [f"  note: {note}" for note in found.notes]
    return "\n".join([f"resuming from {found.path}", *lines, *notes])


def _same_data(manifest: Manifest, data_hash: str) -> str:
    if not manifest.data_hash:
        return f"{data_hash[:12]}: cannot be compared"
    return "the same" if manifest.data_hash == data_hash else f"{data_hash[:12]}: DIFFERENT ROWS from here on (allowed)"


def _changes(manifest: Manifest, mapping: dict[str, Any]) -> list[Difference]:
    """Differences of the recipes, except fields about where and how to run."""
    quiet = ("launch.", "telemetry.", "evaluate.", "checkpoint.", "run.stop_after_steps", "run.threads", "parallel.")
    if not manifest.recipe:
        return []
    return [change for change in differences(manifest.recipe, mapping) if not change.key.startswith(quiet)]


def _taught_by(engine: Engine) -> dict[str, Any]:
    return {TEACHER: engine.teacher} if engine.teacher else {}


def _learning(engine: Engine) -> str | None:
    return f"learning from {named_teacher(engine.teacher)}" if engine.teacher else None


def _next_step(step: int, steps: int) -> str:
    return f"continues with {step + 1:,} of {steps:,}" if step < steps else f"nothing left: run.steps={steps:,}"


def _rate(mapping: dict[str, Any], manifest: Manifest) -> str:
    """Learning rate of the next step under a recipe."""
    if not mapping:
        return "unknown"
    recipe = recipe_from_mapping(mapping)
    per_step = recipe.run.global_rows * recipe.data.row_tokens
    factor = learning_rate_factor(
        recipe.schedule,
        step=manifest.step,
        tokens=manifest.step * per_step,
        total_steps=recipe.run.steps,
        tokens_per_step=per_step,
    )
    return f"{recipe.optim.lr * factor:.6g}"


def _from_zero(checkpoints: CheckpointFolder) -> str | None:
    """Raise CheckpointError if metrics.jsonl records checkpoints that are gone. -> a warning if the run never saved one."""
    _, lost = newest_of(checkpoints.folder.parent)
    if lost is not None:
        refuse([lost], CheckpointError)
    path = checkpoints.folder.parent / METRICS
    lines = read_metrics(path) if path.exists() else []
    last = max((line["step"] for line in lines if line["kind"] == "step"), default=0)
    if last:
        return (
            f"warning: {checkpoints.folder.parent} has metrics of {last:,} steps, but the run ended before its first "
            f"checkpoint; training starts at step 0."
        )
    return None
