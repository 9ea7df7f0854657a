"""`python -m train.compress COMMAND -cn RECIPE [key=value ...]`: make a model smaller (docs/compress.md).

    score    measure the parent's widths and layers over calibration rows, at any layout (torchrun works); pictures
    prune    cut the parent down to compress.layers, hidden, ffn, ...: a checkpoint and a recipe of the smaller shape
    search   shapes within a budget, the best few pruned, with the command that distils each for a short while
    pick     compare what came of them:  pick -cn RECIPE
    stages   print the commands of the recipe's stages in order; with --run, run them

All writes into `compress.folder`/`run.name`. Exit status: 0 done, 2 a recipe or checkpoint that cannot be used.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from data.command import asked_for, dotted_keys, run_command
from data.typed import FieldError, build
from train.config import CompressConfig, Recipe
from train.errors import USER_ERRORS, RecipeError
from train.model.pattern import layer_kinds, parameters
from train.recipe import read_recipe

FIRST_STEP = "step_00000000"


def main() -> int:
    """Entry point of `python -m train.compress`."""
    commands: dict[str, Callable[[DictConfig], int]] = {
        "score": _score,
        "prune": _prune,
        "search": _search,
        "pick": _pick,
        "stages": _stages,
    }
    words = sys.argv[1:]
    if not words or words[0] not in commands:
        asked = f"error: no command {words[0]!r}\n" if words and words[0] not in ("-h", "--help") else ""
        sys.stderr.write(f"{asked}{__doc__}")
        return 0 if words and not asked else 2
    command = words.pop(0)
    if "--run" in words:
        words.remove("--run")
        os.environ["STRATUM_RUN_STAGES"] = "1"
    sys.argv[1:] = words
    keys = [*dotted_keys(Recipe), *(f"compress.{key}" for key in dotted_keys(CompressConfig))]
    return run_command(commands[command], program=f"train.compress {command}", keys=keys, user_errors=USER_ERRORS)


def _read(composed: DictConfig) -> tuple[Recipe, CompressConfig, Path]:
    """Recipe, its compress section, and the folder of what is written."""
    plain = OmegaConf.to_container(composed.get("compress", {}) or {}, resolve=True)
    try:
        config = build(CompressConfig, plain, "compress")
    except FieldError as error:
        raise RecipeError(str(error)) from error
    recipe = read_recipe(composed)
    return recipe, config, Path(config.folder) / recipe.run.name


def _score(composed: DictConfig) -> int:
    from train.parallel.device import choose_device, prepare
    from train.parallel.mesh import world_from_environment
    from train.run import check, mesh_of, open_data

    recipe, config, folder = _read(composed)
    rank, world = world_from_environment()
    device = choose_device(recipe.run.device)
    prepare(device)

    from train.compress.importance import removal_scores, width_scores
    from train.compress.parent import check_data, layout_recipe, parent_of, scoring_engine
    from train.compress.pictures import draw_layers, draw_widths

    parent = parent_of(config)
    dataset = open_data(replace(recipe, model=parent.recipe.model))
    check_data(parent, dataset)
    recipe = layout_recipe(parent, recipe, world=world)
    model = parent.recipe.model
    depth = len(layer_kinds(model.pattern))
    if config.layers > depth:
        raise RecipeError(f"compress.layers={config.layers} is more than the parent's {depth}.")
    remove = depth - config.layers if config.layers else 0
    if remove and config.depth_metric == "block_influence":
        remove = 0
    if recipe.run.threads:
        import torch

        torch.set_num_threads(recipe.run.threads)
    with mesh_of(recipe, check(recipe, world=world), device=device, rank=rank) as mesh:
        with scoring_engine(parent, recipe, mesh) as engine:
            scores = width_scores(engine, model, dataset, rows=config.calibration_rows, parent=str(parent.path))
            if remove:
                scores.depth_rows, scores.depth_metric = config.depth_rows, config.depth_metric
                scores.removals = removal_scores(
                    engine,
                    model,
                    dataset,
                    rows=config.depth_rows,
                    remove=remove,
                    attention_layers=config.attention_layers,
                    metric=config.depth_metric,
                )
    if rank:
        return 0
    scores.save(folder)
    draw_widths(scores, folder / "widths.png", title=parent.path.parent.parent.name)
    draw_layers(scores, folder / "layers.png", title=parent.path.parent.parent.name)
    console = Console(highlight=False, soft_wrap=True)
    kinds = layer_kinds(model.pattern)
    order = [f"{n} ({kinds[n]})" for n in sorted(range(depth), key=lambda n: scores.influence[n])]
    console.print(
        f"{parent.path}: {config.calibration_rows:,} rows. Layers, least block influence first: {', '.join(order)}"
    )
    for number, removal in enumerate(scores.removals):
        harm = next(c for c in removal.candidates if c.layer == removal.layer)
        console.print(
            f"removed {number + 1}: layer {removal.layer} ({kinds[removal.layer]}), logit error {harm.logit_error:.4f}, "
            f"loss +{harm.loss_increase:.4f} nats"
        )
    console.print(f"Scores: {folder}/scores.json; pictures: {folder}/widths.png, {folder}/layers.png")
    return 0


def _prune(composed: DictConfig) -> int:
    from train.parallel.device import prepare

    recipe, config, folder = _read(composed)
    _prepare_cpu(prepare)
    from train.compress.parent import parent_of
    from train.compress.prune import Target
    from train.compress.scores import Scores

    target = Target(**{name: getattr(config, name) for name in Target.__dataclass_fields__})
    written = _write_pruned(
        parent_of(config), Scores.load(folder), target, folder, name=recipe.run.name, merge_heads=config.merge_heads
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(written)
    console.print(f"Train it: {_training_command(folder, recipe.run.name)}")
    return 0


def _write_pruned(parent: Any, scores: Any, target: Any, folder: Path, *, name: str, merge_heads: bool = False) -> str:
    """Cut, write checkpoint and model recipe. -> what was done, for people."""
    from train.checkpoint import storage
    from train.compress.prune import choose, cut_weights, lineage, pruned_model
    from train.compress.scores import model_of
    from train.run import recipe_mapping

    if asdict(parent.recipe.model) != asdict(model_of(scores)) or Path(scores.parent) != parent.path:
        raise RecipeError(
            f"the scores in {folder} are of {scores.parent}, but compress.parent is {parent.path}. Score it first: "
            f"python -m train.compress score -cn RECIPE."
        )
    kept = choose(scores, target)
    small = pruned_model(parent.recipe.model, target, kept.layers)
    recipe = replace(parent.recipe, model=small, run=replace(parent.recipe.run, name=name, start_from=str(parent.path)))
    final = folder / "checkpoints" / FIRST_STEP
    aside = folder / "checkpoints" / f".{FIRST_STEP}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    cut_weights(parent.path, aside, scores=scores, kept=kept, small=small, merge_heads=merge_heads)
    manifest = storage.Manifest(
        step=0,
        position=0,
        tokens=0,
        layout={},
        recipe=recipe_mapping(recipe),
        data_hash="",
        versions=storage.versions(),
        tokenizer=parent.manifest.tokenizer,
        lineage=lineage(scores, kept, parent=parent.path, manifest=parent.manifest, merged_heads=merge_heads),
    )
    storage.publish(aside, final, manifest)
    group = folder / "model"
    group.mkdir(exist_ok=True)
    about = f"# Pruned from {parent.path}: {parameters(small).total:,} parameters.\n"
    (group / f"{name}.yaml").write_text(about + yaml.safe_dump(asdict(small), sort_keys=False))
    before, after = parameters(parent.recipe.model).total, parameters(small).total
    return (
        f"{parent.path}: {before:,} -> {after:,} parameters ({after / before:.0%}), {parent.recipe.model.pattern} -> "
        f"{small.pattern}\n"
        f"Checkpoint: {final}; model recipe: {group}/{name}.yaml"
    )


def _training_command(folder: Path, name: str) -> str:
    """What trains a pruned checkpoint on, with the recipe this command was given."""
    return f"python -m train --config-dir={folder} -cn {asked_for()[0]} model={name} run.name={name} run.start_from={folder}"


def _search(composed: DictConfig) -> int:
    from train.parallel.device import prepare

    recipe, config, folder = _read(composed)
    _prepare_cpu(prepare)
    from train.compress.parent import parent_of
    from train.compress.scores import Scores, model_of
    from train.compress.search import describe, feasible, ranked, targets

    scores = Scores.load(folder)
    model = model_of(scores)
    tried = targets(config)
    from train.compress.prune import choose

    layers: dict[int, list[int]] = {}

    def layers_of(target: Any) -> list[int]:
        if target.layers not in layers:
            layers[target.layers] = choose(scores, type(target)(layers=target.layers)).layers
        return layers[target.layers]

    shapes = feasible(model, tried, config, layers_of=layers_of)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(tried):,} shapes tried, {len(shapes):,} within the budget.")
    if not shapes:
        raise RecipeError(f"no shape fits the budget. {_range_of(model, tried, config, layers_of)}")
    best = ranked(scores, shapes)[: config.candidates]
    table = Table("", "layers", "hidden", "ffn", "heads", "mamba heads", "parameters", "GiB", "tokens/s", "lost")
    for number, (lost, shape) in enumerate(best, 1):
        m = shape.model
        row = [len(m.pattern), m.hidden, m.ffn, m.heads, m.mamba_heads, f"{shape.parameters:,}", f"{shape.gib:.3f}"]
        table.add_row(str(number), *map(str, row), f"{shape.tokens_per_s:.1f}", f"{lost:.3f}")
    console.print(table)
    parent = parent_of(config)
    names = []
    for number, (_, shape) in enumerate(best, 1):
        name = f"{recipe.run.name}_{number}"
        out = Path(config.folder) / name
        scores.save(out)
        _write_pruned(parent, scores, shape.target, out, name=name, merge_heads=config.merge_heads)
        names.append(name)
    (folder / "candidates.json").write_text(
        json.dumps(
            [{"name": n, "lost": lost, **describe(s)} for n, (lost, s) in zip(names, best, strict=True)], indent=1
        )
    )
    console.print("A short distillation of each, then `python -m train.compress pick` with the same recipe:")
    for name in names:
        out = Path(config.folder) / name
        console.print(f"  {_training_command(out, name)} objective=distill objective.teacher={config.parent}")
    return 0


def _range_of(model: Any, tried: list[Any], config: CompressConfig, layers_of: Callable[[Any], list[int]]) -> str:
    """How large and how fast the shapes tried are, for the one whose budget fits none of them."""
    from train.compress.search import shape_of

    shapes = [shape_of(model, target, layers_of(target), config) for target in tried]
    parameters_of, gib = ([getattr(shape, name) for shape in shapes] for name in ("parameters", "gib"))
    fastest = max(shape.tokens_per_s for shape in shapes)
    return (
        f"Those tried have {min(parameters_of):,} to {max(parameters_of):,} parameters (compress.budget_parameters="
        f"{config.budget_parameters:,}), take {min(gib):.3f} to {max(gib):.3f} GiB (budget_gib={config.budget_gib:g}) and "
        f"reach {fastest:.1f} tokens/s (budget_tokens_per_s={config.budget_tokens_per_s:g}). Widen compress.search_..., or "
        f"the budget."
    )


def _pick(composed: DictConfig) -> int:
    from train.report import read_run

    recipe, _, folder = _read(composed)
    path = folder / "candidates.json"
    if not path.exists():
        raise RecipeError(f"{path} is missing. Search first: python -m train.compress search with this recipe.")
    table = Table("candidate", "layers", "hidden", "ffn", "parameters", "tokens/s", "steps", "held-out bits per byte")
    results = []
    for candidate in json.loads(path.read_text()):
        run = Path(recipe.run.folder) / candidate["name"]
        if not (run / "metrics.jsonl").exists():
            raise RecipeError(f"{run} was not trained yet: run the command that search printed for it.")
        evaluations = read_run(run).evaluations
        step = max(evaluations)
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
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"Best: {min(results)[1]}")
    return 0


def _stages(composed: DictConfig) -> int:
    stages: Any = OmegaConf.to_container(composed.get("stages", {}) or {}, resolve=True)
    if not stages:
        raise RecipeError("this recipe has no stages.")
    name, overrides = asked_for()
    runs = os.environ.pop("STRATUM_RUN_STAGES", "") == "1"
    for stage, text in stages.items():
        words = shlex.split(text)
        module = "train"
        command: list[str] = []
        if words[0] == "compress":
            module, command, words = "train.compress", [words[1]], words[2:]
        elif words[0] == "train":
            words = words[1:]
        else:
            raise RecipeError(
                f"stages.{stage} starts with {words[0]!r}; a stage is `train ...` or `compress COMMAND ...`."
            )
        flags = [w for w in words if w.startswith("--")]
        rest = [w for w in words if not w.startswith("--")]
        line = ["-m", module, *command, *flags, "-cn", name, *rest, *overrides]
        sys.stdout.write(f"# {stage}\npython {shlex.join(line)}\n")
        sys.stdout.flush()
        if runs:
            status = subprocess.run([sys.executable, *line], check=False).returncode
            if status:
                sys.stderr.write(f"error: stage {stage} ended with status {status}\n")
                return status
    return 0


def _prepare_cpu(prepare: Callable[[Any], None]) -> None:
    """Checkpoint tools import Megatron; cutting needs no GPU."""
    import torch

    prepare(torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
