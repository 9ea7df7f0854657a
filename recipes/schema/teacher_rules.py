"""Rules of distillation: problems of an objective, and of its teacher or teacher cache with the student.

`recipes.schema.rules.problems` calls them; the trainer calls some of them again when it opens the teacher.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.schema.encoder_rules import without_encoders_problems
from recipes.schema.errors import Problem, RecipeError
from recipes.schema.expert_rules import dense_problems
from recipes.schema.facts import CacheRequest, Named
from recipes.schema.layout import lay_out, layout_problems
from recipes.schema.model import ModelConfig
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.objective_rules import language_model_problems
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import cut, layer_kinds
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_placement import degree_problems

FINAL = "final"


def distill_problems(recipe: Recipe) -> list[Problem]:
    """Problems of an objective that can be found from the recipe alone."""
    objective = recipe.objective
    if objective.kind != "distill":
        return []
    found = []
    if objective.teacher is None and objective.teacher_cache is None:
        text = "objective.kind=distill needs objective.teacher or objective.teacher_cache."
        remedy = (
            "Name a checkpoint folder, a run folder such as runs/NAME, or a folder written by `stratum teacher-cache`; or use "
            "objective=next_token."
        )
        found.append(Problem("objective.teacher", text, remedy))
    if objective.top_k > recipe.model.real_vocab:
        text = (
            f"objective.top_k={objective.top_k} is more than the vocabulary, model.vocab={_vocabulary(recipe.model)}."
        )
        found.append(Problem("objective.top_k", text, "Use 0 for the whole distribution, or fewer tokens."))
    if objective.hidden_match == "none":
        return found + _without_match(objective)
    if objective.teacher_cache is not None:
        text = (
            f"objective.hidden_match={objective.hidden_match} needs the teacher itself; objective.teacher_cache has only its "
            f"logits."
        )
        found.append(Problem("objective.hidden_match", text, "Use hidden_match=none, or teacher_cache=null."))
    elif objective.hidden_layers != FINAL and recipe.parallel.recompute != "none":
        text = (
            f"objective.hidden_layers={objective.hidden_layers} needs activations that parallel.recompute="
            f"{recipe.parallel.recompute} discards."
        )
        remedy = "Use hidden_layers=final, or parallel.recompute=none."
        found.append(Problem("objective.hidden_layers", text, remedy))
    if pair_problem := _pair_problem(objective.hidden_layers):
        found.append(pair_problem)
    return found


def cache_command_problems(recipe: Recipe) -> list[Problem]:
    """Problems for `stratum teacher-cache`: those of distillation, and the fields that this command needs."""
    objective, found = recipe.objective, []
    if objective.teacher is None:
        text = "objective.teacher is not set."
        found.append(Problem("objective.teacher", text, "Name a checkpoint folder, or a run folder such as runs/NAME."))
    if objective.teacher_cache is None or not objective.top_k:
        folder = objective.teacher_cache or "null"
        text = f"objective.teacher_cache={folder} and objective.top_k={objective.top_k}: both must be set."
        remedy = "Set the folder and the number of tokens stored per position: objective.teacher_cache=FOLDER objective.top_k=64."
        found.append(Problem("objective.teacher_cache", text, remedy))
    return found + distill_problems(replace(recipe, objective=replace(objective, kind="distill")))


def _without_match(objective: ObjectiveConfig) -> list[Problem]:
    found = []
    if not objective.distill_weight:
        text = "objective.distill_weight=0 with hidden_match=none leaves nothing to learn from the teacher."
        found.append(Problem("objective.distill_weight", text, "Use objective=next_token to train without one."))
    for name, value, default in (
        ("hidden_layers", objective.hidden_layers, FINAL),
        ("hidden_weight", objective.hidden_weight, None),
    ):
        if value != default:
            text = f"objective.{name}={value} does nothing while objective.hidden_match=none."
            back = "null" if default is None else default
            remedy = f"Use hidden_match=cosine or mse, or set {name} to {back}."
            found.append(Problem(f"objective.{name}", text, remedy))
    return found


def hidden_pairs(text: str) -> list[tuple[int, int]] | None:
    """`3:5,7:11` as (student layer, teacher layer) pairs; None for `final`. ValueError for any other text."""
    if text == FINAL:
        return None
    pairs = []
    for word in text.split(","):
        student, teacher = (int(number) for number in word.split(":"))
        if student < 0 or teacher < 0:
            raise ValueError(f"{word}: layers are numbered from 0")
        pairs.append((student, teacher))
    return pairs


def _pair_problem(text: str) -> Problem | None:
    try:
        hidden_pairs(text)
    except ValueError:
        problem = f"objective.hidden_layers={text!r} is neither `final` nor pairs student:teacher such as 3:5,7:11."
        return Problem("objective.hidden_layers", problem, "Number layers from 0.")
    return None


def tokenizer_problems(place: str, trained_with: str, ours: str | None, *, where: str, otherwise: str) -> list[Problem]:
    """A checkpoint that was trained with another tokenizer: the same ids stand for other text. No setting allows it.

    place: the checkpoint, as shown to the user. trained_with, ours: fingerprints; empty or None if unknown. where: the data or
    file that our tokenizer belongs to. otherwise: the remedy other than changing the data.
    """
    if not trained_with or not ours or trained_with == ours:
        return []
    text = (
        f"{place} was trained with another tokenizer ({trained_with[:12]}) than that of {where} ({ours[:12]}): the same ids "
        f"stand for other text."
    )
    remedy = f"Use data prepared with the tokenizer of {place} (data.folder, data.tokenizer.path), or {otherwise}."
    return [Problem("data.folder", text, remedy)]


def teacher_problems(
    recipe: Recipe, teacher: Named, *, tokenizer: str | None, start: Named | None = None, world: int | None = None
) -> list[Problem]:
    """Problems of a teacher that runs together with its student.

    tokenizer: fingerprint of the data's tokenizer. start: the checkpoint that a pruned student starts from. world: number of
    processes. None: not known.
    """
    assert teacher.manifest is not None
    if teacher.recipe is None:
        return [Problem("objective.teacher", teacher.recipe_error)]
    objective, model, path = recipe.objective, teacher.recipe.model, teacher.path
    found = language_model_problems(model, place=f"the teacher in {path}", key="objective.teacher")
    found += without_encoders_problems(
        model, place=f"the teacher in {path}", what="objective.kind=distill", key="objective.teacher"
    )
    found += dense_problems(
        model, place=f"the teacher in {path}", what="objective.kind=distill", key="objective.teacher"
    )
    found += teacher_vocabulary_problems(recipe, model, path=path)
    found += tokenizer_problems(
        f"the teacher in {path}",
        teacher.manifest.tokenizer,
        tokenizer,
        where=recipe.data.folder,
        otherwise="name another objective.teacher",
    )
    if tokenizer is not None and not teacher.manifest.tokenizer and not objective.trust_tokenizer:
        text = f"the checkpoint in {path} does not say which tokenizer it was trained with."
        remedy = f"If it is the tokenizer of {recipe.data.folder}, set objective.trust_tokenizer=true."
        found.append(Problem("objective.trust_tokenizer", text, remedy))
    found += degree_of_teacher_problems(recipe, teacher, world=world)
    if objective.hidden_match != "none" and objective.teacher_cache is None:
        found += _match_problems(recipe, teacher.recipe, start=start)
    return found


def teacher_vocabulary_problems(recipe: Recipe, model: ModelConfig, *, path: Path | None) -> list[Problem]:
    """A teacher whose vocabulary differs from the student's."""
    if (model.vocab, model.vocab_padding) == (recipe.model.vocab, recipe.model.vocab_padding):
        return []
    text = (
        f"the teacher in {path} has a vocabulary of {_vocabulary(model)}, the student (model.vocab) one of "
        f"{_vocabulary(recipe.model)}: their distributions cannot be compared."
    )
    remedy = "Use a teacher with the student's tokenizer, train the student with the teacher's, or use objective.kind=next_token."
    return [Problem("objective.teacher", text, remedy)]


def _vocabulary(model: ModelConfig) -> str:
    return f"{model.vocab:,}" + (f" ({model.vocab_padding:,} of it model.vocab_padding)" if model.vocab_padding else "")


def degree_of_teacher_problems(recipe: Recipe, teacher: Named, *, world: int | None) -> list[Problem]:
    """A tensor degree that does not fit the teacher's sizes or the ranks of the student's last stage."""
    assert teacher.recipe is not None
    tensor = recipe.objective.teacher_tensor or recipe.parallel.tensor
    shapes = layout_problems(
        model=teacher.recipe.model,
        parallel=ParallelConfig(tensor=tensor),
        run=replace(teacher.recipe.run, global_rows=1, microbatch_rows=1),
        row_tokens=recipe.data.row_tokens,
        world=tensor,
    )
    where = f"the teacher in {teacher.path} at objective.teacher_tensor={tensor}:"
    found = [Problem("objective.teacher_tensor", f"{where}\n{problem.text}", problem.remedy) for problem in shapes]
    if world is None:
        return found
    try:
        layout = lay_out(
            model=recipe.model, parallel=recipe.parallel, run=recipe.run, row_tokens=recipe.data.row_tokens, world=world
        )
    except RecipeError:
        return found  # the rules of the student's layout report this
    return found + degree_problems(layout, tensor=tensor)


def _match_problems(recipe: Recipe, teacher: Recipe, *, start: Named | None) -> list[Problem]:
    """Hidden states that cannot be compared: missing layers, layers of another stage, different widths."""
    objective, parallel, found = recipe.objective, recipe.parallel, []
    try:
        pairs = hidden_pairs(objective.hidden_layers) or []
        last = cut(recipe.model.pattern, parallel.pipeline * parallel.virtual_pipeline, model=recipe.model)[-1]
    except (ValueError, RecipeError):
        return []  # the rules of pairs and layouts report this
    depth, teacher_depth = len(layer_kinds(recipe.model.pattern)), len(layer_kinds(teacher.model.pattern))
    first = depth - len(last)
    for student_layer, teacher_layer in pairs:
        place = f"objective.hidden_layers={objective.hidden_layers}:"
        if student_layer >= depth or teacher_layer >= teacher_depth:
            text = f"{place} {student_layer}:{teacher_layer} does not exist."
            remedy = f"Use layers 0 to {depth - 1} of the student, 0 to {teacher_depth - 1} of the teacher."
            found.append(Problem("objective.hidden_layers", text, remedy))
        elif student_layer < first:
            text = (
                f"{place} layer {student_layer} of the student is not on its last pipeline stage (layers {first} to "
                f"{depth - 1}), where the teacher is."
            )
            found.append(Problem("objective.hidden_layers", text, "Match one of those."))
    lineage = start.manifest.lineage if start is not None and start.manifest is not None else {}
    return found + width_problems(recipe, teacher, lineage)


def width_problems(recipe: Recipe, teacher: Recipe, lineage: dict[str, Any]) -> list[Problem]:
    """Hidden states of different widths. lineage: of the checkpoint that the student starts from."""
    width, theirs = recipe.model.hidden, teacher.model.hidden
    if width == theirs or len(kept_channels(lineage, of=theirs) or ()) == width:
        return []
    text = (
        f"objective.hidden_match={recipe.objective.hidden_match} compares hidden states of width {width} (student) and "
        f"{theirs} (teacher). The widths must be equal, or the student must start from a checkpoint pruned from this teacher "
        f"(run.start_from)."
    )
    return [Problem("objective.hidden_match", text, "Use hidden_match=none.")]


def kept_channels(lineage: dict[str, Any], *, of: int) -> list[int] | None:
    """Residual channels left after one or more prunings of an ancestor with `of` channels; None if no ancestor had `of`."""
    kept: list[int] | None = None
    while lineage:
        if not lineage.get("kept"):  # a merge of checkpoints that were pruned alike: what was pruned is one level up
            lineage = lineage.get("before") or {}
            continue
        chosen: list[int] = lineage["kept"]["hidden"]
        # Each pruning numbers channels by its own parent: map them to the numbers of the ancestor, one level up.
        kept = chosen if kept is None else [chosen[index] for index in kept]
        if lineage["parent_model"]["hidden"] == of:
            return kept
        lineage = lineage["before"]
    return None


def cache_problems(
    recipe: Recipe, request: CacheRequest, *, tokenizer: str | None, teacher: Named | None
) -> list[Problem]:
    """Differences between a teacher cache and the recipe. tokenizer: fingerprint of the data's tokenizer."""
    objective, found = recipe.objective, []
    place = f"objective.teacher_cache={objective.teacher_cache} does not match this recipe:"
    remedy = "Use the values that the cache was written with, or write another folder: stratum teacher-cache."

    def differs(key: str, text: str) -> None:
        found.append(Problem(key, f"{place} {text}.", remedy))

    for name, cached, value in (
        ("model.vocab", request.vocab, recipe.model.real_vocab),
        ("objective.temperature", request.temperature, objective.temperature),
        ("data.row_tokens", request.row_tokens, recipe.data.row_tokens),
        ("data.reset_at_documents", request.documents, recipe.data.reset_at_documents),
    ):
        if cached != value:
            differs(name, f"{name}={value}, but the cache was written with {cached}")
    if tokenizer is not None and request.tokenizer != tokenizer:
        theirs = request.tokenizer[:12] or "?"
        differs("data.folder", f"tokenizer {tokenizer[:12]} in {recipe.data.folder}, but the teacher's is {theirs}")
    if objective.top_k > request.top_k:
        differs("objective.top_k", f"objective.top_k={objective.top_k}, but only {request.top_k} tokens are stored")
    # Training from the cache does not need the teacher, so it may be deleted.
    manifest = teacher.manifest if teacher is not None else None
    if teacher is not None and manifest is not None and manifest.fingerprint != request.fingerprint:
        text = (
            f"{place} objective.teacher={teacher.place} is {teacher.path} with weights {manifest.fingerprint[:12]}, but "
            f"the cache was written by {request.teacher} with weights {request.fingerprint[:12]}."
        )
        found.append(Problem("objective.teacher", text, "Use objective.teacher=null, or a cache of this teacher."))
    return found
