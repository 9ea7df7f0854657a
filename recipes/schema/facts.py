"""Facts that rules ask about and a recipe does not say: the machine, the checkpoints and answers a recipe names, the data.

    Machine      what computes: GPU or not, its generation, which packages are missing
    Disk         what is on this disk: `read_disk` reads manifests only (JSON), so that a plan needs no torch
    Prepared     the prepared data; `data.prepared` reads it, because a tokenizer's file needs the tokenizer's reader

Plain values. `recipes.schema.rules` judges them; the trainer, the planner and the launchers only collect them.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.schema.checkpoint_steps import candidates, checkpoint_at, lost_run, refuse_to_forget, steps_in
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
"""What the `te` backend is made of -> modules to be found."""
REQUEST = "request.json"
REQUEST_FORMAT = 2


@dataclass(frozen=True)
class Machine:
    """The machine a run is for, as far as rules ask."""

    has_gpu: bool
    name: str = "this machine"
    generation: str = ""
    """`ampere`, `ada`, `hopper`, `blackwell`, ...; empty if it is not known: rules about it are then left to the run."""
    has_fp8: bool = True
    """Whether the GPU multiplies FP8 matrices."""
    missing: tuple[str, ...] = ()
    """Packages of the `te` backend that are not installed."""
    fp32_block_scales: bool = False
    """Whether the environment of the run asks Transformer Engine for block scales in fp32."""


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data, judged for one recipe."""

    vocab_size: int = 0
    """0 if it is not known."""
    tokenizer: str = ""
    """Fingerprint; empty if it is not known."""
    hash: str = ""
    """Identity of the data and of the order of its rows; empty if the order is wrong."""
    is_here: bool = True
    """False: nothing is prepared in the folder, and `problems` says so."""
    problems: tuple[Problem, ...] = ()
    """What the folder lacks for this recipe: sources, rows, special tokens."""
    exhausted: tuple[tuple[str, int], ...] = ()
    """Sources that others replace before the run ends, and the row from which they do."""


@dataclass(frozen=True)
class Named:
    """A checkpoint that a recipe names."""

    place: str
    """As the recipe writes it."""
    is_here: bool = True
    """False: nothing is at that place on this disk."""
    error: str = ""
    """Why it cannot be used; empty for a good one."""
    path: Path | None = None
    manifest: Manifest | None = None
    recipe: Recipe | None = None
    """Of the run that wrote it. None if the manifest has none that can be read."""
    recipe_error: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """`identity_of` a good one."""
        assert self.path is not None and self.manifest is not None
        return identity_of(self.path, self.manifest)


@dataclass(frozen=True)
class CacheRequest:
    """What a teacher cache contains. Logits of two requests never share a folder."""

    teacher: str
    """The teacher's checkpoint, at the path it had when the cache was written."""
    step: int
    """Of that checkpoint."""
    fingerprint: str
    """Of its weights: they count, not where they are."""
    numbers: str
    """Number format the teacher computed in, as `fp32` or `bf16, blockwise`."""
    top_k: int
    temperature: float
    values: str
    """`float16` or `float32`: format of the log-probabilities."""
    vocab: int
    tokenizer: str
    """Fingerprint; empty if unknown."""
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
    """What is on this disk of all that a recipe names, its prepared data aside."""

    teacher: Named | None = None
    """None: not named, or not run because its logits are read from a cache."""
    start: Named | None = None
    """`run.start_from`. None: not named, or not read because the run has checkpoints of its own."""
    cache: CacheRequest | None = None
    cache_error: str = ""
    cache_is_here: bool = True
    newest: Named | None = None
    """The newest checkpoint of the run whose manifest and file sizes are right."""
    lost: Problem | None = None
    """Why the run's folder must not be started over, though no checkpoint in it can be used."""


def no_data_problem(folder: str | Path) -> Problem:
    """A folder without prepared data."""
    return Problem(
        "data.folder", f"no prepared data in {folder} (no manifest.json).", "Prepare it: stratum prepare -cn RECIPE."
    )


def not_prepared(folder: str) -> Prepared:
    """What is known of a folder without prepared data."""
    return Prepared(is_here=False, problems=(no_data_problem(folder),))


def missing_packages() -> tuple[str, ...]:
    """Packages of the `te` backend that this Python does not find."""
    return tuple(
        package
        for package, modules in _PACKAGES.items()
        if any(importlib.util.find_spec(module) is None for module in modules)
    )


def wants_fp32_block_scales(environment: Mapping[str, str]) -> bool:
    """Whether an environment asks Transformer Engine for block scales in fp32."""
    return environment.get(BLOCK_SCALES, "0") == "1"


def read_disk(recipe: Recipe) -> Disk:
    """What is on this disk of a recipe's teacher, start and run. Reads manifests and sizes, no weights; raises nothing."""
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
        lost=lost,
    )


def _has_steps(checkpoints: Path) -> bool:
    """Whether anything was ever saved there; true for a folder that cannot be read (`newest_of` says so)."""
    try:
        return bool(steps_in(checkpoints))
    except CheckpointError:
        return True


def named(place: str) -> Named:
    """The checkpoint at a place that a user names: a checkpoint's folder, or the newest of a run."""
    is_here = os.path.lexists(place)
    try:
        path, manifest = checkpoint_at(place)
    except (CheckpointError, OSError) as error:
        return Named(place, is_here=is_here, error=str(error))
    return _described(place, path, manifest)


def newest_of(folder: Path) -> tuple[Named | None, Problem | None]:
    """The newest usable checkpoint of a run's folder; or why the run must not start at step 0."""
    checkpoints = folder / "checkpoints"
    try:
        good, notes = candidates(checkpoints)
        if good:
            return _described(str(folder), *good[0]), None
        refuse_to_forget(checkpoints, notes)
    except OSError as error:
        return None, Problem("run.name", f"{checkpoints} cannot be read: {error}.", "Make it readable.")
    except CheckpointError as error:
        return None, Problem("run.name", str(error))
    text = lost_run(folder)
    remedy = f"Bring them back, choose another run.name, or move {folder} away to start over."
    return None, Problem("run.name", text, remedy) if text else None


def _described(place: str, path: Path, manifest: Manifest) -> Named:
    recipe, error = None, ""
    try:
        recipe = recipe_from_mapping(manifest.recipe)
    except RecipeError as problem:
        error = f"{path} holds no recipe that this version reads: {problem}"
    return Named(place, path=path, manifest=manifest, recipe=recipe, recipe_error=error)


def identity_of(path: Path | str, manifest: Manifest) -> dict[str, Any]:
    """What a run remembers of who taught it (JSON values). Equal fingerprints are equal weights, wherever they are."""
    return {"checkpoint": str(path), "step": manifest.step, "fingerprint": manifest.fingerprint}


def read_cache(place: str | Path) -> tuple[CacheRequest | None, str]:
    """The request of a teacher cache, or why it cannot be read."""
    try:
        return read_request(Path(place)), ""
    except DataError as error:
        return None, str(error)


def read_request(folder: Path) -> CacheRequest:
    """The request of a teacher cache. DataError if it is missing or cannot be read."""
    path = folder / REQUEST
    again = "stratum teacher-cache with this recipe"
    try:
        plain = read_json(path)
        if plain.get("format") != REQUEST_FORMAT:
            raise DataError(
                f"{path} has format {plain.get('format')}; this version reads {REQUEST_FORMAT}. Write the cache again, "
                f"into another folder: {again}."
            )
        return CacheRequest(**plain)
    except FileNotFoundError as error:
        raise DataError(
            f"objective.teacher_cache={folder} is not a teacher cache: {path.name} is missing. Write it: {again}."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Restore it, or write the cache again into another folder: {again}."
        ) from error
