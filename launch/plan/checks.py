"""What is wrong with a recipe beyond its layout, and what is allowed but costs something: value, place, remedy.

Layout rules are `recipes.schema.layout`'s, shape rules of low precision `recipes.schema.scaling`'s; here is what the GPU, the
backend, the objective, the run's folder and the prepared data add.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from data.store.manifest import MANIFEST, Manifest, read_manifest
from launch.plan.cost.device import Device
from recipes.schema.changes import check_folder
from recipes.schema.errors import DataError, RecipeError
from recipes.schema.layout import Layout
from recipes.schema.recipe import Recipe
from recipes.schema.rules import objective_problems, unused
from recipes.schema.scaling import shape_problems
from recipes.schema.schedule import unread

if TYPE_CHECKING:
    from data.order.blend import Blend


def recipe_problems(recipe: Recipe, device: Device) -> list[str]:
    """Everything that would stop the run, its layout and memory aside."""
    return _precision_problems(recipe, device) + objective_problems(recipe) + _place_problems(recipe)


def recipe_warnings(recipe: Recipe, layout: Layout, device: Device) -> list[str]:
    """What is allowed and probably not wanted."""
    found = []
    if layout.tensor > device.domain:
        found.append(
            f"parallel.tensor={layout.tensor} is larger than the {device.domain} GPUs that {device.name} links directly: every "
            f"layer waits for the network. Use at most {device.domain}, with parallel.pipeline for the rest."
        )
    if layout.tensor > 1 and not recipe.parallel.sequence:
        found.append(
            "parallel.sequence=false: norms and residuals are kept on every tensor rank. parallel.sequence=true needs less "
            "memory at the same traffic."
        )
    if layout.pipeline > 1 and layout.microbatches_per_step < layout.pipeline:
        found.append(
            f"a step has {layout.microbatches_per_step} microbatches for {layout.pipeline} pipeline stages: most of them wait. "
            f"Raise run.global_rows, or lower run.microbatch_rows or parallel.pipeline."
        )
    if layout.data > 1 and not recipe.parallel.overlap_grad_reduce:
        found.append(
            "parallel.overlap_grad_reduce=false: gradients are reduced after the backward pass instead of beside it."
        )
    if idle := unused(recipe.objective):
        found.append(f"objective.kind=next_token trains on next tokens; not used: {idle}.")
    if idle := unread(recipe.schedule):
        found.append(f"{idle}.")
    if recipe.run.device == "cpu":
        found.append("run.device=cpu: the plan is for GPUs; this recipe will not use them.")
    if recipe.run.deterministic:
        found.append(
            "run.deterministic=true: some deterministic kernels are slower; how much has not been measured on a GPU."
        )
    if not (Path(recipe.data.folder) / MANIFEST).is_file():
        found.append(
            f"data.folder={recipe.data.folder} holds no prepared data here: vocabulary and size were not checked. "
            f"`python -m data.prepare` makes it."
        )
    else:
        found += _sources_that_run_out(recipe)
    return found


def _precision_problems(recipe: Recipe, device: Device) -> list[str]:
    """What Transformer Engine, the device or the backend would refuse."""
    precision, model = recipe.precision, recipe.model
    active = {precision.scaling} | ({precision.scaling_after} if precision.switch_at_tokens is not None else set())
    low = active - {"none"}
    problems = []
    blackwell = device.generation.startswith("blackwell")
    for scaling in sorted(low):
        if scaling == "unscaled":
            if precision.backend in ("te", "auto"):
                problems.append(
                    "precision.scaling=unscaled is an example of what goes wrong and runs on precision.backend=emulated "
                    "only. Use current, delayed or blockwise."
                )
        elif scaling in ("mxfp8", "nvfp4") and not blackwell:
            problems.append(
                f"precision.scaling={scaling} needs a Blackwell GPU; {device.name} is {device.generation}. Use "
                f"precision.scaling={'blockwise' if device.generation == 'hopper' else 'current'}, or --device b200."
            )
        elif "fp8" not in device.peak:
            problems.append(
                f"precision.scaling={scaling}: {device.name} ({device.generation}) has no FP8 matrix products. Use "
                f"precision.scaling=none, or --device h100."
            )
        elif scaling == "blockwise" and device.generation == "ada":
            problems.append(
                f"precision.scaling=blockwise needs a Hopper GPU or a newer one; {device.name} is {device.generation}. Use "
                f"precision.scaling=current."
            )
    if low and precision.backend == "reference":
        problems.append(
            f"precision.backend=reference computes in high precision only, but precision.scaling={precision.scaling}. Use "
            f"precision.backend=te or emulated, or scaling=none."
        )
    if precision.fp8_weights and not low:
        problems.append(
            "precision.fp8_weights=true needs a low-precision recipe. Set precision.scaling, or fp8_weights=false."
        )
    ends = precision.high_precision_first or precision.high_precision_last
    if precision.fp8_weights and ends and "delayed" in active:
        problems.append(
            "precision.fp8_weights=true with delayed scaling keeps the weights of every layer in FP8. Set "
            "high_precision_first and high_precision_last to 0, or use another scaling, or fp8_weights=false."
        )
    if low:
        problems += shape_problems(
            model,
            parallel=recipe.parallel,
            precision=precision,
            rank_tokens=recipe.run.microbatch_rows * recipe.data.row_tokens // recipe.parallel.context,
        )
    return problems


def _place_problems(recipe: Recipe) -> list[str]:
    """What the run's folder and the prepared data, where they are here, say against it."""
    problems = []
    try:
        check_folder(Path(recipe.run.folder) / recipe.run.name, recipe)
    except RecipeError as error:
        problems.append(str(error))
    folder = Path(recipe.data.folder)
    if (folder / MANIFEST).is_file():
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            problems.append(str(error))
        else:
            try:
                _order(recipe, manifest).check_length(_rows(recipe), global_rows=recipe.run.global_rows)
            except DataError as error:
                problems.append(str(error))
            size = manifest.tokenizer.vocab_size
            if size > recipe.model.vocab:
                problems.append(
                    f"the prepared data in {folder} has a vocabulary of {size:,}, but model.vocab={recipe.model.vocab:,}. Set "
                    f"model.vocab={size}, or prepare the data again with a smaller tokenizer."
                )
    return problems


def _sources_that_run_out(recipe: Recipe) -> list[str]:
    """Where the other sources take the place of one that has been read max_epochs times."""
    try:
        gone = _order(recipe, read_manifest(Path(recipe.data.folder))).exhausted(_rows(recipe))
    except DataError:
        return []  # said as a problem
    return [
        f"source {name!r} has been read max_epochs={recipe.data.sources[name].max_epochs:g} times at step "
        f"{place // recipe.run.global_rows + 1:,}: the others take its place from there (data.on_exhausted=continue)."
        for name, place in gone
    ]


def _rows(recipe: Recipe) -> int:
    """Rows of the whole run."""
    return recipe.run.steps * recipe.run.global_rows


def _order(recipe: Recipe, manifest: Manifest) -> "Blend":
    """The order of training of prepared data. DataError where a source is not in it, or too small."""
    from data.order.blend import blend_of  # it needs numpy, which a plan without prepared data does without

    data, counts = recipe.data, []
    for name in data.sources:
        if name not in manifest.sources:
            raise DataError(
                f"{data.folder} holds no source {name} (it holds {', '.join(manifest.sources)}). Prepare the data again, or "
                f"take the source out of data.sources."
            )
        counts.append(sum(entry.tokens for entry in manifest.sources[name].splits["train"]) // data.row_tokens)
    return blend_of(data, counts)
