"""Saves a built model and its optimizer as tensors of a checkpoint, and loads them at any layout, with verification.

    step_00000100/
        manifest.json            step, position, layout, recipe, lineage, and each tensor's shape and fingerprint
        index.json               which box of which tensor is in which file
        rank_00000.safetensors   written by rank 0: its weights and its share of the optimizer state

Tensors have whole-model names and are read box by box, so any layout can read any checkpoint. After loading, the live
tensors of all ranks are fingerprinted and compared with the manifest, so that training continues from what was saved.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.schema.errors import CheckpointError, NumericsError
from train.checkpoint import fingerprint, publishing
from train.checkpoint.files import Piece, Reader, scan
from train.checkpoint.fingerprint import Sums
from train.checkpoint.manifest import DTYPE_NAMES, MASTER, MODEL, Manifest, RunState, describe_not_finite
from train.checkpoint.pieces import (
    LocalTensor,
    OptimizerPart,
    copied_pieces,
    local_tensors_of,
    optimizer_parts,
    optimizer_pieces,
    owned_pieces,
    part_pieces,
    resident_pieces,
    weight_pieces,
)
from train.checkpoint.random_state import RANDOM, random_pieces, restore_random_state, set_random_states
from train.checkpoint.saving import Snapshot
from train.checkpoint.stream_state import STREAM, stream_pieces
from train.engine import Engine
from train.parallel.mesh import Mesh

log = logging.getLogger(__name__)


OTHER_MODEL = "is of another model"
"""In the message of every such error: `CheckpointFolder.resume` then stops instead of trying an older checkpoint."""


def snapshot_of(engine: Engine, state: RunState, stream: Mapping[str, torch.Tensor] | None = None) -> Snapshot:
    """What this rank saves of a training run: weights, buffers, masters, moments, random state. Collective, because scales are
    gathered (`engine.precision.gather_state`).

    state: its layout is set here, and its tokens if the caller has not counted them. stream: state of the stream
    (`stream_state`), the same on every rank.
    """
    engine.precision.gather_state()
    manifest = _manifest_at(engine, state)
    local_tensors, parts = _local_state(engine)
    pieces = [*owned_pieces(local_tensors, parts), *random_pieces(engine.mesh)]
    pieces += stream_pieces(stream or {}, rank=engine.mesh.rank)
    return Snapshot(manifest, pieces, parts, copied_pieces(parts))


def state_at_boundary(
    engine: Engine, state: RunState, stream: Mapping[str, torch.Tensor]
) -> tuple[Manifest, list[Piece]]:
    """The manifest, and the small pieces of this rank's state that the next forward pass changes: random state, stream.

    Collective, and state and stream, as in `snapshot_of`."""
    engine.precision.gather_state()
    return _manifest_at(engine, state), [*random_pieces(engine.mesh), *stream_pieces(stream, rank=0)]


def state_until_update(engine: Engine) -> list[Piece]:
    """The rest of what this rank needs to continue at the same layout (`fill_resident`): what the next update changes. Not
    collective; may be called in another thread."""
    return resident_pieces(*_local_state(engine))


def _manifest_at(engine: Engine, state: RunState) -> Manifest:
    """The manifest of the engine's state, without tensors."""
    tokens = state.tokens or state.position * engine.row_tokens
    state = replace(state, layout=layout_of(engine.mesh), tokens=tokens)
    return _manifest_of(state, updates=_updates(engine))


def read_training(folder: Path, engine: Engine) -> Manifest:
    """Fill this rank's weights, optimizer state and random state from a checkpoint of any layout, and verify them.

    Collective over the world. Raises CheckpointError on every rank for another model, damage, or content that is not what was
    saved. The engine is then partly filled: load another checkpoint or do not use it.
    """
    reader, error = _open(folder)
    _raise_if_any(error)
    assert reader is not None
    local_tensors, parts = _local_state(engine)
    has_optimizer = reader.manifest.updates is not None
    loading = _Loading(reader, engine.mesh.device)
    loading.request(weight_pieces(local_tensors))
    if has_optimizer:
        loading.request(optimizer_pieces(parts))
    loading.finish(ignored=() if has_optimizer else ("optimizer.",))
    _copy_back_to_fp8(local_tensors)
    for group in engine.optimizer.param_groups:
        group["step"] = reader.manifest.updates or 0
    if not has_optimizer:
        # Masters were made from the initial weights; moments may be left from a checkpoint that failed to load.
        engine.optimizer.reload_model_params()
        for part in parts:
            for values in part.moments.values():
                values.zero_()
    _raise_if_any(_error_in(lambda: restore_random_state(reader, engine.mesh)))
    engine.precision.apply_state()
    return reader.manifest


def fill_resident(
    engine: Engine, manifest: Manifest, stored: Mapping[str, tuple[torch.Tensor, Sums]], *, place: str
) -> str | None:
    """Fill this rank from a copy of `state_at_boundary` and `state_until_update`, and verify it. -> why it cannot be used, if so.

    Collective over the world: if any rank returns a reason, no rank may train on, because the engine is partly filled. stored:
    values and fingerprint by label. place: where they come from, for the reason.
    """
    local_tensors, parts = _local_state(engine)
    random = {piece.label: piece for piece in random_pieces(engine.mesh)}
    error = None
    for piece in [*resident_pieces(local_tensors, parts), *random.values()]:
        values, sums = stored.get(piece.label, (None, None))
        if values is None or (values.dtype, values.numel()) != (piece.data.dtype, piece.data.numel()):
            error = f"{place} {OTHER_MODEL}: {piece.label} {'is missing' if values is None else 'has another format'}."
            break
        piece.data.copy_(values.view_as(piece.data))
        if piece.sums() != sums:
            error = f"{place} is damaged: {piece.label} is not what was copied (its fingerprint differs)."
            break
    _copy_back_to_fp8(local_tensors)
    for chunk in engine.chunks:
        chunk.start_param_sync(force_sync=True)  # ranges of weights that other data-parallel ranks have filled
    if not _weights_are_as_filled(engine):
        error = error or f"{place}: the weights gathered from the other ranks are not what these have filled."
    for group in engine.optimizer.param_groups:
        group["step"] = manifest.updates or 0
    engine.precision.apply_state()
    if error is None:
        states = {label.split("[")[0].split(".", 2)[2]: piece.data for label, piece in random.items()}
        error = _error_in(lambda: set_random_states(states, engine.mesh, place=place))
    return error


def _weights_are_as_filled(engine: Engine) -> bool:
    """Whether this rank's trained weights are the ranges that the ranks with the same weights have, put together. Collective over
    the data-parallel (and context) ranks, and for experts over the ranks with the same experts."""
    local_tensors, parts = _local_state(engine)
    of_experts = {
        f"{index}/{name}"
        for index, chunk in enumerate(engine.chunks)
        for name, parameter in chunk.module.named_parameters()
        if not getattr(parameter, "allreduce", True)  # Megatron's mark of an expert's parameter
    }
    trained = {name: local for name, local in local_tensors.items() if local.is_trained}
    groups = engine.mesh.groups
    return all(
        [
            _ranges_are_whole(
                {name: local for name, local in trained.items() if (name in of_experts) == is_expert},
                parts,
                group=groups.expt_dp if is_expert else groups.dp_cp,
                device=engine.mesh.device,
            )
            for is_expert in (False, True)
        ]
    )


def _ranges_are_whole(
    weights: Mapping[str, LocalTensor], parts: Sequence[OptimizerPart], *, group: Any, device: torch.device
) -> bool:
    """`_weights_are_as_filled` for the weights of one group. Collective over it."""
    if not weights or group.size() == 1:
        return True  # this rank's ranges are the whole weights
    number = {id(local): at for at, local in enumerate(weights.values())}
    ranges = [fingerprint.ZERO] * len(weights)
    for part in parts:
        if (at := number.get(id(part.local))) is not None:
            ranges[at] = fingerprint.add(ranges[at], _sums_of_all(part_pieces(part)["weight"]))
    together = fingerprint.to_tensor(ranges).to(device)
    dist.all_reduce(together, group=group)
    whole = [_sums_of_all(weight_pieces({name: local})) for name, local in weights.items()]
    return fingerprint.from_tensor(together.cpu()) == whole


def _sums_of_all(pieces: Sequence[Piece]) -> Sums:
    return functools.reduce(fingerprint.add, (piece.sums() for piece in pieces), fingerprint.ZERO)


def _local_state(engine: Engine) -> tuple[dict[str, LocalTensor], list[OptimizerPart]]:
    """What this rank has of the model and of the optimizer's state."""
    modules = [chunk.module for chunk in engine.chunks]
    local_tensors = local_tensors_of(modules, engine.mesh.groups.dp_cp)
    return local_tensors, optimizer_parts(engine.optimizer, modules, local_tensors)


def read_weights(
    folder: Path, chunks: list[Any], *, groups: Any, masters: bool = True, without: tuple[str, ...] = ()
) -> None:
    """Fill only the weights of unwrapped model chunks (evaluation, generation, teachers), at any layout. Collective.

    groups: Megatron's process groups of the chunks' layout. masters: fp32 weights are filled from masters, if the checkpoint has
    them. without: name prefixes of weights that stay as they are, whatever the checkpoint has under them. Raises CheckpointError
    on every rank, with the names, if model and checkpoint do not have the same weights. State of a precision backend may be
    missing.
    """
    reader, error = _open(folder)
    _raise_if_any(error)
    assert reader is not None
    local_tensors = local_tensors_of(chunks, groups.dp_cp)
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    loading = _Loading(reader, device, masters=masters)
    left = tuple(MODEL + name for name in without)
    loading.request([piece for piece in weight_pieces(local_tensors) if not piece.tensor.startswith(left)])
    loading.finish(ignored=("optimizer.", *left))
    _copy_back_to_fp8(local_tensors)


def publish(unfinished: Path, final: Path, state: RunState) -> None:
    """Complete a checkpoint that `train.checkpoint.tensors.write_weights` wrote to a temporary folder, and publish it.

    Shapes and fingerprints are computed from the files. state: may be the manifest of another checkpoint. Called by one
    process. Raises NumericsError if the files contain NaN or infinity.
    """
    index, records = scan(unfinished)
    if bad := {name: record.not_finite for name, record in records.items() if record.not_finite}:
        raise NumericsError(f"{final} is not written: {describe_not_finite(bad)}.")
    files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
    publishing.seal(unfinished, replace(_manifest_of(state), tensors=records, files=files), index)
    publishing.publish(unfinished, final)


def _versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint's content depends on."""
    # Not megatron.core.__version__, which ends in the commit of the repository that the process was started in.
    return {"torch": torch.__version__, "megatron-core": version("megatron-core")}


class _Loading:
    """Reads pieces of one checkpoint and adds up their fingerprints, which all ranks compare at the end.

    Every piece counts, including copies (data-parallel copies, norms, tied embeddings). If all ranks together read n times
    the elements of a tensor, their fingerprints must add up to n times the saved one.
    """

    def __init__(self, reader: Reader, device: torch.device, *, masters: bool = True) -> None:
        self.reader = reader
        self.masters = masters
        self.device = device
        self.names = sorted(reader.manifest.tensors)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.sums: list[Sums] = [fingerprint.ZERO] * len(self.names)
        self.elements = [0] * len(self.names)
        """Number of elements of each tensor that this rank reads."""
        self.missing: set[str] = set()
        self.requests: list[tuple[str, Piece]] = []
        """(tensor of the checkpoint, piece to fill)."""
        self.error: str | None = None
        """Why this rank cannot load: another model, or a file that cannot be read."""

    def request(self, pieces: Sequence[Piece]) -> None:
        """Add pieces to fill. Never raises."""
        for piece in pieces:
            name = self._source(piece)
            if name is None:
                self.missing.add(piece.tensor)
                continue
            record = self.reader.manifest.tensors[name]
            if record.shape != piece.whole:
                shapes = f"{name} has shape {record.shape} in the checkpoint and {piece.whole} in this model"
                self.error = self.error or f"{self.reader.folder} {OTHER_MODEL}: {shapes}."
                continue
            self.elements[self.number[name]] += piece.data.numel()
            self.requests.append((name, piece))

    def _fill_all(self) -> None:
        """Read all requested pieces in file order, so that the kernel can read ahead. Raises no CheckpointError: see `error`."""
        try:
            self.requests.sort(key=lambda w: self.reader.position(w[0], offset=w[1].offset, shape=w[1].shape))
            with self.reader.files_kept_open():
                for name, piece in self.requests:
                    at = self.number[name]
                    self.sums[at] = fingerprint.add(self.sums[at], self._fill(name, piece))
        except CheckpointError as error:
            self.error = self.error or str(error)

    def finish(self, *, ignored: tuple[str, ...] = ()) -> None:
        """Fill all requested pieces and compare with the manifest over all ranks. Collective. CheckpointError on every rank.

        ignored: name prefixes that may stay unread.
        """
        folder = self.reader.folder
        if self.error is None:
            self._fill_all()
        _raise_if_any(self.error)
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
                f"{folder} is damaged: {len(wrong)} tensors are not what was saved (their fingerprints differ), e.g. "
                f"{', '.join(wrong[:3])}. `stratum checkpoint verify {folder}` names the files."
            )
        bad = {
            name: sums.not_finite // (count // math.prod(self.reader.manifest.tensors[name].shape))
            for name, sums, count in zip(self.names, found, elements_of, strict=True)
            if sums.not_finite
        }
        if bad:
            raise CheckpointError(
                f"{folder} cannot be resumed: {describe_not_finite(bad)}. The files are intact: an older version, which did not "
                f"check for this, saved them so."
            )
        read = {name for name, count in zip(self.names, elements_of, strict=True) if count}
        unread = {
            name
            for name in self.names
            if name not in read
            and not name.startswith((RANDOM, STREAM, MASTER, *ignored))
            and MASTER + name.removeprefix(MODEL) not in read
        }
        missing = {name for names in _all_gather(sorted(self.missing)) for name in names}
        for names, problem in (
            (missing, "this model has {} weights that it does not contain"),
            (unread, "it contains {} weights that this model does not have"),
        ):
            if weights := sorted(name.removeprefix(MODEL) for name in names if not _is_precision_state(name)):
                raise CheckpointError(
                    f"{folder} {OTHER_MODEL}: {problem.format(len(weights))}, e.g. {', '.join(weights[:3])}."
                )
        if (
            missing | unread
        ) and not ignored:  # weights alone, for inference or a new run, have no first steps to differ
            log.warning(
                "%s was written by another precision backend: scales and amax histories start fresh, so the first steps will "
                "differ from those of the run that wrote it.",
                folder,
            )

    def _is_whole(self, name: str, sums: Sums, *, elements: int) -> bool:
        """Whether all ranks together read the tensor exactly, once or several times."""
        record = self.reader.manifest.tensors[name]
        copies, rest = divmod(elements, math.prod(record.shape))
        expected = fingerprint.times(fingerprint.from_text(record.fingerprint), copies)
        return not rest and fingerprint.text(sums) == fingerprint.text(expected)

    def _source(self, piece: Piece) -> str | None:
        """The checkpoint's tensor for a piece. If precisions differ, a master is read for a weight or the reverse."""
        tensors = self.reader.manifest.tensors
        name = piece.tensor
        if self.masters and name.startswith(MODEL) and piece.data.dtype == torch.float32:
            master = MASTER + name.removeprefix(MODEL)
            if master in tensors:
                return master
        if name in tensors:
            return name
        if name.startswith(MASTER) and MODEL + name.removeprefix(MASTER) in tensors:
            return MODEL + name.removeprefix(MASTER)
        return None

    def _fill(self, name: str, piece: Piece) -> Sums:
        """Read one piece. -> the fingerprint of what was read, in the checkpoint's dtype."""
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


def _raise_if_any(error: str | None) -> None:
    """Raise on every rank if any has an error. Collective over the world."""
    errors = [each for each in _all_gather(error) if each is not None]
    if errors:
        raise CheckpointError(error or f"on another rank: {errors[0]}")


def _all_gather(value: Any) -> list[Any]:
    """Every rank's value. Collective over the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _copy_back_to_fp8(local_tensors: dict[str, LocalTensor]) -> None:
    """Copy the decoded weights that were filled back into FP8 weights. Not tested: needs a GPU."""
    for local in local_tensors.values():
        if local.source is not local.data:
            local.source.copy_(local.data)


def _manifest_of(state: RunState, *, updates: int | None = None) -> Manifest:
    """A manifest without tensors, files and digest."""
    known = {entry.name: getattr(state, entry.name) for entry in fields(RunState)}
    return Manifest(**known, versions=_versions(), updates=updates)


def layout_of(mesh: Mesh) -> dict[str, int]:
    """The mesh's degrees of parallelism as a manifest has them."""
    return {key: value for key, value in asdict(mesh.layout).items() if isinstance(value, int)}


def _updates(engine: Engine) -> int:
    """Adam's step count, which is the same for all parameter groups."""
    counts = {int(group["step"]) for group in engine.optimizer.param_groups if group["params"]}
    assert len(counts) <= 1, f"parameter groups count their updates differently: {counts}"
    return counts.pop() if counts else 0


def _is_precision_state(name: str) -> bool:
    """Whether a tensor is state of a precision backend."""
    return ".low_precision_" in name
