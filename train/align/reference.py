"""The reference of DPO: log-probabilities of every answer under frozen weights, cached in the run's folder or computed online.

    cached   before step 1: rows of the run --reference, forward only--> RUN/reference/00000-SHA256.npz, ...; then looked up
    online   a frozen second model at the run's layout reads each step's rows first

A cached file has the log-probabilities of some rows and is written whole; its name has the digest of its content. After a kill,
the rows that are in no file are computed. `request.json` says of which weights and data they are. A run continues only with the
same. A new run uses its own model before its first step; otherwise a model is built and freed again.
"""

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.stream import Dataset
from data.system import disk
from recipes.schema.errors import CheckpointError, DataError, NumericsError, refuse
from recipes.schema.facts import named
from recipes.schema.foreign import printable, read_json
from recipes.schema.objective_rules import language_model_problems
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import describe_precision
from recipes.schema.teacher_rules import tokenizer_problems
from train.align.dpo import log_prob_step
from train.build import frozen_engine
from train.checkpoint.random_state import random_state_kept
from train.engine import Engine, run_schedule
from train.evaluate.deal import deal, evaluating, on_all_ranks
from train.parallel.mesh import Mesh

FOLDER = "reference"
_REQUEST = "request.json"
_PIECE_ROWS = 1024
"""Rows of a file: what is computed again after a kill."""
_WORDS = {"fingerprint": "weights", "data_hash": "data", "precision": "precision"}

log = logging.getLogger(__name__)

Attach = Callable[..., list[Any]]
"""attach(batches, is_heldout=False): the batches of this rank with `reference`. Collective over the world."""


@dataclass(frozen=True)
class ReferenceWeights:
    """The checkpoint that answers are compared with."""

    path: Path
    fingerprint: str
    is_own: bool
    """Whether the run's model has just read these weights, and no step has changed them."""


def reference_of(recipe: Recipe, lineage: dict[str, Any], *, step: int, tokenizer: str) -> ReferenceWeights:
    """The reference of a run. lineage: of the run's state; step: steps finished. CheckpointError or RecipeError if it cannot be
    used."""
    place = recipe.objective.dpo.reference
    if place is None:
        path, fingerprint = lineage.get("started_from"), lineage.get("started_from_fingerprint")
        if path is None or fingerprint is None:
            raise CheckpointError(
                "objective.dpo.reference=null is the model that this run started from, but its checkpoints do not name one. "
                "Set objective.dpo.reference."
            )
        return ReferenceWeights(Path(path), fingerprint, is_own=step == 0)
    found = named(place)
    if found.path is None or found.manifest is None:
        raise CheckpointError(f"objective.dpo.reference: {found.error}")
    where = f"objective.dpo.reference={place}"
    refuse(
        tokenizer_problems(
            where, found.manifest.tokenizer, tokenizer, where=recipe.data.folder, otherwise="name another reference"
        )
    )
    return ReferenceWeights(found.path, found.manifest.fingerprint, is_own=False)


def open_reference(
    recipe: Recipe, engine: Engine, dataset: Dataset, weights: ReferenceWeights, *, folder: Path, is_new: bool
) -> Attach:
    """The reference of a run, ready for its first step. folder: of the run. is_new: no step is saved, so another reference may
    replace what is in the folder. Collective over the world.

    Raises DataError if the folder has log-probabilities of another reference, other data or another precision, or a damaged file.
    """
    mesh, config = engine.mesh, recipe.objective.dpo
    if config.reference_log_probs == "online":
        online = _built(recipe, weights, mesh)
        return lambda batches, is_heldout=False: _with_reports(online, batches)
    request = {
        "fingerprint": weights.fingerprint,
        "data_hash": dataset.manifest_hash,
        "precision": describe_precision(recipe.model, recipe.precision),
    }
    cache = ReferenceCache(folder / FOLDER, dataset)
    # Every rank reads the same files, before rank 0 writes more.
    cache.open(request, is_new=is_new, mesh=mesh)
    missing = cache.missing(recipe)
    if missing:
        own = engine if weights.is_own else _built(recipe, weights, mesh)
        with evaluating(own.chunks):
            for start in range(0, len(missing), _PIECE_ROWS):
                rows = missing[start : start + _PIECE_ROWS]
                found = _log_probs(own, dataset, rows)
                on_all_ranks(mesh, partial(cache.keep, rows, found, is_writer=mesh.rank == 0))
    return cache.attach


def _built(recipe: Recipe, weights: ReferenceWeights, mesh: Mesh) -> Engine:
    found = named(str(weights.path))
    if found.path is None or found.manifest is None or found.recipe is None:
        raise CheckpointError(
            f"the reference of this run cannot be read: {found.error or found.recipe_error}. Its log-probabilities are missing "
            f"for some rows. Restore {weights.path}."
        )
    if found.manifest.fingerprint != weights.fingerprint:
        raise CheckpointError(
            f"the reference of this run, {weights.path}, has other weights now ({found.manifest.fingerprint[:12]}, not "
            f"{weights.fingerprint[:12]}). Restore it, or choose another run.name."
        )
    refuse(language_model_problems(found.recipe.model, place=str(weights.path), key="objective.dpo.reference"))
    with random_state_kept(mesh):  # that of the run is restored already
        return frozen_engine(replace(recipe, model=found.recipe.model), found.path, mesh)


@dataclass(frozen=True)
class Row:
    """A row of the data, whose answers the reference reads once."""

    key: int
    """Number of the row among all of the data: split, source and row in one."""
    place: int
    """Its position; of a held-out row, its index among those of its source."""
    heldout: str | None
    """Name of its source if it is held out."""


class ReferenceCache:
    """The log-probabilities of a run's rows, in memory and in a folder."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self._folder = folder
        self._dataset = dataset
        self._found: dict[int, np.ndarray] = {}

    def open(self, request: dict[str, str], *, is_new: bool, mesh: Mesh) -> None:
        """Read what is there. DataError on every rank if it is of another request, or damaged. Collective over the world."""
        differs = on_all_ranks(mesh, lambda: self._difference(request, is_new=is_new))
        on_all_ranks(mesh, lambda: self._begin(request, differs) if mesh.rank == 0 else None)
        on_all_ranks(mesh, self._read_all)

    def _difference(self, request: dict[str, str], *, is_new: bool) -> str:
        """How the request of the folder differs; empty if it does not, or if there is none."""
        path = self._folder / _REQUEST
        if not path.exists():
            return ""
        try:
            stored = read_json(path)
            names = [name for name in request if stored.get(name) != request[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path} cannot be read: {printable(str(error))}. Remove {self._folder}.") from error
        differs = "; ".join(f"{_WORDS[n]} {str(stored.get(n))[:24]}, now {request[n][:24]}" for n in names)
        if differs and not is_new:
            raise DataError(
                f"{self._folder} has log-probabilities of another reference: {differs}. Restore what they were computed with, "
                f"or choose another run.name."
            )
        return differs

    def _begin(self, request: dict[str, str], differs: str) -> None:
        """Make the folder anew if it is of another request or missing."""
        path = self._folder / _REQUEST
        if path.exists() and not differs:
            return
        with _writing(self._folder):
            if self._folder.exists():
                log.warning(
                    "%s has log-probabilities of another reference (%s): computing them again.", self._folder, differs
                )
                disk.remove_tree(self._folder)
            self._folder.mkdir(parents=True)
            disk.write_text(path, json.dumps(request))

    def missing(self, recipe: Recipe) -> list[Row]:
        """The rows of the run and of its evaluations that are not there, in the order in which they are needed."""
        dataset, rows = self._dataset, dict[int, Row]()
        for index, name in enumerate(dataset.source_names):
            for place in range(min(recipe.evaluate.rows_per_source, dataset.heldout_count(name))):
                key = _key(True, index, place)
                rows[key] = Row(key, place, name)
        positions = np.arange(recipe.run.steps * recipe.run.global_rows)
        draw = dataset.blend.draw(positions)
        for place, source, row in zip(positions.tolist(), draw.source.tolist(), draw.row.tolist(), strict=True):
            key = _key(False, source, row)
            rows.setdefault(key, Row(key, place, None))
        return [row for key, row in rows.items() if key not in self._found]

    def keep(self, rows: Sequence[Row], values: Sequence[np.ndarray], *, is_writer: bool) -> None:
        """Keep the log-probabilities of some rows; one rank also writes them."""
        self._found |= {row.key: found for row, found in zip(rows, values, strict=True)}
        if not is_writer:
            return
        stream = io.BytesIO()
        np.savez(
            stream,
            keys=np.array([row.key for row in rows], dtype=np.int64),
            counts=np.array([len(found) for found in values], dtype=np.int64),
            values=np.concatenate(values),
        )
        content = stream.getvalue()
        number = len(list(self._folder.glob("*.npz")))
        with _writing(self._folder):
            disk.write_bytes(self._folder / f"{number:05d}-{hashlib.sha256(content).hexdigest()}.npz", content)

    def attach(self, batches: Sequence[Any], is_heldout: bool = False) -> list[Any]:
        """The batches with `reference`."""
        return [replace(batch, reference=self._of(batch, is_heldout)) for batch in batches]

    def _of(self, batch: Any, is_heldout: bool) -> torch.Tensor:
        source, row = batch.source.tolist(), batch.positions
        if not is_heldout:
            row = self._dataset.blend.draw(batch.positions).row
        values = np.zeros(batch.ranks.shape)
        for place, (which, number) in enumerate(zip(source, row.tolist(), strict=True)):
            found = self._found[_key(is_heldout, which, number)]
            values[place, : len(found)] = found
        return torch.from_numpy(values)

    def _read_all(self) -> None:
        for piece in sorted(self._folder.glob("*.npz")):
            self._read(piece)

    def _read(self, piece: Path) -> None:
        try:
            content = piece.read_bytes()
        except OSError as error:
            raise DataError(
                f"{piece} cannot be read: {error.strerror or error}. Make it readable, or remove it."
            ) from error
        if hashlib.sha256(content).hexdigest() != piece.stem.partition("-")[2]:
            raise DataError(f"{piece} is damaged. Remove it: its rows are then computed again.")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            ends = np.cumsum(arrays["counts"])[:-1]
            parts = np.split(arrays["values"], ends)
            self._found |= dict(zip(arrays["keys"].tolist(), parts, strict=True))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}. Free some space.") from error


def _key(is_heldout: bool, source: int, row: int) -> int:
    return (int(is_heldout) << 62) | (source << 44) | row


def _log_probs(engine: Engine, dataset: Dataset, rows: Sequence[Row]) -> list[np.ndarray]:
    """Log-probability of every answer of some rows, by row, on every rank. Collective over the world."""
    mesh = engine.mesh
    dealt = deal(len(rows), mesh, microbatch_rows=engine.microbatch_rows)
    batches = [_batch(dataset, [rows[number] for number, _ in part]) for part in dealt]
    reports = run_schedule(engine, batches, forward_step=log_prob_step(mesh), forward_only=True)
    own: list[tuple[int, np.ndarray]] = []
    if mesh.groups.tp.rank() == 0 and mesh.groups.cp.rank() == 0:  # the others have the same
        for part, batch, sums_BD in zip(dealt, batches, reports, strict=False):
            counts = (batch.ranks >= 0).sum(dim=1).tolist()
            own += [
                (number, sums[:count].cpu().numpy())
                for (number, is_counted), sums, count in zip(part, sums_BD, counts, strict=True)
                if is_counted
            ]
    found = dict(pair for of_rank in mesh.gather_objects(own) for pair in of_rank)
    for number, values in found.items():
        if not math.isfinite(values.sum()):
            raise NumericsError(
                f"the reference of DPO gives a log-probability of {values.sum()} at {rows[number]}. Its weights or the precision "
                f"are at fault: try precision=fp32, or another objective.dpo.reference."
            )
    return [found[number] for number in range(len(rows))]


def _batch(dataset: Dataset, rows: Sequence[Row]) -> Any:
    """Rows of a microbatch, of one split or both."""
    if all(row.heldout is None for row in rows):
        return dataset.training_rows(np.array([row.place for row in rows]))
    singles = [
        dataset.training_rows(np.array([row.place]))
        if row.heldout is None
        else dataset.heldout_rows(row.heldout, row.place, 1)
        for row in rows
    ]
    return _joined(singles)


def _joined(batches: Sequence[Any]) -> Any:
    """Batches of one row as one; ranks and groups padded with -1."""
    most = max(batch.ranks.shape[1] for batch in batches)

    def stacked(name: str) -> torch.Tensor:
        parts = [getattr(batch, name) for batch in batches]
        if name in ("ranks", "groups"):
            parts = [torch.nn.functional.pad(part, (0, most - part.shape[1]), value=-1) for part in parts]
        return torch.cat(parts)

    names = ("tokens", "labels", "document_index", "source", "learned", "ranks", "groups")
    positions = np.concatenate([batch.positions for batch in batches])
    return replace(batches[0], **{name: stacked(name) for name in names}, positions=positions)


def _with_reports(engine: Engine, batches: Sequence[Any]) -> list[Any]:
    """The batches with what a frozen model says of them. Earlier pipeline stages need no reference: their batches stay."""
    with evaluating(engine.chunks):
        reports = run_schedule(engine, list(batches), forward_step=log_prob_step(engine.mesh), forward_only=True)
    if not reports:
        return list(batches)
    return [replace(batch, reference=sums) for batch, sums in zip(batches, reports, strict=True)]
