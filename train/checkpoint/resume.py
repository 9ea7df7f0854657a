"""Where a run starts: at its newest checkpoint that proves right, after an audit of what changed since, or at zero, aloud.

survey of the folder -> is this resume allowed? (mode, tokenizer, data, recipe) -> load and prove -> one table for the user
"""

from dataclasses import dataclass, replace
from typing import Any

from recipes.schema.changes import Difference, differences, refused
from recipes.schema.errors import CheckpointError, DataError, RecipeError
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics
from recipes.schema.schedule import learning_rate_factor
from train.checkpoint.manager import CheckpointFolder, Found
from train.checkpoint.manifest import Manifest, RunState, describe_layout
from train.engine import Engine

TEACHER = "teacher"
"""Key of a checkpoint's lineage: who taught the model (`train.distill.teacher.identity`)."""


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    state: RunState
    """What the next save starts from: step and position, and where the weights come from."""
    text: str | None
    """What the user should see."""


def resume(checkpoints: CheckpointFolder, engine: Engine, *, recipe: Recipe, new: RunState) -> Start:
    """Load the newest checkpoint that proves right, where the recipe allows it. Collective over the world.

    new: the run as it would start at step 0, with this recipe, data and tokenizer. A loaded checkpoint's step, position and
    lineage replace its own. Raises CheckpointError, DataError, RecipeError.
    """
    good, _ = checkpoints.survey(engine.mesh)
    mode = recipe.checkpoint.resume
    if good:
        path, manifest = good[0]
        if mode == "never":
            raise CheckpointError(
                f"checkpoint.resume=never, but {checkpoints.folder} already holds {path.name}. Choose another run.name, or "
                f"checkpoint.resume=auto to continue."
            )
        _check_tokenizer(manifest, recipe=recipe, tokenizer=new.tokenizer, place=str(path))
        _check_data(manifest, recipe=recipe, data_hash=new.data_hash, place=str(path))
        _check_recipe(manifest, recipe=recipe, mapping=new.recipe, place=str(path))
        _check_teacher(manifest, engine.teacher, recipe=recipe, place=str(path))
    found = checkpoints.resume(engine)
    lineage = (found.manifest.lineage if found else new.lineage) | _taught_by(engine)
    if found is None:
        if mode == "required":
            raise CheckpointError(
                f"checkpoint.resume=required, but {checkpoints.folder} holds no checkpoint. Use checkpoint.resume=auto "
                f"to start from the beginning."
            )
        return Start(replace(new, lineage=lineage), _from_zero(checkpoints) or _learning(engine))
    _check_tokenizer(found.manifest, recipe=recipe, tokenizer=new.tokenizer, place=str(found.path))
    _check_data(found.manifest, recipe=recipe, data_hash=new.data_hash, place=str(found.path))
    state = replace(new, step=found.manifest.step, position=found.manifest.position, lineage=lineage)
    return Start(state, _audit(found, engine, recipe=recipe, new=new))


def _audit(found: Found, engine: Engine, *, recipe: Recipe, new: RunState) -> str:
    """The table a user sees on resume: what was saved, what goes on now, and every difference by what it does."""
    manifest = found.manifest
    now = engine.mesh.layout.describe()
    teacher = engine.teacher
    then = describe_layout(manifest.layout)
    rows = [
        ("", "saved", "now"),
        ("step", f"{manifest.step:,}", _next_step(manifest.step, recipe.run.steps)),
        ("tokens", f"{manifest.tokens:,}", ""),
        ("position", f"row {manifest.position:,}", "the next row"),
        ("learning rate", _rate(manifest.recipe, manifest), _rate(new.recipe, manifest)),
        ("layout", then, now if now != then else "the same"),
        (
            "optimizer",
            "fresh moments" if manifest.updates is None else f"{manifest.updates:,} updates",
            "none saved: starts anew" if manifest.updates is None else "the same",
        ),
        (
            "random state",
            "",
            "restored" if then == now else "seeded by seed and step (another layout)",
        ),
        ("weights", manifest.fingerprint[:16], "proven: fingerprints agree after loading"),
        ("data", manifest.data_hash[:12] or "unknown", _same_data(manifest, new.data_hash)),
    ]
    before = manifest.lineage.get(TEACHER)
    if before or teacher:
        same = before and teacher and before["fingerprint"] == teacher["fingerprint"]
        rows.append(("teacher", _named(before), "the same" if same else _named(teacher)))
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
    return "the same" if manifest.data_hash == data_hash else f"{data_hash[:12]}: OTHER ROWS from here on (allowed)"


def _changes(manifest: Manifest, mapping: dict[str, Any]) -> list[Difference]:
    """Differences of the recipes, without those that only say where and how to run."""
    quiet = ("launch.", "telemetry.", "evaluate.", "checkpoint.", "run.stop_after_steps", "run.threads", "parallel.")
    if not manifest.recipe:
        return []
    return [change for change in differences(manifest.recipe, mapping) if not change.key.startswith(quiet)]


def _check_recipe(manifest: Manifest, *, recipe: Recipe, mapping: dict[str, Any], place: str) -> None:
    if manifest.recipe:
        why = refused(differences(manifest.recipe, mapping), recipe.checkpoint.allow)
        if why is not None:
            raise RecipeError(f"{place} was trained with another recipe:{why}")


def _check_teacher(manifest: Manifest, teacher: dict[str, Any] | None, *, recipe: Recipe, place: str) -> None:
    """A run folder of a teacher that trains on names other weights every time; a student must not change teachers unawares."""
    before = manifest.lineage.get(TEACHER)
    if not before or not teacher or before["fingerprint"] == teacher["fingerprint"]:
        return
    if "arithmetic" not in recipe.checkpoint.allow:
        raise RecipeError(
            f"{place} learned from {_named(before)}; the teacher is {_named(teacher)} now. Add checkpoint.allow=[arithmetic] "
            f"to go on with it (and objective.teacher={before['checkpoint']} to go on with the first), or choose another "
            f"run.name."
        )


def _taught_by(engine: Engine) -> dict[str, Any]:
    return {TEACHER: engine.teacher} if engine.teacher else {}


def _learning(engine: Engine) -> str | None:
    return f"learning from {_named(engine.teacher)}" if engine.teacher else None


def _named(teacher: dict[str, Any] | None) -> str:
    return f"{teacher['checkpoint']} (weights {teacher['fingerprint'][:12]})" if teacher else "none"


def _check_tokenizer(manifest: Manifest, *, recipe: Recipe, tokenizer: str, place: str) -> None:
    """Nothing allows another tokenizer: the same ids would be other text, and no loss would tell for long."""
    if not manifest.tokenizer or not tokenizer or manifest.tokenizer == tokenizer:
        return
    raise DataError(
        f"{place} was trained with tokenizer {manifest.tokenizer[:12]}, but the data in {recipe.data.folder} was made with "
        f"{tokenizer[:12]}: its ids stand for other text. Point data.folder at data made with the first, or start a new run "
        f"with another run.name."
    )


def _check_data(manifest: Manifest, *, recipe: Recipe, data_hash: str, place: str) -> None:
    if manifest.data_hash in ("", data_hash) or "data_order" in recipe.checkpoint.allow:
        return
    raise DataError(
        f"{place} was trained on data {manifest.data_hash[:12]}, but {recipe.data.folder} now holds {data_hash[:12]}: rows "
        f"would no longer be the ones counted. Point data.folder at the old data, start a new run with another run.name, or "
        f"add checkpoint.allow=[data_order] to go on with other rows."
    )


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
    """Refuse to start a run over whose checkpoints are lost, as its record tells; say so where it never had one."""
    path = checkpoints.folder.parent / METRICS
    lines = read_metrics(path) if path.exists() else []
    last = max((line["step"] for line in lines if line["kind"] == "step"), default=0)
    had_checkpoint = any(line["kind"] == "save" for line in lines)
    if had_checkpoint:
        raise CheckpointError(
            f"{checkpoints.folder.parent} holds a run of {last:,} steps that wrote checkpoints, but {checkpoints.folder} holds "
            f"none. Bring them back, choose another run.name, or move {checkpoints.folder.parent} away to start over."
        )
    if last:
        return (
            f"warning: {checkpoints.folder.parent} holds {last:,} steps of a run that ended before its first checkpoint; "
            f"training starts at step 0."
        )
    return None
