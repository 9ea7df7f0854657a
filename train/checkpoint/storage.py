"""From a built model to a checkpoint's tensors and back, at any layout: what is saved, and loading with proof.

    step_00000100/
        manifest.json            step, position, layout, recipe, lineage, and each tensor's shape and fingerprint
        index.json               which box of which tensor lies where
        rank_00000.safetensors   what rank 0 wrote: its weights and its share of the optimizer's state

Every tensor has its whole-model name and is found box by box, so another layout can read it. After loading, the live
tensors of all ranks are fingerprinted and compared with the manifest: what training continues from is what was saved.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.system import disk
from recipes.schema.errors import CheckpointError, NumericsError
from train.checkpoint import fingerprint, publishing
from train.checkpoint.files import Piece, Reader, scan
from train.checkpoint.fingerprint import Sums
from train.checkpoint.manifest import DTYPE_NAMES, Manifest, RunState, describe_not_finite, read_manifest
from train.checkpoint.pieces import (
    MASTER,
    MODEL,
    Local,
    copied_pieces,
    locals_of,
    optimizer_parts,
    optimizer_pieces,
    owned_pieces,
    weight_pieces,
)
from train.checkpoint.random_state import RANDOM, random_pieces, restore_random_state
from train.checkpoint.saving import Peers, Save, Snapshot
from train.engine import Engine
from train.parallel.mesh import Mesh

log = logging.getLogger(__name__)


OTHER_MODEL = "is of another model"


def snapshot_of(engine: Engine, state: RunState) -> Snapshot:
    """What this rank saves of a training run: weights, buffers, masters, moments, random state. Collective (precision).

    state: its layout and tokens are filled in here, from the engine.
    """
    engine.precision.gather_state()
    modules = [chunk.module for chunk in engine.chunks]
    locals_ = locals_of(modules, engine.mesh.groups.dp_cp)
    parts = optimizer_parts(engine.optimizer, modules, locals_)
    state = replace(state, layout=_layout(engine.mesh), tokens=state.position * engine.row_tokens)
    manifest = _manifest_of(state, updates=_updates(engine))
    pieces = [*owned_pieces(locals_, parts), *random_pieces(engine.mesh)]
    return Snapshot(manifest, pieces, parts, copied_pieces(parts))


def write_model(folder: Path, chunks: Sequence[Any], *, mesh: Mesh, state: RunState) -> Manifest:
    """Write the weights of unwrapped model chunks as a checkpoint without optimizer state, proven and published whole.

    folder: the checkpoint itself, e.g. runs/NAME/checkpoints/step_00000000; it must not exist, its parent is made. Training
    that starts there (or finds it as its run's newest) takes the weights and begins with fresh moments and the given step
    and position. state: its recipe builds the model, its lineage says where the weights come from; its layout is filled in.

    Collective over the world. Raises CheckpointError on every rank; nothing is left behind then.
    """
    manifest = _manifest_of(replace(state, layout=_layout(mesh)))
    pieces = owned_pieces(locals_of(chunks, mesh.groups.dp_cp), None)
    aside = disk.aside_of(folder)

    def prepare() -> None:
        if folder.exists():
            raise CheckpointError(f"{folder} is there already. Choose another folder, or move it away.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()

    def done(complete: Manifest) -> dict[str, Any]:
        publishing.publish(aside, folder)
        return {"path": str(folder)}

    save = Save(
        Snapshot(manifest, pieces),
        peers=Peers(mesh.saving),
        aside=aside,
        memory={},
        staging=None,
        prepare=prepare,
        publish=done,
        retries=0,
        retry_wait_s=0.0,
    )
    save.run()
    if save.error is not None:
        raise (NumericsError if save.is_numeric else CheckpointError)(save.error)
    return read_manifest(folder)


def read_training(folder: Path, engine: Engine) -> Manifest:
    """Fill weights, optimizer state and random state of this rank from a checkpoint, whatever layout wrote it, and prove it.

    Collective over the world. Raises CheckpointError on every rank: another model, damage, content that is not what was
    saved; the engine then holds a mixture and must be filled from another checkpoint or not be used.
    """
    reader, error = _open(folder)
    _agree(error)
    assert reader is not None
    modules = [chunk.module for chunk in engine.chunks]
    locals_ = locals_of(modules, engine.mesh.groups.dp_cp)
    parts = optimizer_parts(engine.optimizer, modules, locals_)
    has_optimizer = reader.manifest.updates is not None
    loading = _Loading(reader, engine.mesh.device)
    loading.want(weight_pieces(locals_))
    if has_optimizer:
        loading.want(optimizer_pieces(parts))
    loading.finish(ignored=() if has_optimizer else ("optimizer.",))
    _hand_over(locals_)
    for part in engine.optimizer.param_groups:
        part["step"] = reader.manifest.updates or 0
    if not has_optimizer:
        engine.optimizer.reload_model_params()
        for part_ in parts:
            for values in part_.moments.values():
                values.zero_()
    _agree(_error_in(lambda: restore_random_state(reader, engine.mesh)))
    engine.precision.apply_state()
    return reader.manifest


def read_weights(folder: Path, chunks: list[Any], *, groups: Any) -> None:
    """Fill the weights of unwrapped model chunks only (evaluation, generation, teachers), at any layout. Collective.

    groups: Megatron's process groups of the chunks' own layout. CheckpointError, on every rank, names weights that only one
    side has. A precision backend's own state may be missing.
    """
    reader, error = _open(folder)
    _agree(error)
    assert reader is not None
    locals_ = locals_of(chunks, groups.dp_cp)
    loading = _Loading(reader, torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
    loading.want(weight_pieces(locals_))
    loading.finish(ignored=("optimizer.",))
    _hand_over(locals_)


def publish(aside: Path, final: Path, state: RunState) -> None:
    """Complete a checkpoint of whole tensors written aside (`train.checkpoint.tensors.write_weights`) and give it its name.

    Shapes and fingerprints are taken from the files. state: a manifest of another checkpoint will do. One process calls it.
    Raises NumericsError where they hold NaN or infinity.
    """
    index, records = scan(aside)
    if sick := {name: record.not_finite for name, record in records.items() if record.not_finite}:
        raise NumericsError(f"{final} is not written: {describe_not_finite(sick)}.")
    files = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    publishing.seal(aside, replace(_manifest_of(state), tensors=records, files=files), index)
    publishing.publish(aside, final)


def _versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint's content depends on."""
    # Not megatron.core.__version__: that ends in the commit of whatever repository the process was started in.
    return {"torch": torch.__version__, "megatron-core": version("megatron-core")}


class _Loading:
    """Reads pieces of one checkpoint and adds up what arrived, to be compared over all ranks at the end.

    Every piece counts, also of what several ranks hold (data-parallel copies, norms, tied embeddings): all ranks together hold a
    tensor as often as their elements fill it, and their fingerprints must add up to that many times the one that was saved.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader = reader
        self.device = device
        self.names = sorted(reader.manifest.tensors)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.sums: list[Sums] = [fingerprint.ZERO] * len(self.names)
        self.elements = [0] * len(self.names)
        """How many are wanted of each tensor."""
        self.missing: set[str] = set()
        self.wanted: list[tuple[str, Piece]] = []
        """Tensor of the checkpoint, piece to fill."""
        self.error: str | None = None
        """What this rank cannot do: another model, or a file that cannot be read."""

    def want(self, pieces: Sequence[Piece]) -> None:
        """Note pieces to fill. Never raises."""
        for piece in pieces:
            name = self._source(piece)
            if name is None:
                self.missing.add(piece.tensor)
                continue
            record = self.reader.manifest.tensors[name]
            if record.shape != piece.whole:
                shapes = f"{name} has shape {record.shape} there, {piece.whole} in this model"
                self.error = self.error or f"{self.reader.folder} {OTHER_MODEL}: {shapes}."
                continue
            self.elements[self.number[name]] += piece.data.numel()
            self.wanted.append((name, piece))

    def _fill_all(self) -> None:
        """Read what is wanted in the order of the files, which the system then reads ahead. Never raises."""
        try:
            self.wanted.sort(key=lambda w: self.reader.position(w[0], offset=w[1].offset, shape=w[1].shape))
            with self.reader.kept_open():
                for name, piece in self.wanted:
                    at = self.number[name]
                    self.sums[at] = fingerprint.add(self.sums[at], self._fill(name, piece))
        except CheckpointError as error:
            self.error = self.error or str(error)

    def finish(self, *, ignored: tuple[str, ...] = ()) -> None:
        """Fill what is wanted and compare with the manifest over all ranks. Collective. Raises CheckpointError on every rank.

        ignored: begins of names that nobody need have asked for.
        """
        folder = self.reader.folder
        if self.error is None:
            self._fill_all()
        _agree(self.error)
        values = fingerprint.to_tensor(self.sums).to(self.device)
        elements = torch.tensor(self.elements, dtype=torch.int64, device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
            dist.all_reduce(elements)
        found, elements_of = fingerprint.from_tensor(values.cpu()), elements.tolist()
        wrong = [
            name
            for name, sums, count in zip(self.names, found, elements_of, strict=True)
            if count and not self._is_whole(name, sums, elements=count)
        ]
        if wrong:
            raise CheckpointError(
                f"{folder} is damaged: what was read of {len(wrong)} tensors is not what was saved (their fingerprints differ), "
                f"e.g. {', '.join(wrong[:3])}. `stratum checkpoint verify {folder}` names the files."
            )
        sick = {
            name: sums.not_finite // (count // math.prod(self.reader.manifest.tensors[name].shape))
            for name, sums, count in zip(self.names, found, elements_of, strict=True)
            if sums.not_finite
        }
        if sick:
            raise CheckpointError(
                f"{folder} cannot be continued from: {describe_not_finite(sick)}. It is what was saved; an older version wrote "
                f"it without looking."
            )
        asked = {name for name, count in zip(self.names, elements_of, strict=True) if count}
        unasked = {
            name
            for name in self.names
            if name not in asked
            and not name.startswith((RANDOM, MASTER, *ignored))
            and MASTER + name.removeprefix(MODEL) not in asked
        }
        missing = {name for names in _everywhere(sorted(self.missing)) for name in names}
        for names, problem in ((missing, "lacks"), (unasked, "holds, and this model lacks,")):
            if weights := sorted(name.removeprefix(MODEL) for name in names if not _is_precision_state(name)):
                raise CheckpointError(
                    f"{folder} {OTHER_MODEL}: it {problem} {len(weights)} weights, e.g. {', '.join(weights[:3])}."
                )
        if missing | unasked:
            log.warning(
                "%s was written by another precision backend: scales and amax histories start anew, so the first steps will "
                "not repeat those of the run that wrote it.",
                folder,
            )

    def _is_whole(self, name: str, sums: Sums, *, elements: int) -> bool:
        """Whether what all ranks read of a tensor is the tensor, once or several times."""
        record = self.reader.manifest.tensors[name]
        copies, rest = divmod(elements, math.prod(record.shape))
        expected = fingerprint.times(fingerprint.from_text(record.fingerprint), copies)
        return not rest and fingerprint.text(sums) == fingerprint.text(expected)

    def _source(self, piece: Piece) -> str | None:
        """The checkpoint's tensor for a piece. Weights and masters stand in for each other where precisions differ."""
        tensors = self.reader.manifest.tensors
        name = piece.tensor
        if name.startswith(MODEL) and piece.data.dtype == torch.float32:
            master = MASTER + name.removeprefix(MODEL)
            if master in tensors:
                return master
        if name in tensors:
            return name
        if name.startswith(MASTER) and MODEL + name.removeprefix(MASTER) in tensors:
            return MODEL + name.removeprefix(MASTER)
        return None

    def _fill(self, name: str, piece: Piece) -> Sums:
        """Read one piece. -> the fingerprint of what arrived, in the checkpoint's own format."""
        record = self.reader.manifest.tensors[name]
        target = piece.data.view(piece.shape)
        same = DTYPE_NAMES[piece.data.dtype] == record.dtype
        if same:
            self.reader.read(name, offset=piece.offset, into=target)
            return piece.sums()
        raw = self.reader.empty(name, piece.shape)
        self.reader.read(name, offset=piece.offset, into=raw)
        target.copy_(raw)
        return fingerprint.of_box(raw, whole=piece.whole, offset=piece.offset, shape=piece.shape)


def _open(folder: Path) -> tuple[Reader | None, str | None]:
    try:
        return Reader(folder), None
    except CheckpointError as error:
        return None, str(error)


def _error_in(act: Callable[[], None]) -> str | None:
    try:
        act()
    except CheckpointError as error:
        return str(error)
    return None


def _agree(error: str | None) -> None:
    """Raise on every rank if any has an error. Collective over the world."""
    errors = [each for each in _everywhere(error) if each is not None]
    if errors:
        raise CheckpointError(error or f"on another rank: {errors[0]}")


def _everywhere(value: Any) -> list[Any]:
    """Every rank's value. Collective over the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _hand_over(locals_: dict[str, Local]) -> None:
    """Give weights kept in FP8 what was read into their decoded copies. Not run: needs a GPU."""
    for local in locals_.values():
        if local.source is not local.data:
            local.source.copy_(local.data)


def _manifest_of(state: RunState, *, updates: int | None = None) -> Manifest:
    """A manifest without tensors, files and digest."""
    known = {entry.name: getattr(state, entry.name) for entry in fields(RunState)}
    return Manifest(**known, versions=_versions(), updates=updates)


def _layout(mesh: Mesh) -> dict[str, int]:
    return {key: value for key, value in asdict(mesh.layout).items() if isinstance(value, int)}


def _updates(engine: Engine) -> int:
    """Adam's step count: one for all groups."""
    counts = {int(group["step"]) for group in engine.optimizer.param_groups if group["params"]}
    assert len(counts) <= 1, f"parameter groups count their updates differently: {counts}"
    return counts.pop() if counts else 0


def _is_precision_state(name: str) -> bool:
    """Whether a tensor is a precision backend's own state."""
    return ".low_precision_" in name
