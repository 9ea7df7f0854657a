"""Facts that rules need and that are not in a recipe: the machine, the checkpoints and caches a recipe names, the data.

    Machine      with or without a GPU, its generation, missing packages
    Disk         checkpoints and teacher cache on this disk. `read_disk` reads JSON manifests only, so a plan needs no torch
    Prepared     the prepared data. `data.prepared` reads it, because a tokenizer's file needs the tokenizer's reader

They are plain values. The trainer, the planner and the launchers collect them; `recipes.schema.rules` judges them.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.schema.checkpoint_steps import candidates, checkpoint_at, lost_run, refuse_lost_checkpoints, steps_in
from recipes.schema.errors import CheckpointError, DataError, Problem, RecipeError
from recipes.schema.foreign import read_json
from recipes.schema.manifest import Manifest
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe

BLOCK_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""Environment variable that Transformer Engine reads once, when it is imported."""
_PACKAGES = {
    "transformer-engine": ("transformer_engine_torch",),
    "mamba-ssm with causal-conv1d": ("mamba_ssm", "causal_conv1d"),
}
"""{package that the `te` backend needs: modules that must be importable}."""
REQUEST = "request.json"
REQUEST_FORMAT = 2


@dataclass(frozen=True)
class Machine:
    """What rules need to know about the machine of a run."""

    has_gpu: bool
    name: str = "this machine"
    generation: str = ""
    """`ampere`, `ada`, `hopper`, `blackwell`, ...; empty if unknown. Rules about it are then checked only by the run itself."""
    has_fp8: bool = True
    """Whether the GPU multiplies FP8 matrices."""
    missing: tuple[str, ...] = ()
    """Packages of the `te` backend that are not installed."""
    fp32_block_scales: bool = False
    """Whether the environment of the run asks Transformer Engine for block scales in fp32."""


@dataclass(frozen=True)
class Prepared:
    """Facts about a folder of prepared data, for one recipe."""

    vocab_size: int = 0
    """Size of the tokenizer's vocabulary; 0 if unknown."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer; empty if unknown."""
    hash: str = ""
    """Identity of the data and of the order of its rows; empty if the order is not valid."""
    is_here: bool = True
    """False: the folder has no prepared data, and `problems` says so."""
    problems: tuple[Problem, ...] = ()
    """What is missing in the folder for this recipe: sources, rows, special tokens."""
    exhausted: tuple[tuple[str, int], ...] = ()
    """(source, row from which others replace it), for sources that are replaced before the run ends."""


@dataclass(frozen=True)
class Named:
    """A checkpoint that a recipe names."""

    place: str
    """The path, as the recipe gives it."""
    is_here: bool = True
    """False: the path does not exist on this disk."""
    error: str = ""
    """Why it cannot be used; empty if it can."""
    path: Path | None = None
    manifest: Manifest | None = None
    recipe: Recipe | None = None
    """Recipe of the run that wrote it. None if this version cannot read the one in the manifest."""
    recipe_error: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """`identity_of` a checkpoint without an error."""
        assert self.path is not None and self.manifest is not None
        return identity_of(self.path, self.manifest)


@dataclass(frozen=True)
class CacheRequest:
    """What a teacher cache contains. A folder never contains logits of two different requests."""

    teacher: str
    """The teacher's checkpoint, at the path it had when the cache was written."""
    step: int
    """Step of that checkpoint."""
    fingerprint: str
    """Fingerprint of its weights. The teacher is the same if this is, whatever its path."""
    numbers: str
    """Number format in which the teacher computed, such as `fp32` or `bf16, blockwise`."""
    top_k: int
    temperature: float
    values: str
    """`float16` or `float32`: format of the log-probabilities."""
    vocab: int
    tokenizer: str
    """Fingerprint of the tokenizer; empty if unknown."""
    row_tokens: int
    documents: bool
    """Whether the teacher separated documents within a row."""
    format: int = REQUEST_FORMAT

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher's identity, as a run records it (`identity_of`)."""
        return {"checkpoint": self.teacher, "step": self.step, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Disk:
    """What is on this disk of the checkpoints and the cache that a recipe names. Prepared data is in `Prepared`."""

    teacher: Named | None = None
    """None: no teacher is named, or it is not needed because its logits are read from a cache."""
    start: Named | None = None
    """`run.start_from`. None: not set, or not needed because the run has checkpoints."""
    cache: CacheRequest | None = None
    cache_error: str = ""
    cache_is_here: bool = True
    newest: Named | None = None
    """The newest checkpoint of the run whose manifest and file sizes are right."""
    lost: Problem | None = None
    """Why the run must not start at step 0 although no checkpoint in its folder can be used."""


def no_data_problem(folder: str | Path) -> Problem:
    """The problem that a folder has no prepared data."""
    return Problem(
        "data.folder", f"no prepared data in {folder} (no manifest.json).", "Prepare it: stratum prepare -cn RECIPE."
    )


def not_prepared(folder: str) -> Prepared:
    """Facts about a folder without prepared data."""
    return Prepared(is_here=False, problems=(no_data_problem(folder),))


def missing_packages() -> tuple[str, ...]:
    """Packages of the `te` backend that are not installed."""
    return tuple(
        package
        for package, modules in _PACKAGES.items()
        if any(importlib.util.find_spec(module) is None for module in modules)
    )


def wants_fp32_block_scales(environment: Mapping[str, str]) -> bool:
    """Whether an environment asks Transformer Engine for block scales in fp32."""
    return environment.get(BLOCK_SCALES, "0") == "1"


def read_disk(recipe: Recipe) -> Disk:
    """What is on this disk of a recipe's teacher, start and run. Reads manifests and sizes, no weights. Raises no error."""
    folder = Path(recipe.run.folder) / recipe.run.name
    newest, lost = newest_of(folder)
    objective = recipe.objective
    distils = objective.kind == "distill"
    cached = distils and objective.teacher_cache is not None
    cache, cache_error = read_cache(objective.teacher_cache) if cached and objective.teacher_cache else (None, "")
    begins = recipe.run.start_from if newest is None and not _has_steps(folder / "checkpoints") else None
    return Disk(
        teacher=named(objective.teacher) if distils and objective.teacher is not None else None,
        start=named(begins) if begins is not None else None,
        cache=cache,
        cache_error=cache_error,
        cache_is_here=not cached or os.path.lexists(str(objective.teacher_cache)),
        newest=newest,
        lost=None if recipe.run.storage else lost,  # the trainer looks again after it has asked the storage
    )


def _has_steps(checkpoints: Path) -> bool:
    """Whether the folder has a step; true also if it cannot be read, which `newest_of` reports."""
    try:
        return bool(steps_in(checkpoints))
    except CheckpointError:
        return True


def named(place: str) -> Named:
    """The checkpoint that a user's path names: a checkpoint's folder, or the newest of a run."""
    is_here = os.path.lexists(place)
    try:
        path, manifest = checkpoint_at(place)
    except (CheckpointError, OSError) as error:
        return Named(place, is_here=is_here, error=str(error))
    return _described(place, path, manifest)


def newest_of(folder: Path) -> tuple[Named | None, Problem | None]:
    """(newest usable checkpoint of a run's folder, None) or (None, why the run must not start at step 0, if so)."""
    checkpoints = folder / "checkpoints"
    try:
        good, notes = candidates(checkpoints)
        if good:
            return _described(str(folder), *good[0]), None
        refuse_lost_checkpoints(checkpoints, notes)
    except OSError as error:
        return None, Problem("run.name", f"{checkpoints} cannot be read: {error}.", "Make it readable.")
    except CheckpointError as error:
        return None, Problem("run.name", str(error))
    text = lost_run(folder)
    remedy = f"Restore them, choose another run.name, or move {folder} away to start at step 0."
    return None, Problem("run.name", text, remedy) if text else None


def _described(place: str, path: Path, manifest: Manifest) -> Named:
    recipe, error = None, ""
    try:
        recipe = recipe_from_mapping(manifest.recipe)
    except RecipeError as problem:
        error = f"this version cannot read the recipe in {path}: {problem}"
    return Named(place, path=path, manifest=manifest, recipe=recipe, recipe_error=error)


def identity_of(path: Path | str, manifest: Manifest) -> dict[str, Any]:
    """What a run records about its teacher (JSON values). Equal fingerprints mean equal weights, whatever the path."""
    return {"checkpoint": str(path), "step": manifest.step, "fingerprint": manifest.fingerprint}


def read_cache(place: str | Path) -> tuple[CacheRequest | None, str]:
    """(request of a teacher cache, "") or (None, why it cannot be read)."""
    try:
        return read_request(Path(place)), ""
    except DataError as error:
        return None, str(error)


def read_request(folder: Path) -> CacheRequest:
    """The request of a teacher cache. DataError if it is missing or cannot be read."""
    path = folder / REQUEST
    command = "stratum teacher-cache with this recipe"
    try:
        plain = read_json(path)
        if plain.get("format") != REQUEST_FORMAT:
            raise DataError(
                f"{path} has format {plain.get('format')}; this version reads format {REQUEST_FORMAT}. Write the cache again, "
                f"into another folder: {command}."
            )
        return CacheRequest(**plain)
    except FileNotFoundError as error:
        raise DataError(
            f"objective.teacher_cache={folder} is not a teacher cache: {path.name} is missing. Write it: {command}."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Restore it, or write the cache again into another folder: {command}."
        ) from error
