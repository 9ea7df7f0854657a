"""The commands of `stratum compress`: score, prune, search and pick."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from rich.table import Table

from data.system import disk
from data.system.console import open_console
from recipes.schema.command import recipe_words, section
from recipes.schema.compress import CompressConfig
from recipes.schema.errors import CheckpointError, RecipeError, refuse
from recipes.schema.foreign import literal, printable
from recipes.schema.pattern import layer_kinds, parameters
from recipes.schema.read import read_recipe, recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.rules import reading_problems
from recipes.schema.typed import FieldError, build, differing
from train.build import check, mesh_of, open_data
from train.checkpoint import publishing, storage
from train.checkpoint.manifest import RunState, read_manifest
from train.compress.importance import attention_quota, removal_scores, width_scores
from train.compress.parent import check_data, layout_recipe, parent_of, scoring_engine
from train.compress.pictures import draw_layers, draw_widths
from train.compress.prune import AS_SCORED, Depth, Target, choose, cut_weights, lineage, pruned_model
from train.compress.scores import SCORES, Scores, model_of
from train.compress.search import describe, feasible, ranked, shape_of, targets
from train.megatron import choose_device, use_device
from train.parallel.mesh import world_from_environment
from train.report.summary import read_run

FIRST_STEP = "step_00000000"


def score(composed: DictConfig) -> int:
    """Score the parent's parts; writes scores and pictures. Every process of the world calls it."""
    recipe, config, folder = _read(composed)
    rank, world = world_from_environment()
    device = choose_device(recipe.run.device)
    use_device(device)

    parent = parent_of(config)
    dataset = open_data(replace(recipe, model=parent.recipe.model))
    check_data(parent, dataset, recipe=recipe)
    recipe = layout_recipe(parent, recipe, world=world)
    model = parent.recipe.model
    depth = len(layer_kinds(model.pattern))
    if config.layers > depth:
        raise RecipeError(f"compress.layers={config.layers} is more than the parent's {depth}.")
    remove = depth - config.layers if config.layers else 0
    attention_quota(layer_kinds(model.pattern), remove, config.attention_layers)
    if remove and config.depth_metric == "block_influence":
        remove = 0  # block influence is measured with the widths: no removal trials
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    request = {
        "parent": parent.manifest.fingerprint,
        "data": dataset.manifest_hash,
        "rows": config.calibration_rows,
        "remove": remove,
        **({"depth_rows": config.depth_rows, "metric": config.depth_metric, "attention_layers": config.attention_layers}
           if remove else {}),
    }  # fmt: skip
    console = open_console(quiet=rank > 0)
    title = parent.path.parent.parent.name
    pictures = {"widths.png": draw_widths, "layers.png": draw_layers}
    finished = _existing_scores(folder, request)
    if finished is not None:
        console.print(
            f"{folder} already has these scores of {parent.path}. To measure again, delete {folder}/{SCORES}."
        )
        for name, draw in pictures.items() if not rank else ():
            if not (folder / name).exists():  # killed before it was drawn
                draw(finished, folder / name, title=title)
        return 0
    kinds = layer_kinds(model.pattern)
    partial = folder / "partial"  # scores of the finished rounds: a kill loses only the round in progress
    scores = _existing_scores(partial, request)
    status = f"widths over {config.calibration_rows:,} rows ..."
    if scores is not None:
        status = f"continues after removal {len(scores.removals)} of {remove}"
    console.print(f"{parent.path}: {status}")
    with (
        mesh_of(recipe, check(recipe, world=world), device=device, rank=rank) as mesh,
        scoring_engine(parent, recipe, mesh) as engine,
    ):
        if scores is None:
            scores = width_scores(engine, model, dataset, rows=config.calibration_rows, parent=str(parent.path))
            scores.request = request
            order = [f"{n} ({kinds[n]})" for n in sorted(range(depth), key=lambda n: scores.influence[n])]
            console.print(f"layers, least block influence first: {', '.join(order)}")
        if remove:
            scores.depth_rows, scores.depth_metric = config.depth_rows, config.depth_metric
            rounds = removal_scores(
                engine,
                model,
                dataset,
                rows=config.depth_rows,
                remove=remove,
                attention_layers=config.attention_layers,
                metric=config.depth_metric,
                before=tuple(scores.removals),
            )
            for removal in rounds:
                scores.removals.append(removal)
                if not rank:
                    scores.save(partial)
                harm = next(c for c in removal.candidates if c.layer == removal.layer)
                console.print(
                    f"removed {len(scores.removals)} of {remove}: layer {removal.layer} ({kinds[removal.layer]}), logit "
                    f"error {harm.logit_error:.4f}, loss {harm.loss_increase:+.4f} nats"
                )
    if rank:
        return 0
    for name in pictures:
        (folder / name).unlink(missing_ok=True)  # a picture of older scores
    scores.save(folder)
    for name, draw in pictures.items():
        draw(scores, folder / name, title=title)
    shutil.rmtree(partial, ignore_errors=True)
    console.print(f"Scores: {folder}/{SCORES}; pictures: {', '.join(f'{folder}/{name}' for name in pictures)}")
    return 0


def _existing_scores(folder: Path, request: dict[str, Any]) -> Scores | None:
    """The scores in a folder if they were made for `request`; None if missing, damaged, or made for another request."""
    try:
        scores = Scores.load(folder)
    except CheckpointError:
        return None
    return scores if scores.request == request else None


def prune(composed: DictConfig) -> int:
    """Write the pruned checkpoint and its model recipe."""
    recipe, config, folder = _read(composed)
    target = Target(**{name: getattr(config, name) for name in Target.__dataclass_fields__})
    written = _write_pruned(
        parent_of(config),
        Scores.load(folder),
        target,
        folder,
        name=recipe.run.name,
        merge_heads=config.merge_heads,
        depth=Depth(config.depth_metric, config.attention_layers),
    )
    console = open_console()
    console.print(written)
    console.print(f"Train it: {_training_command(folder, recipe.run.name)}")
    return 0


def _write_pruned(
    parent: Any,
    scores: Any,
    target: Any,
    folder: Path,
    *,
    name: str,
    merge_heads: bool = False,
    depth: Any = None,
) -> str:
    """Prune; write checkpoint and model recipe. -> a text for the user. An equal checkpoint is not written again."""
    is_same = asdict(parent.recipe.model) == asdict(model_of(scores)) and Path(scores.parent) == parent.path
    if not is_same or scores.request.get("parent", parent.manifest.fingerprint) != parent.manifest.fingerprint:
        raise RecipeError(
            f"the scores in {folder} were measured on other weights ({scores.parent}) than compress.parent has now "
            f"({parent.path}). Score it first: stratum compress score with this recipe."
        )
    kept = choose(scores, target, depth or AS_SCORED)
    small = pruned_model(parent.recipe.model, target, kept.layers)
    if merge_heads and small.heads == parent.recipe.model.heads:
        raise RecipeError(
            f"compress.merge_heads=true has nothing to merge: compress.heads={target.heads} keeps all {small.heads} query heads."
        )
    recipe = replace(parent.recipe, model=small, run=replace(parent.recipe.run, name=name, start_from=str(parent.path)))
    final = folder / "checkpoints" / FIRST_STEP
    mapping = recipe_mapping(recipe)
    origin = lineage(scores, kept, parent=parent.path, manifest=parent.manifest, merged_heads=merge_heads)
    existing = _manifest_at(final)
    # A manifest is JSON: tuples become lists. The round trip makes the new lineage comparable with a stored one.
    is_done = existing is not None and (existing.lineage, existing.recipe) == (json.loads(json.dumps(origin)), mapping)
    if not is_done:
        staging = disk.aside_of(final)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        cut_weights(parent.path, staging, scores=scores, kept=kept, small=small, merge_heads=merge_heads)
        state = RunState(recipe=mapping, tokenizer=parent.manifest.tokenizer, lineage=origin)
        storage.publish(staging, final, state)
    publishing.point_at(final.parent, final.name)
    group = folder / "model"
    group.mkdir(exist_ok=True)
    about = f"# Pruned from {printable(str(parent.path))}: {parameters(small).total:,} parameters.\n"
    (group / f"{name}.yaml").write_text(about + yaml.safe_dump(literal(differing(small)), sort_keys=False))
    before, after = parameters(parent.recipe.model).total, parameters(small).total
    return (
        f"{parent.path}: {before:,} -> {after:,} parameters ({after / before:.0%}), {parent.recipe.model.pattern} -> "
        f"{small.pattern}\n"
        f"Checkpoint{' (exists already)' * is_done}: {final}; model recipe: {group}/{name}.yaml"
    )


def _manifest_at(checkpoint: Path) -> Any:
    """Manifest of a complete checkpoint; None without one."""
    try:
        return read_manifest(checkpoint)
    except CheckpointError:
        return None


def _training_command(folder: Path, name: str) -> str:
    """The command that trains a pruned checkpoint with the recipe of this command."""
    words = ["stratum", "train", *recipe_words(str(folder)), f"model={name}", f"run.name={name}"]
    return shlex.join([*words, f"run.start_from={folder}"])


def search(composed: DictConfig) -> int:
    """Rank shapes within the budget, prune the best ones, and print the command that distils each."""
    recipe, config, folder = _read(composed)
    scores = Scores.load(folder)
    model = model_of(scores)
    tried = targets(config)

    depth = Depth(config.depth_metric, config.attention_layers)
    layers: dict[int, list[int]] = {}  # by number of layers: the layers kept do not depend on the widths

    def layers_of(target: Any) -> list[int]:
        if target.layers not in layers:
            layers[target.layers] = choose(scores, type(target)(layers=target.layers), depth).layers
        return layers[target.layers]

    shapes = feasible(model, tried, config, layers_of=layers_of)
    console = open_console()
    console.print(f"{len(tried):,} shapes tried, {len(shapes):,} within the budget.")
    if not shapes:
        raise RecipeError(f"no shape fits the budget. {_range_of(model, tried, config, layers_of)}")
    best = ranked(scores, shapes, depth)[: config.candidates]
    table = Table("", "layers", "hidden", "ffn", "heads", "mamba heads", "parameters", "GiB", "tokens/s", "lost")
    for number, (lost, shape) in enumerate(best, 1):
        m = shape.model
        row = [len(m.pattern), m.hidden, m.ffn, m.heads, m.mamba_heads, f"{shape.parameters:,}", f"{shape.gib:.3f}"]
        table.add_row(str(number), *map(str, row), f"{shape.tokens_per_s:.1f}", f"{lost:.3f}")
    console.print(table)
    parent = parent_of(config)
    names = []
    (folder / "candidates.json").unlink(missing_ok=True)  # from an earlier search
    for number, (_, shape) in enumerate(best, 1):
        name = f"{recipe.run.name}_{number}"
        out = Path(config.folder) / name
        scores.save(out)
        _write_pruned(
            parent,
            scores,
            shape.target,
            out,
            name=name,
            merge_heads=config.merge_heads,
            depth=depth,
        )
        names.append(name)
    (folder / "candidates.json").write_text(
        json.dumps(
            [{"name": n, "lost": lost, **describe(s)} for n, (lost, s) in zip(names, best, strict=True)], indent=1
        )
    )
    console.print("A short distillation of each, then `stratum compress pick` with the same recipe:")
    for name in names:
        out = Path(config.folder) / name
        console.print(f"  {_training_command(out, name)} objective=distill objective.teacher={config.parent}")
    return 0


def _range_of(model: Any, tried: list[Any], config: CompressConfig, layers_of: Callable[[Any], list[int]]) -> str:
    """The range of costs of the shapes tried, for the message that none fits the budget."""
    shapes = [shape_of(model, target, layers_of(target), config) for target in tried]
    limits = (
        (config.budget_parameters, "have {:,} to {:,} parameters (compress.budget_parameters={:,})", "parameters"),
        (config.budget_gib, "take {:.3f} to {:.3f} GiB (compress.budget_gib={:g})", "gib"),
        (
            config.budget_tokens_per_s,
            "reach {:.1f} to {:.1f} tokens/s (compress.budget_tokens_per_s={:g})",
            "tokens_per_s",
        ),
    )
    ranges = []
    for limit, text, name in limits:
        if limit:
            values = [getattr(shape, name) for shape in shapes]
            ranges.append(text.format(min(values), max(values), limit))
    return f"Those tried {', '.join(ranges)}. Widen compress.search_..., or the budget."


def pick(composed: DictConfig) -> int:
    """Compare the distilled candidates by held-out bits per byte, and print the best."""
    recipe, _, folder = _read(composed)
    path = folder / "candidates.json"
    if not path.exists():
        raise RecipeError(f"{path} is missing. Search first: stratum compress search with this recipe.")
    table = Table("candidate", "layers", "hidden", "ffn", "parameters", "tokens/s", "steps", "held-out bits per byte")
    results = []
    steps: dict[str, int] = {}
    for candidate in json.loads(path.read_text()):
        run = Path(recipe.run.folder) / candidate["name"]
        if not (run / "metrics.jsonl").exists():
            raise RecipeError(f"{run} was not trained yet. Run the command that search printed for it.")
        evaluations = read_run(run).evaluations
        if not evaluations:
            raise RecipeError(f"{run} has no evaluation to compare. Train it with evaluate.every_steps.")
        step = max(evaluations)
        steps[candidate["name"]] = step
        score = sum(evaluations[step].values()) / len(evaluations[step])
        results.append((score, candidate["name"]))
        row = [candidate[key] for key in ("name", "layers", "hidden", "ffn")]
        table.add_row(
            *map(str, row),
            f"{candidate['parameters']:,}",
            f"{candidate['tokens_per_s']:.1f}",
            str(step),
            f"{score:.4f}",
        )
    console = open_console()
    console.print(table)
    if len(set(steps.values())) > 1:
        raise RecipeError(
            "the candidates were trained to different steps ("
            + ", ".join(f"{name}: step {step:,}" for name, step in steps.items())
            + "). Continue the shorter ones: the commands that search printed do this."
        )
    console.print(f"Best: {min(results)[1]}")
    return 0


def _read(composed: DictConfig) -> tuple[Recipe, CompressConfig, Path]:
    """(recipe, its compress section, output folder)."""
    plain = section(composed, "compress")
    for name, value in plain.items():  # written [52,54,56] on the command line, because Hydra reads 52,54,56 as a sweep
        if name.startswith("search_") and isinstance(value, list):
            plain[name] = ",".join(map(str, value))
    try:
        config = build(CompressConfig, plain, "compress")
    except FieldError as error:
        raise RecipeError(str(error)) from error
    recipe = read_recipe(composed)
    refuse(reading_problems(recipe))
    return recipe, config, Path(config.folder) / recipe.run.name
