"""Every rule that spans the fields of a recipe. `problems` is the only entry: it calls all rules.

    recipe --+
    world, machine (GPU? packages?), disk (checkpoints it names), prepared data --+--> problems --> [Problem(key, text, remedy)]

The trainer, the planner and the launchers pass the facts that they have. A rule is left out if its fact is not known (None). So
a mistake that can be found before the start is refused then, in the same words that the trainer uses. Ranges and types of single
fields are in `recipes.schema.fields`. Rules of layouts, schedules, patterns and shapes are next to the arithmetic they protect
(`layout`, `schedule`, `pattern`, `scaling`, `teacher_rules`); `problems` calls them too.
"""

import dataclasses
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from recipes.schema.changes import check_folder, differences, draws_adapters, mtp_change, refused, replaces_head
from recipes.schema.data_rules import data_problems
from recipes.schema.encoder_rules import encoder_problems
from recipes.schema.errors import Problem, RecipeError
from recipes.schema.errors import refuse as refuse
from recipes.schema.evaluate import EvaluateConfig
from recipes.schema.expert_rules import expert_precision_problems, expert_problems
from recipes.schema.facts import BLOCK_SCALES, Disk, Machine, Named, Prepared
from recipes.schema.foreign import printable
from recipes.schema.grpo_rules import grpo_notes, grpo_problems
from recipes.schema.launch_rules import environment_problems
from recipes.schema.layout import layout_problems
from recipes.schema.lora_rules import adapter_problems
from recipes.schema.manifest import Manifest
from recipes.schema.objective import PREFERENCE_OBJECTIVES, ObjectiveConfig
from recipes.schema.objective_rules import (
    data_fit_problems,
    dpo_problems,
    mtp_objective_problems,
    reward_problems,
    unused,
    z_loss_problems,
)
from recipes.schema.optim import OptimConfig, ScheduleConfig
from recipes.schema.optim_rules import optim_notes, optim_problems
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import layer_kinds, mtp_problems, pattern_problems, weights_of
from recipes.schema.precision import PrecisionConfig
from recipes.schema.profile import profile_problems
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.resilience_rules import integrity_problems, spike_problems
from recipes.schema.scaling import (
    block_notes,
    low_precision_linears,
    rotation_problems,
    rule_notes,
    rule_problems,
    scalings_used,
    shape_problems,
)
from recipes.schema.schedule import schedule_problems, unread
from recipes.schema.storage_rules import storage_notes, storage_problems
from recipes.schema.tasks import sample_problems, task_problems
from recipes.schema.teacher_rules import cache_problems, distill_problems, teacher_problems, tokenizer_problems
from recipes.schema.weight_formats import rounding_problems

Backend = Literal["reference", "emulated", "te"]
_LONGEST_NAME = 200
"""Bytes of a part of a run's name. With the endings that saves and logs add, it must fit into a file name (255 bytes)."""


def problems(
    recipe: Recipe,
    *,
    world: int | None = None,
    machine: Machine | None = None,
    disk: Disk | None = None,
    prepared: Prepared | None = None,
    here: bool = True,
) -> list[Problem]:
    """All reasons why a recipe cannot run, in the order of its groups; [] if it can start.

    world: number of processes. machine, disk, prepared: facts (`recipes.schema.facts`); None if not known. here: False if the
    run will start on another machine, which may have what is missing on this disk.
    """
    backend = recipe.precision.backend if machine is None else backend_name(recipe.precision, _of_run(recipe, machine))
    found = [
        *name_problems(recipe.run.name),
        *profile_problems(recipe.run),
        *mtp_objective_problems(recipe),
        *z_loss_problems(recipe),
        *adapter_problems(recipe),
        *expert_problems(recipe),  # before the layout, whose remedies for experts would be of no use
        *spike_problems(recipe),
        *optim_problems(recipe.optim, recipe.model),
        *integrity_problems(recipe),
        *(data_problems(recipe.data) if recipe.data.sources or recipe.objective.kind != "grpo" else []),
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
        *storage_problems(recipe),
        *distill_problems(recipe),
        *grpo_problems(recipe, backend=backend),
        *data_fit_problems(recipe),
        *encoder_problems(recipe),
        *dpo_problems(recipe),
        *reward_problems(recipe),
        *task_problems(
            recipe.evaluate.tasks,
            row_tokens=recipe.data.row_tokens,
            parallel=recipe.parallel,
            backend=backend,
            reads_files=here and disk is not None,
        ),
        *sample_problems(recipe.evaluate.sample_prompts, parallel=recipe.parallel, backend=backend),
    ]
    if not pattern_problems(recipe.model.pattern) and not mtp_problems(recipe.model):
        found += precision_problems(recipe, machine)
    if disk is not None:
        found += disk_problems(recipe, disk, prepared=prepared, here=here, world=world)
    if prepared is not None and (here or prepared.is_here):
        found += prepared_problems(recipe, prepared)
    return list({str(problem): problem for problem in found}.values())


def reading_problems(recipe: Recipe) -> list[Problem]:
    """Problems for commands that read a recipe but do not train with it: the groups that matter for training only are ignored."""
    kind = recipe.objective.kind
    is_fit = kind in PREFERENCE_OBJECTIVES
    found = problems(
        dataclasses.replace(
            recipe,
            parallel=ParallelConfig(),
            precision=PrecisionConfig(),
            objective=ObjectiveConfig(kind=kind, dpo=recipe.objective.dpo) if is_fit else ObjectiveConfig(),
            optim=OptimConfig(),
            schedule=ScheduleConfig(),
            evaluate=EvaluateConfig(),
        )
    )
    # A run that learns from rewards has no sources. A command that does read rows reports their absence itself.
    return [problem for problem in found if recipe.data.sources or problem.key != "data.sources"]


def notes(recipe: Recipe, *, machine: Machine | None = None, prepared: Prepared | None = None) -> list[Problem]:
    """What is allowed but probably a mistake. The plan shows it as a warning, and training logs it once."""
    found = []
    if idle := unused(recipe.objective):
        text = f"objective.kind={recipe.objective.kind} does not use {idle}."
        found.append(Problem("objective.kind", text))
    found += grpo_notes(recipe) + storage_notes(recipe) + optim_notes(recipe.optim, steps=recipe.run.steps)
    if idle := unread(recipe.schedule):
        found.append(Problem("schedule.decay", f"{idle}."))
    precision = recipe.precision
    if precision.switch_at_tokens is None and precision.scaling_after != "none":
        text = (
            f"precision.scaling_after={precision.scaling_after} is never used, because precision.switch_at_tokens=null."
        )
        found.append(Problem("precision.scaling_after", text, "Set switch_at_tokens, or scaling_after=none."))
    if machine is not None and backend_name(precision, _of_run(recipe, machine)) != "te":
        shapes = "; ".join(str(problem) for problem in _shapes(recipe))
        if shapes:
            found.append(Problem("precision.scaling", f"a GPU would refuse this recipe: {shapes}"))
    found += rule_notes(recipe.model, precision)
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
                f"{row // recipe.run.global_rows + 1:,}: from there on, the others take its share (data.on_exhausted=continue)."
            )
            found.append(Problem(f"data.sources.{name}.max_epochs", text))
    return found


def name_problems(name: str) -> list[Problem]:
    """Names that cannot be a folder inside run.folder. Blanks are allowed, and `/` between parts."""
    parts = name.split("/")
    odd = sorted(
        {character for character in name if unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"}
    )
    why = ""
    if not name.strip():
        why = "is empty"
    elif odd:
        why = f"contains {', '.join(ascii(character) for character in odd[:3])}, which the name of a folder should not contain"
    elif name.startswith("/"):
        why = "starts with `/`, but run.folder says where runs are"
    elif name.startswith("-"):
        why = "starts with `-`, which commands would read as an option"
    elif any(part.strip() in ("", ".", "..") for part in parts):
        why = "has an empty part, `.` or `..`, so it would leave run.folder or be the folder of another run"
    elif any(len(part.encode()) > _LONGEST_NAME for part in parts):
        why = f"has a part longer than {_LONGEST_NAME} bytes"
    if not why:
        return []
    return [Problem("run.name", f"run.name={name!r} {why}.", "Use letters, digits, blanks, and - _ . = , +")]


def device_problems(device: str, *, has_gpu: bool) -> list[Problem]:
    """A recipe that needs a GPU on a machine without one. has_gpu: whether this machine has one."""
    if device != "cuda" or has_gpu:
        return []
    text = "run.device=cuda, but there is no GPU on this machine that torch can use."
    return [Problem("run.device", text, "Use run.device=auto or cpu.")]


def backend_name(precision: PrecisionConfig, machine: Machine) -> Backend:
    """The backend that runs on a machine: `auto` is `te` if it can run, otherwise `emulated` for low precision."""
    used = scalings_used(precision)
    if precision.backend != "auto":
        return precision.backend
    if precision.quantize_weights != "none":
        return "reference"
    if machine.has_gpu and not machine.missing and "unscaled" not in used:
        return "te"
    return "emulated" if used else "reference"


def precision_problems(recipe: Recipe, machine: Machine | None) -> list[Problem]:
    """Number formats and backends that exclude each other, or that the machine or the model's shapes do not allow."""
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
    if recipe.run.integrity.products and (backend == "te" or machine.has_gpu):
        text = f"run.integrity.products={list(recipe.run.integrity.products)} checks products on a CPU only."
        found.append(Problem("run.integrity.products", text, "Set run.integrity.products=[]."))
    if backend == "te":
        for scaling in used:
            found += _generation_problems("precision.scaling", scaling, machine)
    objective = recipe.objective
    if objective.kind == "distill" and objective.teacher_cache is None and machine.has_gpu and not machine.missing:
        found += _generation_problems("objective.teacher_scaling", objective.teacher_scaling, machine)
    return found


def shape_rules(recipe: Recipe, *, backend: str) -> list[Problem]:
    """Layers and shapes for which low precision has no effect or is impossible."""
    precision, used, found = recipe.precision, scalings_used(recipe.precision), []
    if used and not low_precision_linears(recipe.model, precision):
        layers = len(layer_kinds(recipe.model.pattern))
        text = (
            f"precision.scaling={'/'.join(used)}, but high_precision_first={precision.high_precision_first} and "
            f"high_precision_last={precision.high_precision_last}{' and rules' * bool(precision.rules)} keep all {layers} "
            f"layers in high precision."
        )
        remedy = f"Lower them so that their sum is less than {layers}, or use precision.scaling=none."
        found.append(Problem("precision.high_precision_first", text, remedy))
    found += rule_problems(recipe.model, precision)
    found += rotation_problems(recipe.model, precision=precision, rank_tokens=_rank_tokens(recipe))
    found += rounding_problems(recipe.model, precision=precision, tensor=recipe.parallel.tensor)
    found += expert_precision_problems(recipe.model, precision, backend=backend)
    return found + (_shapes(recipe) if backend == "te" else [])


def low_precision_problems(precision: PrecisionConfig) -> list[Problem]:
    """Fields of `precision` that exclude each other on every machine."""
    used, found = scalings_used(precision), []
    if "unscaled" in used and precision.backend == "te":
        text = (
            "precision.scaling=unscaled is an example of what goes wrong, and only precision.backend=emulated has it."
        )
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
    """What a backend needs and a machine does not have. machine: with the run's device (`run.device=cpu`: no GPU)."""
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
    """A kind of block scales that differs from the one Transformer Engine reads from the environment when it is imported."""
    if "blockwise" not in scalings_used(precision) or fp32 != precision.power_of_two_scales:
        return []
    text = (
        f"precision.power_of_two_scales={str(precision.power_of_two_scales).lower()}, but {BLOCK_SCALES} is "
        f"{'1' if fp32 else 'not 1'} in the environment."
    )
    setting = f"{BLOCK_SCALES}={int(not precision.power_of_two_scales)}"
    return [Problem("precision.power_of_two_scales", text, f"Start with {setting} (launch.environment={setting}).")]


def _generation_problems(field: str, scaling: str, machine: Machine) -> list[Problem]:
    """Scalings for which a GPU has no arithmetic. No problem if its generation is not known."""
    generation, text, remedy = machine.generation, "", ""
    if not generation or scaling in ("none", "unscaled"):
        return []
    if scaling in ("mxfp8", "nvfp4") and not generation.startswith("blackwell"):
        text = f"{field}={scaling} needs a Blackwell GPU, but {machine.name} is {generation}."
        best = "blockwise" if generation == "hopper" else "current" if machine.has_fp8 else "none"
        remedy = f"Use {field}={best}, precision.backend=emulated, or a Blackwell GPU."
    elif not machine.has_fp8:
        text = f"{field}={scaling}: {machine.name} ({generation}) has no FP8 matrix products."
        remedy = f"Use {field}=none, or a Hopper GPU."
    elif scaling == "blockwise" and generation == "ada":
        text = f"{field}=blockwise needs a Hopper GPU or a newer one, but {machine.name} is {generation}."
        remedy = f"Use {field}=current."
    return [Problem(field, text, remedy)] if text else []


def _of_run(recipe: Recipe, machine: Machine) -> Machine:
    """The machine as the run uses it: without GPU if `run.device=cpu`."""
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
    """Problems with the checkpoints and the cache that a recipe names, and with the run's own folder."""
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
    """Problems with the weights of `run.start_from`. tokenizer: fingerprint of the data's tokenizer; None: not known."""
    assert start.manifest is not None
    found = tokenizer_problems(
        f"run.start_from={start.place}",
        start.manifest.tokenizer,
        tokenizer,
        where=recipe.data.folder,
        otherwise="name another run.start_from",
    )
    if start.recipe is not None and not pattern_problems(recipe.model.pattern):
        model = start.recipe.model
        if replaces_head(start.manifest.recipe, recipe):
            model = dataclasses.replace(model, head="scalar")
        if mtp_change(start.manifest.recipe, recipe) != "none":
            model = dataclasses.replace(model, mtp=recipe.model.mtp)
        if draws_adapters(start.manifest.recipe, recipe):
            model = dataclasses.replace(model, lora=recipe.model.lora)
        ours, theirs = weights_of(recipe.model), weights_of(model)
        keys = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        differing = [f"{key}: {theirs.get(key)} in the checkpoint, {ours.get(key)} in the recipe" for key in keys]
        if differing:
            text = f"run.start_from={start.place} has weights of another model ({'; '.join(differing)})."
            found.append(Problem("run.start_from", text, "Use its model, or name a checkpoint of this one."))
    return found


def _run_problems(
    recipe: Recipe, disk: Disk, *, prepared: Prepared | None, taught_by: dict[str, object] | None
) -> list[Problem]:
    """Problems with the run's own folder: another recipe, lost or missing checkpoints, changed data or teacher."""
    found = []
    folder = Path(recipe.run.folder) / recipe.run.name
    try:
        check_folder(folder, recipe)
    except RecipeError as error:
        found.append(Problem("run.name", str(error)))
    except OSError as error:  # also a name that is too long for the system
        text = f"{printable(str(folder))} cannot be read: {error.strerror or error}."
        found.append(Problem("run.name", text, "Make it readable, or choose another run.name."))
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
    elif recipe.checkpoint.resume == "required" and recipe.run.storage is None:  # the storage may have one
        found.append(required_problem(folder / "checkpoints"))
    return found


def required_problem(checkpoints: Path) -> Problem:
    """`checkpoint.resume=required` in a folder without a checkpoint."""
    text = f"checkpoint.resume=required, but {checkpoints} has no checkpoint."
    return Problem("checkpoint.resume", text, "Use checkpoint.resume=auto to start at step 0.")


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
    """Why a run must not continue from one of its checkpoints. place: the checkpoint's folder.

    tokenizer, data_hash: of the current data. kernels: current `RunState.kernels`. They are empty if not known. taught_by: the
    current teacher (`identity_of`).
    """
    found = []
    if recipe.checkpoint.resume == "never":
        text = f"checkpoint.resume=never, but {Path(place).parent} already has {Path(place).name}."
        remedy = "Choose another run.name, or checkpoint.resume=auto to continue."
        found.append(Problem("checkpoint.resume", text, remedy))
    found += tokenizer_problems(
        place, manifest.tokenizer, tokenizer or None, where=recipe.data.folder, otherwise="choose another run.name"
    )
    if manifest.data_hash and data_hash not in ("", manifest.data_hash) and "data_order" not in recipe.checkpoint.allow:
        is_data = recipe.objective.kind != "grpo"
        field = "data.folder" if is_data else "objective.grpo.prompts"
        what = recipe.data.folder if is_data else f"{field} (with template and tokenizer)"
        text = (
            f"{place} was trained on data {manifest.data_hash[:12]}, but {what} is now {data_hash[:12]}, so positions would be "
            f"other rows."
        )
        remedy = (
            f"{'Set data.folder to the old data' if is_data else 'Restore the old prompts'}, start a new run with another "
            f"run.name, or add checkpoint.allow=[data_order] to continue with other rows."
        )
        found.append(Problem(field, text, remedy))
    if manifest.recipe:
        why = refused(differences(manifest.recipe, recipe_mapping(recipe)), recipe.checkpoint.allow)
        if why is not None:
            found.append(Problem("run.name", f"{place} was trained with another recipe:{why}"))
    before = manifest.lineage.get("teacher")
    may_change = "arithmetic" in recipe.checkpoint.allow
    if kernels_differ(manifest.kernels, kernels) and not may_change:
        # A missing compiler or a full cache must not change a run unnoticed.
        text = f"{place} was trained with kernels {manifest.kernels}, but they are {kernels} now, so bits will differ."
        remedy = (
            "Restore what they were built with (a C compiler, a cache folder that only you can write, STRATUM_NATIVE), or add "
            "checkpoint.allow=[arithmetic] to continue with the present ones."
        )
        found.append(Problem("checkpoint.allow", text, remedy))
    if before and taught_by and before["fingerprint"] != taught_by["fingerprint"] and not may_change:
        text = f"{place} learned from {named_teacher(before)}, but the teacher is {named_teacher(taught_by)} now."
        remedy = (
            f"Add checkpoint.allow=[arithmetic] to continue with the new one, set objective.teacher={before['checkpoint']} to "
            f"continue with the first, or choose another run.name."
        )
        found.append(Problem("objective.teacher", text, remedy))
    return found


def kernels_differ(before: str, now: str) -> bool:
    """Whether both are known and differ. They are empty on GPUs and in old checkpoints."""
    return bool(before and now and before != now)


def named_teacher(teacher: Mapping[str, object] | None) -> str:
    """A teacher's identity, for messages."""
    return f"{teacher['checkpoint']} (weights {str(teacher['fingerprint'])[:12]})" if teacher else "none"


def prepared_problems(recipe: Recipe, prepared: Prepared) -> list[Problem]:
    """Problems of prepared data with a recipe: its own, and a vocabulary that is larger than the model's."""
    return [*prepared.problems, *vocabulary_problems(recipe, prepared.vocab_size)]


def vocabulary_problems(recipe: Recipe, vocab_size: int, *, vocab: int | None = None) -> list[Problem]:
    """Token ids without an embedding. vocab_size: of the data. vocab: of the model, if it is not the recipe's."""
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
