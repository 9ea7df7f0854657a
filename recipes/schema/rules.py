"""Every rule that spans the fields of a recipe, once. `problems` is the one entry: it collects everything that is wrong.

    recipe --+
    world, machine (GPU? packages?), disk (checkpoints it names), prepared data --+--> problems --> [Problem(key, text, remedy)]

The trainer, the planner and the launchers pass the facts they have; a rule whose fact is not known (None) is left out. So
what can be known before a start is refused before it, in the very sentence the trainer would use. Ranges and types of
single fields are `recipes.schema.fields`'. Rules of layouts, schedules, patterns and shapes are next to the arithmetic they
protect (`layout`, `schedule`, `pattern`, `scaling`, `teacher_rules`) and are reached through `problems` too.
"""

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from recipes.schema.changes import check_folder, differences, refused
from recipes.schema.data import DataConfig, PhaseConfig
from recipes.schema.errors import Problem, RecipeError
from recipes.schema.errors import refuse as refuse
from recipes.schema.evaluate import EvaluateConfig
from recipes.schema.facts import BLOCK_SCALES, Disk, Machine, Named, Prepared
from recipes.schema.launch_rules import environment_problems
from recipes.schema.layout import layout_problems
from recipes.schema.manifest import Manifest
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.optim import ScheduleConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import layer_kinds, pattern_problems, weights_of
from recipes.schema.precision import PrecisionConfig
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import block_notes, low_precision_linears, rotation_problems, scalings_used, shape_problems
from recipes.schema.schedule import schedule_problems, unread
from recipes.schema.tasks import task_problems
from recipes.schema.teacher_rules import cache_problems, distill_problems, teacher_problems, tokenizer_problems
from recipes.schema.weight_formats import rounding_problems

Backend = Literal["reference", "emulated", "te"]
_LONGEST_NAME = 200
"""Characters of a part of a run's name: with what saves and logs add to it, a file's name (255 bytes)."""


def problems(
    recipe: Recipe,
    *,
    world: int | None = None,
    machine: Machine | None = None,
    disk: Disk | None = None,
    prepared: Prepared | None = None,
    here: bool = True,
) -> list[Problem]:
    """Everything that keeps a recipe from running, in the order of its groups; [] if it can start.

    world: processes. machine, disk, prepared: facts (`recipes.schema.facts`); None if they are not known. here: False where
    the run will start elsewhere, so that what is not on this disk may be there.
    """
    found = [
        *name_problems(recipe.run.name),
        *data_problems(recipe.data),
        *schedule_problems(
            recipe.schedule,
            total_steps=recipe.run.steps,
            tokens_per_step=recipe.run.global_rows * recipe.data.row_tokens,
        ),
        *layout_problems(
            model=recipe.model,
            parallel=recipe.parallel,
            run=recipe.run,
            row_tokens=recipe.data.row_tokens,
            world=world,
        ),
        *environment_problems(recipe.launch.environment),
        *distill_problems(recipe),
        *task_problems(recipe.evaluate.tasks, row_tokens=recipe.data.row_tokens, reads_files=here and disk is not None),
    ]
    if not pattern_problems(recipe.model.pattern):
        found += precision_problems(recipe, machine)
    if disk is not None:
        found += disk_problems(recipe, disk, prepared=prepared, here=here, world=world)
    if prepared is not None and (here or prepared.is_here):
        found += prepared_problems(recipe, prepared)
    return list({str(problem): problem for problem in found}.values())


def reading_problems(recipe: Recipe) -> list[Problem]:
    """What keeps commands from using a recipe that do not train with it: how it would train does not matter to them."""
    return problems(
        dataclasses.replace(
            recipe,
            parallel=ParallelConfig(),
            precision=PrecisionConfig(),
            objective=ObjectiveConfig(),
            schedule=ScheduleConfig(),
            evaluate=EvaluateConfig(),
        )
    )


def notes(recipe: Recipe, *, machine: Machine | None = None, prepared: Prepared | None = None) -> list[Problem]:
    """What is allowed and probably not meant: the plan shows it as a warning, training logs it once."""
    found = []
    if idle := unused(recipe.objective):
        text = f"objective.kind=next_token trains on next tokens; not used: {idle}."
        found.append(Problem("objective.kind", text))
    if idle := unread(recipe.schedule):
        found.append(Problem("schedule.decay", f"{idle}."))
    precision = recipe.precision
    if precision.switch_at_tokens is None and precision.scaling_after != "none":
        text = f"precision.scaling_after={precision.scaling_after} is never used: precision.switch_at_tokens=null."
        found.append(Problem("precision.scaling_after", text, "Set switch_at_tokens, or scaling_after=none."))
    if machine is not None and backend_name(precision, _of_run(recipe, machine)) != "te":
        shapes = "; ".join(str(problem) for problem in _shapes(recipe))
        if shapes:
            found.append(Problem("precision.scaling", f"a GPU would refuse this recipe: {shapes}"))
    found += block_notes(recipe.model, precision=precision, tensor=recipe.parallel.tensor)
    if prepared is not None:
        if 0 < prepared.vocab_size < recipe.model.real_vocab:
            text = (
                f"model.vocab={recipe.model.vocab:,} is larger than the vocabulary of {prepared.vocab_size:,} in "
                f"{recipe.data.folder}: {recipe.model.real_vocab - prepared.vocab_size:,} rows never see a token, but "
                f"count in the loss."
            )
            padding = recipe.model.vocab - prepared.vocab_size
            remedy = f"Set model.vocab_padding={padding} to leave them out, or use model.vocab={prepared.vocab_size}."
            found.append(Problem("model.vocab", text, remedy))
        for name, row in prepared.exhausted:
            text = (
                f"source {name!r} has been read max_epochs={recipe.data.sources[name].max_epochs or 0:g} times at step "
                f"{row // recipe.run.global_rows + 1:,}: the others take its place from there (data.on_exhausted=continue)."
            )
            found.append(Problem(f"data.sources.{name}.max_epochs", text))
    return found


def name_problems(name: str) -> list[Problem]:
    """Names that are not a folder's inside run.folder. Blanks are allowed, and `/` between parts."""
    parts = name.split("/")
    odd = sorted(
        {character for character in name if unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"}
    )
    why = ""
    if not name.strip():
        why = "is empty"
    elif odd:
        why = f"contains {', '.join(ascii(character) for character in odd[:3])}, which a folder's name should not"
    elif name.startswith("/"):
        why = "starts with `/`; run.folder says where runs are"
    elif name.startswith("-"):
        why = "starts with `-`, which commands would read as an option"
    elif any(part.strip() in ("", ".", "..") for part in parts):
        why = "has an empty part, `.` or `..`, and would leave run.folder or share another run's"
    elif any(len(part.encode()) > _LONGEST_NAME for part in parts):
        why = f"is longer than {_LONGEST_NAME} bytes"
    if not why:
        return []
    return [Problem("run.name", f"run.name={name!r} {why}.", "Use letters, digits, blanks, and - _ . = , +")]


def data_problems(data: DataConfig) -> list[Problem]:
    """What a recipe says of its sources that cannot be meant, whatever is prepared."""
    if not data.sources:
        text, remedy = "data.sources is empty.", "Name at least one source, e.g. data.sources.mine.path=texts/*.jsonl."
        return [Problem("data.sources", text, remedy)]
    found = [problem for name in data.sources for problem in source_problems(data, name)]
    found += chat_problems(data)
    weights = {name: source.weight for name, source in data.sources.items()}
    return found + order_problems(weights, data.phases, row_tokens=data.row_tokens)


def chat_problems(data: DataConfig) -> list[Problem]:
    """What a recipe with sources of chats excludes."""
    if not data.chats:
        return []
    found, name = [], data.chats[0]
    if not data.reset_at_documents and data.chat.packing == "rows":
        text = (
            f"source {name!r} has chats, of which a row holds several, and data.reset_at_documents=false lets them see each "
            f"other."
        )
        remedy = "Set reset_at_documents=true, or data.chat.packing=single."
        found.append(Problem("data.reset_at_documents", text, remedy))
    if data.fim.rate:
        text = (
            f"data.fim.rate={data.fim.rate:g} rearranges documents, but source {name!r} has chats, whose order is what is "
            f"learned."
        )
        found.append(Problem("data.fim.rate", text, "Set it to 0."))
    if data.chat.template == "plain":
        text = "data.chat.template=plain does not end an answer: a model that learns it would never stop."
        found.append(Problem("data.chat.template", text, "Use turns, which ends it with the end-of-document token."))
    if data.chat.cut_thinking_min > data.chat.cut_thinking_max:
        text = (
            f"data.chat.cut_thinking_min={data.chat.cut_thinking_min} is above "
            f"cut_thinking_max={data.chat.cut_thinking_max}."
        )
        found.append(Problem("data.chat.cut_thinking_min", text, "Set it to at most that."))
    for name in data.chats:
        source = data.sources[name]
        if source.format in ("text", "megatron"):
            text = f"data.sources.{name}.format={source.format} has no records with messages, which kind=chat needs."
            found.append(Problem(f"data.sources.{name}.format", text, "Use jsonl, parquet or a set."))
        if source.template is not None:
            text = f"data.sources.{name}.template makes text of fields, but the source is of kind chat."
            found.append(Problem(f"data.sources.{name}.template", text, "Set data.chat.template instead."))
    return found


def source_problems(data: DataConfig, name: str) -> list[Problem]:
    """A source's name, and a source that is kept for evaluation and drawn from."""
    found = []
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        text = f"data.sources.{name!r}: the source's name becomes a file's name."
        found.append(Problem(f"data.sources.{name}", text, "Use letters, digits, - and _."))
    source = data.sources[name]
    if source.heldout_fraction == 1:
        drawn = [f"data.sources.{name}.weight={source.weight:g}"] if source.weight else []
        for index, phase in enumerate(data.phases):
            if phase.weights.get(name):
                drawn.append(f"data.phases[{index}].weights.{name}={phase.weights[name]:g}")
        if drawn:
            text = (
                f"data.sources.{name}.heldout_fraction=1 keeps all of the source for evaluation, but {drawn[0]} draws from "
                f"it."
            )
            key = f"data.sources.{name}.heldout_fraction"
            found.append(Problem(key, text, "Set that to 0, or hold out less."))
    return found


def order_problems(weights: Mapping[str, float], phases: Sequence[PhaseConfig], *, row_tokens: int) -> list[Problem]:
    """Weights and phases that say nothing or contradict each other. weights: of the start, by source."""
    found, end = _weight_problems(weights, "data.sources"), 0
    for index, phase in enumerate(phases):
        where = f"data.phases[{index}]"
        unknown = [name for name in phase.weights if name not in weights]
        if unknown:
            text = f"{where}.weights names {', '.join(unknown)}; data.sources has {', '.join(weights)}."
            found.append(Problem(f"{where}.weights", text, "Name sources of data.sources."))
        start, ramp = -(-phase.from_tokens // row_tokens), -(-phase.ramp_tokens // row_tokens)
        if start < max(1, end):
            text = (
                f"{where}.from_tokens={phase.from_tokens:,} is before the end of the phase before it, ramp included "
                f"({end * row_tokens:,} tokens)."
            )
            found.append(Problem(f"{where}.from_tokens", text, "Put phases in order, or shorten the ramp."))
        end = start + ramp
        found += _weight_problems(phase.weights, f"{where}.weights")
    return found


def _weight_problems(weights: Mapping[str, float], where: str) -> list[Problem]:
    if any(weights.values()):
        return []
    text = f"{where}: all weights are 0, so there is nothing to draw."
    return [Problem(where, text, "Give one source a weight above 0.")]


def device_problems(device: str, *, has_gpu: bool) -> list[Problem]:
    """A GPU that is asked for and not there. has_gpu: whether this machine has one."""
    if device != "cuda" or has_gpu:
        return []
    text = "run.device=cuda, but there is no GPU on this machine that torch can use."
    return [Problem("run.device", text, "Use run.device=auto or cpu.")]


def backend_name(precision: PrecisionConfig, machine: Machine) -> Backend:
    """The backend that runs on a machine: `auto` is `te` where that can run, else `emulated` for low precision."""
    used = scalings_used(precision)
    if precision.backend != "auto":
        return precision.backend
    if precision.quantize_weights != "none":
        return "reference"
    if machine.has_gpu and not machine.missing and "unscaled" not in used:
        return "te"
    return "emulated" if used else "reference"


def precision_problems(recipe: Recipe, machine: Machine | None) -> list[Problem]:
    """Number formats and backends that exclude each other, or that the machine or the model's shapes cannot do."""
    precision, used = recipe.precision, scalings_used(recipe.precision)
    found = device_problems(recipe.run.device, has_gpu=machine.has_gpu) if machine is not None else []
    found += low_precision_problems(precision)
    if machine is None and recipe.run.device == "cpu":
        machine = Machine(has_gpu=False)
    if machine is None:
        return found + shape_rules(recipe, backend=precision.backend)
    machine = _of_run(recipe, machine)
    backend = backend_name(precision, machine)
    found += backend_problems(precision, machine) + shape_rules(recipe, backend=backend)
    if backend == "te":
        for scaling in used:
            found += _generation_problems("precision.scaling", scaling, machine)
    objective = recipe.objective
    if objective.kind == "distill" and objective.teacher_cache is None and machine.has_gpu and not machine.missing:
        found += _generation_problems("objective.teacher_scaling", objective.teacher_scaling, machine)
    return found


def shape_rules(recipe: Recipe, *, backend: str) -> list[Problem]:
    """Layers and shapes that low precision has no use for, or that a backend cannot take."""
    precision, used, found = recipe.precision, scalings_used(recipe.precision), []
    if used and not low_precision_linears(recipe.model, precision):
        layers = len(layer_kinds(recipe.model.pattern))
        text = (
            f"precision.scaling={'/'.join(used)}, but high_precision_first={precision.high_precision_first} and "
            f"high_precision_last={precision.high_precision_last} keep all {layers} layers in high precision."
        )
        remedy = f"Lower them to less than {layers} together, or use precision.scaling=none."
        found.append(Problem("precision.high_precision_first", text, remedy))
    found += rotation_problems(recipe.model, precision=precision, rank_tokens=_rank_tokens(recipe))
    found += rounding_problems(recipe.model, precision=precision, tensor=recipe.parallel.tensor)
    return found + (_shapes(recipe) if backend == "te" else [])


def low_precision_problems(precision: PrecisionConfig) -> list[Problem]:
    """What excludes each other in `precision` on every machine."""
    used, found = scalings_used(precision), []
    if "unscaled" in used and precision.backend == "te":
        text = "precision.scaling=unscaled is an example of what goes wrong; only precision.backend=emulated has it."
        found.append(Problem("precision.scaling", text, "Use current, delayed or blockwise."))
    if used and precision.backend == "reference":
        text = f"precision.backend=reference computes in high precision only, but precision.scaling={'/'.join(used)}."
        found.append(Problem("precision.backend", text, "Use precision.backend=emulated or te, or scaling=none."))
    if not precision.fp8_weights:
        return found
    if precision.backend in ("reference", "emulated"):
        text = f"precision.fp8_weights=true: only `te` keeps weights in FP8, but precision.backend={precision.backend}."
        found.append(Problem("precision.fp8_weights", text, "Set fp8_weights=false."))
    if not used:
        text = "precision.fp8_weights=true needs a low-precision recipe."
        found.append(Problem("precision.fp8_weights", text, "Set precision.scaling, or fp8_weights=false."))
    if "delayed" in used and (precision.high_precision_first or precision.high_precision_last):
        text = "precision.fp8_weights=true with delayed scaling keeps the weights of every layer in FP8."
        remedy = "Set high_precision_first and high_precision_last to 0, or use another scaling, or fp8_weights=false."
        found.append(Problem("precision.fp8_weights", text, remedy))
    return found


def backend_problems(precision: PrecisionConfig, machine: Machine) -> list[Problem]:
    """What a backend lacks on a machine. machine: of the run, its device counted (`run.device=cpu` has no GPU)."""
    missing = ", ".join(machine.missing if machine.has_gpu else ["a GPU"])
    found = []
    if precision.backend == "te" and missing:
        text = f"precision.backend=te needs {missing}."
        remedy = (
            "Use precision.backend=emulated (low precision) or reference, or install the `gpu` extra "
            "(`pip install -e '.[gpu]'`) on a machine with a GPU."
        )
        found.append(Problem("precision.backend", text, remedy))
    if precision.backend == "auto" and precision.fp8_weights and backend_name(precision, machine) != "te":
        why = f"needs {missing}" if missing else "has no scaling=unscaled"
        text = f"precision.fp8_weights=true: only `te` keeps weights in FP8, which {why}."
        found.append(Problem("precision.fp8_weights", text, "Set fp8_weights=false."))
    if backend_name(precision, machine) == "te":
        found += block_scale_problems(precision, fp32=machine.fp32_block_scales)
    return found


def block_scale_problems(precision: PrecisionConfig, *, fp32: bool) -> list[Problem]:
    """Block scales of another kind than Transformer Engine takes from the environment when it is imported."""
    if "blockwise" not in scalings_used(precision) or fp32 != precision.power_of_two_scales:
        return []
    text = (
        f"precision.power_of_two_scales={str(precision.power_of_two_scales).lower()}, but {BLOCK_SCALES} is "
        f"{'1' if fp32 else 'not 1'} in the environment."
    )
    wanted = f"{BLOCK_SCALES}={int(not precision.power_of_two_scales)}"
    return [Problem("precision.power_of_two_scales", text, f"Start with {wanted} (launch.environment={wanted}).")]


def _generation_problems(field: str, scaling: str, machine: Machine) -> list[Problem]:
    """Scalings that a GPU has no arithmetic for; nothing where its generation is not known."""
    generation, text, remedy = machine.generation, "", ""
    if not generation or scaling in ("none", "unscaled"):
        return []
    if scaling in ("mxfp8", "nvfp4") and not generation.startswith("blackwell"):
        text = f"{field}={scaling} needs a Blackwell GPU; {machine.name} is {generation}."
        best = "blockwise" if generation == "hopper" else "current" if machine.has_fp8 else "none"
        remedy = f"Use {field}={best}, precision.backend=emulated, or a Blackwell GPU."
    elif not machine.has_fp8:
        text = f"{field}={scaling}: {machine.name} ({generation}) has no FP8 matrix products."
        remedy = f"Use {field}=none, or a Hopper GPU."
    elif scaling == "blockwise" and generation == "ada":
        text = f"{field}=blockwise needs a Hopper GPU or a newer one; {machine.name} is {generation}."
        remedy = f"Use {field}=current."
    return [Problem(field, text, remedy)] if text else []


def _of_run(recipe: Recipe, machine: Machine) -> Machine:
    """The machine as a run with its `run.device` uses it."""
    return dataclasses.replace(machine, has_gpu=machine.has_gpu and recipe.run.device != "cpu")


def _rank_tokens(recipe: Recipe) -> int:
    return recipe.run.microbatch_rows * recipe.data.row_tokens // recipe.parallel.context


def _shapes(recipe: Recipe) -> list[Problem]:
    return shape_problems(
        recipe.model, parallel=recipe.parallel, precision=recipe.precision, rank_tokens=_rank_tokens(recipe)
    )


def disk_problems(
    recipe: Recipe, disk: Disk, *, prepared: Prepared | None, here: bool, world: int | None
) -> list[Problem]:
    """What the checkpoints and answers that a recipe names, and the run's own folder, say against it."""
    found, tokenizer = [], (prepared.tokenizer or None) if prepared is not None else None
    taught_by = None
    for field, place in (("objective.teacher", disk.teacher), ("run.start_from", disk.start)):
        if place is None:
            continue
        needed = field == "run.start_from" or recipe.objective.teacher_cache is None
        if place.error and needed and (here or place.is_here):
            found.append(Problem(field, f"{field}: {place.error}"))
    if recipe.objective.kind == "distill" and recipe.objective.teacher_cache is not None:
        if disk.cache is not None:
            taught_by = disk.cache.identity
            found += cache_problems(recipe, disk.cache, tokenizer=tokenizer, teacher=disk.teacher)
        elif disk.cache_error and (here or disk.cache_is_here):
            found.append(Problem("objective.teacher_cache", disk.cache_error))
    elif disk.teacher is not None and disk.teacher.manifest is not None:
        taught_by = disk.teacher.identity
        found += teacher_problems(recipe, disk.teacher, tokenizer=tokenizer, start=disk.start, world=world)
    if disk.start is not None and disk.start.manifest is not None:
        found += start_problems(recipe, disk.start, tokenizer=tokenizer)
    return found + _run_problems(recipe, disk, prepared=prepared, taught_by=taught_by)


def start_problems(recipe: Recipe, start: Named, *, tokenizer: str | None) -> list[Problem]:
    """What speaks against the weights a run begins with. tokenizer: fingerprint of the data's; None: not known."""
    assert start.manifest is not None
    found = tokenizer_problems(
        f"run.start_from={start.place}",
        start.manifest.tokenizer,
        tokenizer,
        where=recipe.data.folder,
        otherwise="name another run.start_from",
    )
    if start.recipe is not None and not pattern_problems(recipe.model.pattern):
        ours, theirs = weights_of(recipe.model), weights_of(start.recipe.model)
        keys = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        differing = [f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys]
        if differing:
            text = f"run.start_from={start.place} has weights of another model ({'; '.join(differing)})."
            found.append(Problem("run.start_from", text, "Use its model, or name a checkpoint of this one."))
    return found


def _run_problems(
    recipe: Recipe, disk: Disk, *, prepared: Prepared | None, taught_by: dict[str, object] | None
) -> list[Problem]:
    """What the run's own folder says against going on in it."""
    found = []
    folder = Path(recipe.run.folder) / recipe.run.name
    try:
        check_folder(folder, recipe)
    except RecipeError as error:
        found.append(Problem("run.name", str(error)))
    if disk.newest is not None and disk.newest.manifest is not None:
        found += resume_problems(
            recipe,
            disk.newest.manifest,
            place=str(disk.newest.path),
            tokenizer=prepared.tokenizer if prepared is not None else "",
            data_hash=prepared.hash if prepared is not None else "",
            taught_by=taught_by,
        )
    elif disk.lost is not None:
        found.append(disk.lost)
    elif recipe.checkpoint.resume == "required":
        found.append(required_problem(folder / "checkpoints"))
    return found


def required_problem(checkpoints: Path) -> Problem:
    """`checkpoint.resume=required` in a folder without a checkpoint."""
    text = f"checkpoint.resume=required, but {checkpoints} holds no checkpoint."
    return Problem("checkpoint.resume", text, "Use checkpoint.resume=auto to start from the beginning.")


def resume_problems(
    recipe: Recipe,
    manifest: Manifest,
    *,
    place: str,
    tokenizer: str = "",
    data_hash: str = "",
    kernels: str = "",
    taught_by: Mapping[str, object] | None = None,
) -> list[Problem]:
    """Why a run may not continue from a checkpoint of its own. place: the checkpoint's folder.

    tokenizer, data_hash: of the data now; kernels: `RunState.kernels` now; empty if they are not known. taught_by: the teacher
    now (`identity_of`).
    """
    found = []
    if recipe.checkpoint.resume == "never":
        text = f"checkpoint.resume=never, but {Path(place).parent} already holds {Path(place).name}."
        remedy = "Choose another run.name, or checkpoint.resume=auto to continue."
        found.append(Problem("checkpoint.resume", text, remedy))
    found += tokenizer_problems(
        place, manifest.tokenizer, tokenizer or None, where=recipe.data.folder, otherwise="choose another run.name"
    )
    if manifest.data_hash and data_hash not in ("", manifest.data_hash) and "data_order" not in recipe.checkpoint.allow:
        text = (
            f"{place} was trained on data {manifest.data_hash[:12]}, but {recipe.data.folder} now holds {data_hash[:12]}: rows "
            f"would no longer be the ones counted."
        )
        remedy = (
            "Point data.folder at the old data, start a new run with another run.name, or add checkpoint.allow=[data_order] "
            "to go on with other rows."
        )
        found.append(Problem("data.folder", text, remedy))
    if manifest.recipe:
        why = refused(differences(manifest.recipe, recipe_mapping(recipe)), recipe.checkpoint.allow)
        if why is not None:
            found.append(Problem("run.name", f"{place} was trained with another recipe:{why}"))
    before = manifest.lineage.get("teacher")
    may_change = "arithmetic" in recipe.checkpoint.allow
    if kernels_differ(manifest.kernels, kernels) and not may_change:
        # A missing compiler or a full cache must not change a run unnoticed.
        text = f"{place} was trained with kernels {manifest.kernels}; this start has them {kernels}: bits will differ."
        remedy = (
            "Restore what they were built with (a C compiler; a cache folder that only you can write; STRATUM_NATIVE), or add "
            "checkpoint.allow=[arithmetic] to continue with these."
        )
        found.append(Problem("checkpoint.allow", text, remedy))
    if before and taught_by and before["fingerprint"] != taught_by["fingerprint"] and not may_change:
        text = f"{place} learned from {named_teacher(before)}; the teacher is {named_teacher(taught_by)} now."
        remedy = (
            f"Add checkpoint.allow=[arithmetic] to go on with it (and objective.teacher={before['checkpoint']} to go on with "
            f"the first), or choose another run.name."
        )
        found.append(Problem("objective.teacher", text, remedy))
    return found


def kernels_differ(before: str, now: str) -> bool:
    """Whether both are known and not the same: the device is a choice of its own, and old checkpoints do not say."""
    return bool(before and now and before != now)


def named_teacher(teacher: Mapping[str, object] | None) -> str:
    """A teacher's identity for people."""
    return f"{teacher['checkpoint']} (weights {str(teacher['fingerprint'])[:12]})" if teacher else "none"


def prepared_problems(recipe: Recipe, prepared: Prepared) -> list[Problem]:
    """What prepared data says against a recipe: its own complaints, and a vocabulary the model does not have."""
    return [*prepared.problems, *vocabulary_problems(recipe, prepared.vocab_size)]


def vocabulary_problems(recipe: Recipe, vocab_size: int, *, vocab: int | None = None) -> list[Problem]:
    """Token ids that the model has no embedding for. vocab_size: of the data. vocab: of another model than the recipe's."""
    has = recipe.model.real_vocab if vocab is None else vocab
    if vocab_size <= has:
        return []
    named = "model.vocab - model.vocab_padding" if recipe.model.vocab_padding else "model.vocab"
    text = (
        f"the prepared data in {recipe.data.folder} has a vocabulary of {vocab_size:,} (token ids up to {vocab_size - 1:,}), "
        f"but {named if vocab is None else 'the vocabulary of the model'}={has:,}."
    )
    larger = f"model.vocab={vocab_size}"
    if vocab_size <= recipe.model.vocab:
        larger = f"model.vocab_padding={recipe.model.vocab - vocab_size}"
    remedy = f"Set {larger}, or prepare the data again with a smaller tokenizer."
    return [Problem("model.vocab", text, remedy if vocab is None else "Use the data the model was trained on.")]


def unused(objective: ObjectiveConfig) -> str:
    """Fields that are set and not looked at, for people; empty if there are none."""
    if objective.kind != "next_token":
        return ""
    plain = ObjectiveConfig()
    names = [field.name for field in dataclasses.fields(objective) if field.name != "kind"]
    changed = [name for name in names if getattr(objective, name) != getattr(plain, name)]
    return ", ".join(f"objective.{name}={getattr(objective, name)}" for name in changed)
