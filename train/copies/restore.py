"""Where a run with copies in memory starts: from the newest step of which every rank has a copy on any node.

records on every node --> newest step with a copy of every rank --> each copy to its rank's node --> fill, compare fingerprints
          ^                                                                                     |
          +---- without those that are damaged, with a note <--------------------------------+

If a checkpoint is newer, or no copy can be used, the run continues from the checkpoint. Copies of another run, of two starts of
the run, or at another layout are never used.
"""

import logging
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data.system.node import node_name
from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import describe_layout
from recipes.schema.memory_copies import MemoryCopiesConfig
from recipes.schema.recipe import Recipe
from train.checkpoint import storage
from train.checkpoint.manager import CheckpointFolder, LoadedCheckpoint
from train.checkpoint.manifest import Manifest, RunState
from train.checkpoint.resume import Start, continue_from, resume
from train.checkpoint.saving import Peers
from train.checkpoint.stream_state import STREAM
from train.copies.memory_copies import MemoryCopies, transfer
from train.copies.place import forget_token, open_place, remove_orphans, token_of
from train.copies.slot import Slot, slots_in
from train.engine import Engine
from train.parallel.mesh import Mesh

log = logging.getLogger(__name__)

Key = tuple[int, str]
"""Step and attempt: what the copies of all ranks must have in common."""


@dataclass(frozen=True)
class Found:
    """A complete copy on some node."""

    rank: int
    """The rank whose state it is."""
    key: Key
    generation: int
    size: int
    record_size: int
    node: str


@dataclass(frozen=True)
class Inventory:
    """The copies that a rank sees on its node."""

    found: list[Found] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Copies that cannot be used, and why."""
    other_layouts: list[str] = field(default_factory=list)
    """Those of them that could be used at another layout."""


def open_copies(config: MemoryCopiesConfig, mesh: Mesh, run: Path) -> MemoryCopies | None:
    """The run's copies; None without them, also if a node's folder cannot be made, with a warning. Collective over the world."""
    if config.every_steps == 0:
        if mesh.rank == 0:
            forget_token(run)
        return None
    peers, shared, place, error = Peers(mesh.saving), None, None, None
    try:
        shared = (token_of(run), secrets.token_hex(8)) if mesh.rank == 0 else None
    except OSError as caught:
        error = f"{caught.filename or run}: {caught.strerror or caught}"
    shared = peers.broadcast(shared)
    try:
        if shared is not None:
            place = open_place(Path(config.folder), token=shared[0], run=run)
    except OSError as caught:
        error = f"{caught.filename or config.folder}: {caught.strerror or caught}"
    errors = [f"rank {rank}: {text}" for rank, text in enumerate(mesh.gather_objects(error)) if text is not None]
    nodes = mesh.gather_objects(node_name())
    if errors or place is None or shared is None:
        if mesh.rank == 0:
            log.warning("no copies in memory (run.memory_copies): %s. Training continues without them.", errors[0])
        return None
    if nodes.index(nodes[mesh.rank]) == mesh.rank:
        remove_orphans(Path(config.folder), but=place)
    return MemoryCopies(config, mesh, place, nodes=nodes, attempt=shared[1])


@dataclass(frozen=True)
class Return:
    """Whether a run continues from copies in memory."""

    start: Start | None = None
    """None: it does not."""
    used: Key | None = None
    notes: tuple[str, ...] = ()
    """Why copies were not used."""


def resume_from_either(
    copies: MemoryCopies | None, checkpoints: CheckpointFolder, engine: Engine, *, recipe: Recipe, new: RunState
) -> tuple[Start, Key | None]:
    """`resume_from_memory`, otherwise `train.checkpoint.resume.resume`. -> the start, and the copies that it uses. Collective."""
    back = Return() if copies is None else resume_from_memory(copies, checkpoints, engine, recipe=recipe, new=new)
    if back.start is not None:
        return back.start, back.used
    start = resume(checkpoints, engine, recipe=recipe, new=new)
    text = "\n".join([*([start.text] if start.text else []), *(f"  note: {note}" for note in back.notes)])
    return replace(start, text=text or None), None


def resume_from_memory(
    copies: MemoryCopies, checkpoints: CheckpointFolder, engine: Engine, *, recipe: Recipe, new: RunState
) -> Return:
    """Fill the engine from the newest complete copies that verify, unless a checkpoint is newer. Collective.

    new: as for `train.checkpoint.resume.resume`, which follows if this does not give a start. Raises as it does.
    """
    mesh = engine.mesh
    good, _ = checkpoints.survey(mesh)
    saved = good[0][1].step if good else 0
    seen = mesh.gather_objects(_inventory(copies))
    notes = list(dict.fromkeys(note for one in seen for note in one.refused))
    known = dict.fromkeys(found for one in seen for found in one.found)  # ordered, without what two ranks of a node saw
    while (key := _newest_complete(known, mesh.layout.world)) is not None and key[0] >= saved:
        sources = _sources(known, key, copies.nodes)
        manifest, stream, error = _fill(copies, engine, sources)
        errors = mesh.gather_objects(error)
        if not any(errors):
            assert manifest is not None, "without an error there is a manifest"
            others = sum(one.node != copies.nodes[rank] for rank, one in sources.items())
            notes += _incomplete(known, mesh.layout.world, newer_than=key)
            notes.append(
                f"from copies in memory: {len(sources) - others} ranks from their own node, {others} from another. Newest "
                f"checkpoint: {f'step {saved:,}, not read' if saved else 'none'}."
            )
            found = LoadedCheckpoint(copies.place.folder, manifest, notes)
            start = continue_from(found, engine, recipe=recipe, new=new, stream=stream)
            return Return(start, key)
        for rank, text in enumerate(errors):
            if text is not None:
                notes.append(text)
                known.pop(sources[rank], None)
    layouts = sorted({layout for one in seen for layout in one.other_layouts})
    if layouts and not good:
        raise CheckpointError(
            f"{copies.place.root} has copies of this run at another layout ({', '.join(layouts)}), and the run has no "
            f"checkpoint, which any layout could read. Continue at that layout, or remove the folder to start at step 0."
        )
    return Return(notes=(*notes, *_incomplete(known, mesh.layout.world, newer_than=(saved, ""))))


def _inventory(copies: MemoryCopies) -> Inventory:
    inventory = Inventory()
    layout = storage.layout_of(copies.mesh)
    for slot in slots_in(copies.place.folder):
        try:
            record = slot.read()
            if record is None:
                continue
            if (record.token, record.rank) != (copies.place.token, slot.rank):
                raise CheckpointError(f"{slot.path} is a copy of another run or rank")
            if record.manifest.layout != layout:
                before, now = describe_layout(record.manifest.layout), copies.mesh.layout.describe()
                inventory.other_layouts.append(f"{before} on {record.manifest.layout.get('world')} ranks")
                raise CheckpointError(
                    f"{slot.path} is a copy at another layout ({before} on {record.manifest.layout.get('world')} ranks, now "
                    f"{now} on {copies.mesh.layout.world}). Only checkpoints are read at another layout."
                )
            key = (record.manifest.step, record.attempt)
            size = slot.record_path.stat().st_size
            inventory.found.append(Found(slot.rank, key, slot.generation, record.size, size, copies.place.node))
        except (CheckpointError, OSError) as error:
            inventory.refused.append(f"not used: {error}")
    return inventory


def _newest_complete(known: Iterable[Found], world: int) -> Key | None:
    """The newest step, of one start of the run, of which there is a copy for each rank."""
    ranks: dict[Key, set[int]] = defaultdict(set)
    for found in known:
        ranks[found.key].add(found.rank)
    return max((key for key, there in ranks.items() if len(there) == world), default=None)


def _incomplete(known: Iterable[Found], world: int, *, newer_than: Key) -> list[str]:
    """A note about the newest copies if they are newer than what the run continues from."""
    newest = max((found.key for found in known), default=newer_than)
    if newest[0] <= newer_than[0]:
        return []
    lost = sorted(set(range(world)) - {found.rank for found in known if found.key == newest})
    names = ", ".join(map(str, lost[:8])) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
    return [f"copies of step {newest[0]:,} are not complete: rank{'s' * (len(lost) > 1)} {names} lost both."]


def _sources(known: Iterable[Found], key: Key, nodes: list[str]) -> dict[int, Found]:
    """The copy that each rank continues from: that on its own node if there is one. The same on every rank."""
    sources: dict[int, Found] = {}
    for found in known:
        if found.key == key and (found.rank not in sources or found.node == nodes[found.rank]):
            sources[found.rank] = found
    return dict(sorted(sources.items()))


def _fill(
    copies: MemoryCopies, engine: Engine, sources: Mapping[int, Found]
) -> tuple[Manifest | None, dict[str, torch.Tensor], str | None]:
    """Bring each rank's copy to its node, and fill the engine from it. -> its manifest, the stream's state, and why this rank
    cannot use it, if so. Collective over the world."""
    mesh, nodes = copies.mesh, copies.nodes
    mine = sources[mesh.rank]
    moved = [(rank, found) for rank, found in sources.items() if found.node != nodes[rank]]
    slot = Slot(copies.place.folder, mesh.rank, mine.generation)
    sent: list[tuple[int, torch.Tensor]] = []
    received: list[tuple[int, torch.Tensor]] = []
    error, text = None, torch.empty(mine.record_size, dtype=torch.uint8)
    try:
        for rank, found in moved:
            there = [one for one, node in enumerate(nodes) if node == found.node]
            sender = there[rank % len(there)]
            if sender == mesh.rank:
                source = Slot(copies.place.folder, rank, found.generation)
                record = torch.frombuffer(bytearray(source.record_path.read_bytes()), dtype=torch.uint8)
                sent += [(rank, record), (rank, source.buffer(found.size))]
            if rank == mesh.rank:
                slot.invalidate()
                received = [(sender, text), (sender, slot.buffer(found.size))]
    except OSError as caught:
        error = f"{caught.filename}: {caught.strerror}"
    if any(mesh.gather_objects(error)):
        return None, {}, error
    transfer(sent, received, group=mesh.copying)
    values, manifest = {}, None
    try:
        if received:
            slot.publish(text.numpy().tobytes().decode())
        found_record = slot.read()
        if found_record is None:
            raise CheckpointError(f"{slot.record_path} is gone")
        manifest, values = found_record.manifest, slot.values(found_record)
    except (CheckpointError, OSError, ValueError) as caught:
        error = str(caught)
    if any(mesh.gather_objects(error)):
        return None, {}, error
    assert manifest is not None
    error = storage.fill_resident(engine, manifest, values, place=str(slot.path))
    stream = {
        label.split("[")[0].removeprefix(STREAM): held.clone()
        for label, (held, _) in values.items()
        if label.startswith(STREAM)
    }
    return manifest, stream, error
