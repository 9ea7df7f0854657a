"""What `stratum merge` does: read the weights of the sum from the options, score a sweep, write the new run.

A sweep writes one candidate at a time and removes it after it is scored, so it needs the disk space of one model. Scores are
stored next to the new run after each candidate: after a kill, the same command continues.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.system import disk
from data.system.console import open_console, progress
from data.system.new_folder import check_new_folder
from recipes.schema import units
from recipes.schema.checkpoint_steps import steps_in
from recipes.schema.errors import NumericsError, RecipeError, refuse
from recipes.schema.foreign import printable
from recipes.schema.lora_rules import folded_problems
from recipes.schema.manifest import Manifest
from recipes.schema.pattern import parameters
from recipes.schema.read import recipe_from_mapping
from recipes.schema.rules import name_problems
from recipes.schema.run_folder import CHECKPOINTS, step_of
from recipes.schema.schedule import learning_rate_factor
from recipes.schema.tools import MergeConfig
from train.merge.decay_weights import decay_weights
from train.merge.fold_adapters import fold_adapters
from train.merge.score_candidate import Scores, open_scorer
from train.merge.weighted_sum import Source, check_sources, source_at, write_run

SWEEP = "merge.json"
"""File of the new run with the scores of a sweep."""
_SUM_TOLERANCE = 1e-6
_BAR_FROM_BYTES = 100_000_000


def run_merge(config: MergeConfig, places: list[Path], out: Path) -> int:
    """Merge, and print what was written. -> exit status. Raises StratumError."""
    console = open_console()
    refuse(name_problems(out.name))
    check_new_folder(out)
    if config.window is not None:
        sources = _window(places[0], config.window)
        check_sources(sources)
        weights = _window_weights(config, sources)
        rule = {"window": config.window, "weights": config.weights, "final_fraction": config.final_fraction}
        _write(out, sources, weights, rule, console=console, keep_step=True)
        return 0
    if config.adapters:
        source = source_at(places[0])
        check_sources([source])
        size = sum(record.bytes for name, record in source.manifest.tensors.items() if name.startswith("model."))
        with progress(f"merging {out.name}", size, is_shown=size >= _BAR_FROM_BYTES) as advance:
            manifest = fold_adapters(out, source, averaged=config.ema, advance=advance)
        _say(out, manifest, console)
        return 0
    if config.ema:
        sources = [source_at(places[0])]
        check_sources(sources)
        rule = {"ema_decay": recipe_from_mapping(sources[0].manifest.recipe).optim.ema_decay}
        _write(out, sources, [1.0], rule, console=console, keep_step=True, averaged=True)
        return 0
    assert config.alpha is not None
    alphas = _alphas(config.alpha)
    sources = [source_at(place) for place in places]
    check_sources(sources)
    for source in sources:  # the product of two sums is not the sum of the products
        model = recipe_from_mapping(source.manifest.recipe).model
        refuse(folded_problems(model, place=str(source.path), what="a sum of two models", key="model.lora"))
    if sources[0].manifest.fingerprint == sources[1].manifest.fingerprint:
        raise RecipeError(
            f"{sources[0].path} and {sources[1].path} have the same weights: there is nothing to merge. Name another model."
        )
    files, alpha = {}, alphas[0]
    if config.evaluate is not None:
        scores = _sweep(config, sources, alphas, out, console=console)
        alpha = scores.best
        files = {SWEEP: json.dumps(scores.as_json(), indent=1) + "\n"}
    _write(out, sources, [1 - alpha, alpha], {"alpha": alpha}, console=console, keep_step=False, files=files)
    _scores_file(out).unlink(missing_ok=True)
    return 0


def _write(
    out: Path,
    sources: list[Source],
    weights: list[float],
    rule: dict[str, Any],
    *,
    console: Console,
    keep_step: bool,
    files: dict[str, str] | None = None,
    averaged: bool = False,
) -> None:
    size = sum(record.bytes for name, record in sources[0].manifest.tensors.items() if name.startswith("model."))
    with progress(f"merging {out.name}", size, is_shown=size >= _BAR_FROM_BYTES) as advance:
        manifest = write_run(
            out, sources, weights, rule=rule, keep_step=keep_step, advance=advance, files=files, averaged=averaged
        )
    for source, weight in zip(sources, weights, strict=True):
        console.print(printable(f"  {weight:.6f}  {source.path}", most=1000))
    _say(out, manifest, console)


def _say(out: Path, manifest: Manifest, console: Console) -> None:
    count = parameters(recipe_from_mapping(manifest.recipe).model).total
    console.print(
        printable(f"wrote {out}: {count:,} parameters, {units.size(manifest.bytes)}, step {manifest.step:,}", most=1000)
    )


def _alphas(text: str) -> list[float]:
    """The values of --alpha. RecipeError for what is not a number from 0 to 1, and for a value given twice."""
    values = []
    for word in text.split(","):
        try:
            value = float(word) + 0.0  # without the sign of -0.0
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise RecipeError(f"--alpha {printable(text)}: {printable(word)!r} is not a number from 0 to 1.")
        values.append(value)
    if len(set(values)) < len(values):
        raise RecipeError(f"--alpha {printable(text)} has a value twice. Name each once.")
    return values


def _window(place: Path, window: str) -> list[Source]:
    """The checkpoints of a run in a window of steps, oldest first. RecipeError if there are fewer than two."""
    first, colon, last = window.partition(":")
    if not colon or any(end and not (end.isascii() and end.isdigit() and len(end) < 19) for end in (first, last)):
        raise RecipeError(
            f"--window {printable(window)} is not FROM:TO. Name two steps, such as 1000:5000, 1000: or :5000."
        )
    low, high = int(first or 0), int(last) if last else math.inf
    folder = place / CHECKPOINTS if (place / CHECKPOINTS).is_dir() else place
    every = {step_of(path): path for path in steps_in(folder)}
    chosen = [path for step, path in every.items() if low <= step <= high]
    if len(chosen) < 2:
        there = ", ".join(f"{step:,}" for step in every) or "none"
        raise RecipeError(
            f"--window {window} has {len(chosen)} checkpoint{'s' * (len(chosen) != 1)} of {place}, and two are needed. Its "
            f"checkpoints are of steps: {there}. checkpoint.keep_last and keep_every_steps say which a run keeps."
        )
    return [source_at(path) for path in chosen]


def _window_weights(config: MergeConfig, sources: list[Source]) -> list[float]:
    """The weight of each checkpoint of a window. RecipeError for numbers that do not fit, and for a rate that was not stable."""
    if config.weights == "equal":
        return [1 / len(sources)] * len(sources)
    if config.weights in ("linear", "cosine", "minus_sqrt"):
        _refuse_unstable(sources, config.weights)
        steps = [source.manifest.step for source in sources]
        shape: Any = config.weights
        return decay_weights(steps, shape=shape, final_fraction=config.final_fraction)
    try:
        weights = [float(word) for word in config.weights.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"--weights {printable(config.weights)}: use equal, linear, cosine, minus_sqrt, or numbers separated by commas."
        ) from error
    if len(weights) != len(sources):
        steps_there = ", ".join(f"{source.manifest.step:,}" for source in sources)
        raise RecipeError(
            f"--weights has {len(weights)} numbers for {len(sources)} checkpoints, of steps {steps_there}."
        )
    if not abs(sum(weights) - 1) < _SUM_TOLERANCE:
        raise RecipeError(f"--weights {config.weights} sum to {sum(weights):g}. They must sum to 1.")
    return weights


def _refuse_unstable(sources: list[Source], shape: str) -> None:
    """RecipeError if the learning rate changed within the window: the emulated decay would be added to a real one."""
    recipe = recipe_from_mapping(sources[-1].manifest.recipe)
    tokens_per_step = recipe.run.global_rows * recipe.data.row_tokens
    first, last = sources[0].manifest.step, sources[-1].manifest.step
    for step in range(first, last):
        factor = learning_rate_factor(
            recipe.schedule, step=step, tokens=step * tokens_per_step, total_steps=recipe.run.steps,
            tokens_per_step=tokens_per_step,
        )  # fmt: skip
        if factor != 1.0:
            raise RecipeError(
                f"--weights {shape} emulates a decay from a stable learning rate, but at step {step:,} the schedule's factor is "
                f"{factor:.3g} (schedule.kind={recipe.schedule.kind}). Choose a window of the stable phase, or --weights equal."
            )


@dataclass
class _Sweep:
    """Scores of the candidates so far."""

    request: dict[str, Any]
    """What they depend on."""
    higher_is_better: bool
    candidates: dict[float, Scores]

    @property
    def best(self) -> float:
        """The alpha with the best score; of equal ones the first."""
        sign = -1 if self.higher_is_better else 1
        return min(self.candidates, key=lambda alpha: sign * self.candidates[alpha].mean)

    def as_json(self) -> dict[str, Any]:
        """For merge.json."""
        return {
            "request": self.request,
            "higher_is_better": self.higher_is_better,
            "candidates": [
                {"alpha": alpha, "score": scores.mean, "parts": scores.parts}
                for alpha, scores in sorted(self.candidates.items())
            ],
            "best": self.best if self.candidates else None,
        }


def _sweep(config: MergeConfig, sources: list[Source], alphas: list[float], out: Path, *, console: Console) -> _Sweep:
    """Score every alpha. Candidates whose scores are stored for the same request are not computed again."""
    assert config.evaluate is not None
    request = {
        "sources": [source.manifest.fingerprint for source in sources],
        "evaluate": config.evaluate, "rows": config.rows, "items": config.items, "seed": config.seed,
    }  # fmt: skip
    recipe = recipe_from_mapping(sources[0].manifest.recipe)
    tokenizer = next((source.manifest.tokenizer for source in sources if source.manifest.tokenizer), "")
    score = open_scorer(config, recipe, tokenizer=tokenizer, place=str(sources[0].path))
    sweep = _stored(_scores_file(out), request, score.higher_is_better)
    candidate = out.with_name(f".{out.name}.candidate")
    for alpha in alphas:
        if alpha in sweep.candidates:
            continue
        shutil.rmtree(candidate, ignore_errors=True)
        try:
            write_run(
                candidate, sources, [1 - alpha, alpha], rule={"alpha": alpha}, keep_step=False, advance=lambda _: None
            )
            sweep.candidates[alpha] = score(candidate)
        except NumericsError as error:
            raise NumericsError(f"alpha {alpha:g}: {error}") from error
        finally:
            shutil.rmtree(candidate, ignore_errors=True)
        disk.write_text(_scores_file(out), json.dumps(sweep.as_json()))
        console.print(f"alpha {alpha:g}: {sweep.candidates[alpha].mean:.4f}")
    sweep.candidates = {alpha: sweep.candidates[alpha] for alpha in alphas}
    names = list(next(iter(sweep.candidates.values())).parts)
    table = Table("alpha", *names, *["mean"] * (len(names) > 1), "")
    for alpha, scores in sorted(sweep.candidates.items()):
        cells = [f"{scores.parts[name]:.4f}" for name in names]
        mark = "best" if alpha == sweep.best else ""
        table.add_row(f"{alpha:g}", *cells, *[f"{scores.mean:.4f}"] * (len(names) > 1), mark)
    console.print(table)
    return sweep


def _scores_file(out: Path) -> Path:
    """Where the scores of a sweep are stored until its run is written."""
    return out.with_name(f".{out.name}.{SWEEP}")


def _stored(path: Path, request: dict[str, Any], higher_is_better: bool) -> _Sweep:
    """The stored scores of this request; none if there are none, or they are of another request."""
    sweep = _Sweep(request, higher_is_better, {})
    try:
        plain = json.loads(path.read_text())
        if plain["request"] == request:
            for one in plain["candidates"]:
                sweep.candidates[float(one["alpha"])] = Scores(dict(one["parts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _Sweep(request, higher_is_better, {})
    return sweep
