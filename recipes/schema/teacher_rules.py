"""Rules of distillation: what an objective says, what its teacher or the teacher's stored answers say against it.

Reached through `recipes.schema.rules.problems`; the trainer calls single ones again where it opens the teacher.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.schema.errors import Problem, RecipeError
from recipes.schema.facts import CacheRequest, Named
from recipes.schema.layout import lay_out, layout_problems
from recipes.schema.model import ModelConfig
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import cut, layer_kinds
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_placement import degree_problems

FINAL = "final"


def distill_problems(recipe: Recipe) -> list[Problem]:
    """Everything about an objective that the recipe alone shows to be wrong."""
    objective = recipe.objective
    if objective.kind != "distill":
        return []
    found = []
    if objective.teacher is None and objective.teacher_cache is None:
        text = "objective.kind=distill needs objective.teacher or objective.teacher_cache."
        remedy = (
            "Name a checkpoint folder or a run folder such as runs/NAME, or what `stratum teacher-cache` wrote; or use "
            "objective=next_token."
        )
        found.append(Problem("objective.teacher", text, remedy))
    if objective.top_k > recipe.model.vocab:
        text = f"objective.top_k={objective.top_k} is more than the vocabulary, model.vocab={recipe.model.vocab}."
        found.append(Problem("objective.top_k", text, "Use 0 for the whole distribution, or fewer tokens."))
    if objective.hidden_match == "none":
        return found + _without_match(objective)
    if objective.teacher_cache is not None:
        text = (
            f"objective.hidden_match={objective.hidden_match} needs the teacher itself; objective.teacher_cache holds its "
            f"answers only."
        )
        found.append(Problem("objective.hidden_match", text, "Use hidden_match=none, or teacher_cache=null."))
    elif objective.hidden_layers != FINAL and recipe.parallel.recompute != "none":
        text = (
            f"objective.hidden_layers={objective.hidden_layers} needs activations that parallel.recompute="
            f"{recipe.parallel.recompute} throws away."
        )
        remedy = "Use hidden_layers=final, or parallel.recompute=none."
        found.append(Problem("objective.hidden_layers", text, remedy))
    if pair_problem := _pair_problem(objective.hidden_layers):
        found.append(pair_problem)
    return found


def cache_command_problems(recipe: Recipe) -> list[Problem]:
    """What `stratum teacher-cache` needs, beyond what distillation needs."""
    objective, found = recipe.objective, []
    if objective.teacher is None:
        text = "objective.teacher is not set."
        found.append(Problem("objective.teacher", text, "Name a checkpoint folder, or a run folder such as runs/NAME."))
    if objective.teacher_cache is None or not objective.top_k:
        folder = objective.teacher_cache or "null"
        text = f"objective.teacher_cache={folder} and objective.top_k={objective.top_k} do not say what is kept where."
        remedy = "Say where answers go and how many tokens of each: objective.teacher_cache=FOLDER objective.top_k=64."
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
            remedy = f"Use hidden_match=cosine or mse, or leave {name} at {back}."
            found.append(Problem(f"objective.{name}", text, remedy))
    return found


def hidden_pairs(text: str) -> list[tuple[int, int]] | None:
    """`3:5,7:11` as pairs of layers, student and teacher; None for `final`. ValueError for another text."""
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
        said = f"objective.hidden_layers={text!r} is neither `final` nor pairs student:teacher such as 3:5,7:11."
        return Problem("objective.hidden_layers", said, "Number layers from 0.")
    return None


def tokenizer_problems(place: str, trained_with: str, ours: str | None, *, where: str, otherwise: str) -> list[Problem]:
    """A checkpoint of another tokenizer than the one at hand: the same ids would be other text. Nothing allows it.

    place: the checkpoint, as people know it. trained_with, ours: fingerprints; empty or None where one is not known. where: the
    data or file of our tokenizer. otherwise: what to do instead of changing the data.
    """
    if not trained_with or not ours or trained_with == ours:
        return []
    text = (
        f"{place} was trained with another tokenizer ({trained_with[:12]}) than that of {where} ({ours[:12]}): the same ids "
        f"stand for other text."
    )
    remedy = f"Use data made with the first (data.folder, data.tokenizer.path), or {otherwise}."
    return [Problem("data.folder", text, remedy)]


def teacher_problems(
    recipe: Recipe, teacher: Named, *, tokenizer: str | None, start: Named | None = None, world: int | None = None
) -> list[Problem]:
    """What speaks against a teacher that answers while its student trains.

    tokenizer: fingerprint of the data's; None: not known. start: the checkpoint a pruned student begins with. world: processes;
    None: not known.
    """
    assert teacher.manifest is not None
    if teacher.recipe is None:
        return [Problem("objective.teacher", teacher.recipe_error)]
    objective, model, path = recipe.objective, teacher.recipe.model, teacher.path
    found = teacher_vocabulary_problems(recipe, model, path=path)
    found += tokenizer_problems(
        f"the teacher in {path}",
        teacher.manifest.tokenizer,
        tokenizer,
        where=recipe.data.folder,
        otherwise="name another objective.teacher",
    )
    if tokenizer is not None and not teacher.manifest.tokenizer and not objective.trust_tokenizer:
        text = f"the checkpoint in {path} does not say which tokenizer its model was trained with."
        remedy = f"If it is that of {recipe.data.folder}, say objective.trust_tokenizer=true."
        found.append(Problem("objective.trust_tokenizer", text, remedy))
    found += degree_of_teacher_problems(recipe, teacher, world=world)
    if objective.hidden_match != "none" and objective.teacher_cache is None:
        found += _match_problems(recipe, teacher.recipe, start=start)
    return found


def teacher_vocabulary_problems(recipe: Recipe, model: ModelConfig, *, path: Path | None) -> list[Problem]:
    """A teacher of another vocabulary than the student's."""
    if model.vocab == recipe.model.vocab:
        return []
    text = (
        f"the teacher in {path} has a vocabulary of {model.vocab:,}, the student (model.vocab) one of "
        f"{recipe.model.vocab:,}: their distributions cannot be compared."
    )
    remedy = "Use a teacher with the student's tokenizer, train the student on the teacher's, or use objective.kind=next_token."
    return [Problem("objective.teacher", text, remedy)]


def degree_of_teacher_problems(recipe: Recipe, teacher: Named, *, world: int | None) -> list[Problem]:
    """A tensor degree that does not fit the teacher's sizes, or the ranks of the student's last stage."""
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
        return found  # reported as problems of the student's layout
    return found + degree_problems(layout, tensor=tensor)


def _match_problems(recipe: Recipe, teacher: Recipe, *, start: Named | None) -> list[Problem]:
    """Hidden states that cannot be compared: layers that do not exist or are on another stage, other widths."""
    objective, parallel, found = recipe.objective, recipe.parallel, []
    try:
        pairs = hidden_pairs(objective.hidden_layers) or []
        last = cut(recipe.model.pattern, parallel.pipeline * parallel.virtual_pipeline, model=recipe.model)[-1]
    except (ValueError, RecipeError):
        return []  # reported by the rules of pairs and layouts
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
    """Hidden states of two widths. lineage: of the checkpoint the student starts from."""
    width, theirs = recipe.model.hidden, teacher.model.hidden
    if width == theirs or len(kept_channels(lineage, of=theirs) or ()) == width:
        return []
    text = (
        f"objective.hidden_match={recipe.objective.hidden_match} compares hidden states of width {width} (student) and "
        f"{theirs} (teacher). That needs one width, or a student that starts from a checkpoint pruned from this teacher "
        f"(run.start_from)."
    )
    return [Problem("objective.hidden_match", text, "Use hidden_match=none.")]


def kept_channels(lineage: dict[str, Any], *, of: int) -> list[int] | None:
    """Of a forebear's `of` residual channels, those left after one or more prunings; None where none was that wide."""
    kept: list[int] | None = None
    while lineage.get("kept"):
        chosen: list[int] = lineage["kept"]["hidden"]
        kept = chosen if kept is None else [chosen[place] for place in kept]
        if lineage["parent_model"]["hidden"] == of:
            return kept
        lineage = lineage["before"]
    return None


def cache_problems(
    recipe: Recipe, request: CacheRequest, *, tokenizer: str | None, teacher: Named | None
) -> list[Problem]:
    """What a folder of teacher's answers was made for that the recipe is not. tokenizer: fingerprint of the data's."""
    objective, found = recipe.objective, []
    place = f"objective.teacher_cache={objective.teacher_cache} does not fit this recipe:"
    remedy = "Use the values the answers were made with, or write the answers again into another folder: stratum teacher-cache."

    def differs(key: str, text: str) -> None:
        found.append(Problem(key, f"{place} {text}.", remedy))

    for name, kept, asked in (
        ("model.vocab", request.vocab, recipe.model.vocab),
        ("objective.temperature", request.temperature, objective.temperature),
        ("data.row_tokens", request.row_tokens, recipe.data.row_tokens),
        ("data.reset_at_documents", request.documents, recipe.data.reset_at_documents),
    ):
        if kept != asked:
            differs(name, f"{name}={asked}, but the teacher was asked with {kept}")
    if tokenizer is not None and request.tokenizer != tokenizer:
        theirs = request.tokenizer[:12] or "?"
        differs("data.folder", f"tokenizer {tokenizer[:12]} in {recipe.data.folder}, but the teacher's is {theirs}")
    if objective.top_k > request.top_k:
        differs("objective.top_k", f"objective.top_k={objective.top_k}, but only {request.top_k} tokens are kept")
    manifest = teacher.manifest if teacher is not None else None  # one that is gone is not needed
    if teacher is not None and manifest is not None and manifest.fingerprint != request.fingerprint:
        text = (
            f"{place} objective.teacher={teacher.place} is {teacher.path} with weights {manifest.fingerprint[:12]}, but "
            f"{request.teacher} with weights {request.fingerprint[:12]} answered."
        )
        found.append(Problem("objective.teacher", text, "Use objective.teacher=null, or the answers of the other."))
    return found
