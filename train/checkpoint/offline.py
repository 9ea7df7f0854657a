"""Operations on checkpoints without a model or process group: verify, compare, reshard, consolidate into one file.

Memory use is about one tensor. Everything is read through manifest and index, so nothing in a checkpoint is executed.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.system import disk
from recipes.schema import checkpoint_steps as steps
from recipes.schema.errors import CheckpointError
from recipes.schema.read import recipe_yaml
from train.checkpoint import fingerprint, publishing
from train.checkpoint.files import (
    Reader,
    boxes_of_range,
    bytes_of,
    header_of,
    label_of,
    opened,
    read_header,
    whole_tensor,
)
from train.checkpoint.manifest import DTYPES, Index, Manifest, StoredBox

log = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Progress callback: called with the bytes of each finished tensor."""


def verify(folder: Path, advance: Advance) -> list[str]:
    """Compare every byte of a checkpoint with its manifest. -> one line for each problem, NaN and infinity included.

    Cached pages are dropped first, so that the data come from the disk. Raises CheckpointError if the manifest or index
    cannot be read.
    """
    reader = Reader(folder)
    problems = []
    listed = set(reader.manifest.files)
    for name in sorted(listed):
        _forget_cached(folder / name)
    for name in sorted(listed):
        if name.endswith(".safetensors"):
            problems += _header_problems(folder / name, reader)
    for tensor, record in reader.manifest.tensors.items():
        try:
            sums = reader.sums(tensor)
        except CheckpointError as error:
            problems.append(f"{tensor}: {error}")
        else:
            if sums.not_finite:
                problems.append(
                    f"{tensor}: {sums.not_finite:,} of {math.prod(record.shape):,} elements are NaN or infinite"
                )
            if (found := fingerprint.text(sums)) != record.fingerprint:
                files = sorted({stored.file for stored in reader.index[tensor]})
                problems.append(
                    f"{tensor}: its fingerprint is {found}, the manifest says {record.fingerprint}; it is stored in "
                    f"{', '.join(files[:4])}{' ...' * (len(files) > 4)}"
                )
        advance(record.bytes)
    unexpected = sorted({p.name for p in folder.iterdir()} - listed - {"manifest.json"})
    problems += [f"{folder / name} is not part of the checkpoint" for name in unexpected]
    return problems


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two checkpoints."""

    name: str
    note: str
    """`only in A`, `only in B`, `shape ... / ...`, or empty."""
    differing: int = 0
    """Elements that differ."""
    elements: int = 0
    largest: float = 0.0
    """Largest absolute difference; NaN if only one side is NaN."""
    relative: float = 0.0
    """Norm of the difference over the norm of A."""


def compare(a: Reader, b: Reader, *, values: bool, advance: Advance) -> Iterator[TensorDifference]:
    """Tensors that differ, except random state. values: also read them and measure the differences."""
    ours, theirs = a.manifest.tensors, b.manifest.tensors
    for name in sorted({*ours, *theirs}):
        if name.startswith("random."):
            continue
        if name not in theirs or name not in ours:
            yield TensorDifference(name, "only in A" if name in ours else "only in B")
            continue
        one, other = ours[name], theirs[name]
        if one.shape != other.shape:
            yield TensorDifference(name, f"shape {list(one.shape)} / {list(other.shape)}")
        elif (one.dtype, one.fingerprint) != (other.dtype, other.fingerprint):
            note = f"format {one.dtype} / {other.dtype}" if one.dtype != other.dtype else ""
            if not values:
                yield TensorDifference(name, note, elements=math.prod(one.shape))
                continue
            x, y = whole_tensor(a, name).double(), whole_tensor(b, name).double()
            apart = (x != y) & ~(x.isnan() & y.isnan())
            gap = (x - y)[apart]
            yield TensorDifference(
                name,
                note,
                differing=len(gap),
                elements=x.numel(),
                largest=float(gap.abs().max()) if len(gap) else 0.0,
                relative=float(gap.norm() / x.nan_to_num(nan=0.0).norm().clamp(min=1e-300)) if len(gap) else 0.0,
            )
        advance(one.bytes)


def reshard(folder: Path, out: Path, *, files: int, with_optimizer: bool, advance: Advance) -> Manifest:
    """Rewrite a checkpoint as `files` files of about equal size, verify it against the old fingerprints, publish it at `out`.

    out: a checkpoint's folder (step_...), or a run folder from which training can resume (checkpoint, pointer, recipe). It
    appears complete or not at all. Output left by a killed run of this command is removed, with a warning. with_optimizer: false
    writes only weights. Raises CheckpointError and then leaves no output.
    """
    reader = Reader(folder)
    tensors = {
        name: record for name, record in reader.manifest.tensors.items() if with_optimizer or name.startswith("model.")
    }
    with _new_output(out) as unfinished:
        disk.make_folder(unfinished)
        new = unfinished
        if is_run(out):
            new = unfinished / "checkpoints" / steps.name_of(reader.manifest.step)
            disk.make_folder(new.parent)
            disk.make_folder(new)
        index: Index = {}
        for number in range(files):
            _write_share(reader, new / f"rank_{number:05d}.safetensors", list(tensors), number, files, index, advance)
        manifest = replace(
            reader.manifest,
            tensors=tensors,
            updates=reader.manifest.updates if with_optimizer else None,
            lineage=reader.manifest.lineage | {"resharded_from": str(folder)},
            files={path.name: path.stat().st_size for path in sorted(new.iterdir())},
        )
        manifest = publishing.seal(new, manifest, index)
        problems = verify(new, lambda _: None)
        if problems:
            raise CheckpointError(f"{out} was not written: the copy does not verify: {problems[0]}")
        if is_run(out):
            publishing.point_at(new.parent, new.name)
            disk.write_text(unfinished / "recipe.yaml", recipe_yaml(manifest.recipe))
    return manifest


def is_run(out: Path) -> bool:
    """Whether a folder name is a run's, not a checkpoint's."""
    return not out.name.startswith("step_")


@contextmanager
def _new_output(out: Path) -> Iterator[Path]:
    """Yields the path to write to; a file or folder there becomes `out` when the context ends. Raises CheckpointError and then
    leaves no output."""
    if out.exists():
        raise CheckpointError(f"{out} already exists. Choose another name, or move it away.")
    unfinished = disk.aside_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftover(unfinished)
        yield unfinished
        disk.put_in_place(unfinished, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        _remove_unfinished(unfinished)


def _remove_leftover(unfinished: Path) -> None:
    """Remove unfinished output that a killed run of this command left."""
    if unfinished.exists() or unfinished.is_symlink():
        log.warning("removing %s, left by an interrupted run of this command", unfinished)
        disk.remove_tree(unfinished) if unfinished.is_dir() else disk.remove(unfinished)


def _remove_unfinished(unfinished: Path) -> None:
    """Remove unfinished output. Its own errors are ignored, because the error that caused it is the one to report."""
    with suppress(OSError):
        if unfinished.is_dir():
            disk.remove_tree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)


def consolidate(folder: Path, out: Path, *, with_optimizer: bool, dtype: torch.dtype | None, advance: Advance) -> int:
    """Write all weights into one safetensors file, under their names without the `model.` prefix. -> bytes written.

    with_optimizer: every tensor, under its full name. dtype: convert floating-point weights to it.
    """
    reader = Reader(folder)
    names = [n for n in reader.manifest.tensors if with_optimizer or n.startswith("model.")]
    formats = {name: _format(DTYPES[reader.manifest.tensors[name].dtype], dtype) for name in names}
    names.sort(key=lambda name: -formats[name].itemsize)
    labels = {name: name if with_optimizer else name.removeprefix("model.") for name in names}
    metadata = {
        "format": "pt",
        "step": str(reader.manifest.step),
        "tokens": str(reader.manifest.tokens),
        "fingerprint": reader.manifest.fingerprint,
    }
    header, _ = header_of([(labels[n], formats[n], reader.manifest.tensors[n].shape) for n in names], metadata)
    with _new_output(out) as unfinished:
        disk.write_new(unfinished, [header])
        for name in names:
            disk.append(unfinished, [bytes_of(_verified_tensor(reader, name).to(formats[name]))])
            advance(reader.manifest.tensors[name].bytes)
    return out.stat().st_size


def _verified_tensor(reader: Reader, name: str) -> torch.Tensor:
    """A whole tensor, after its fingerprint was compared with the manifest. CheckpointError if it differs."""
    tensor = whole_tensor(reader, name)
    sums = fingerprint.of_box(tensor, whole=tensor.shape, offset=[0] * tensor.dim(), shape=tensor.shape)
    if fingerprint.text(sums) != reader.manifest.tensors[name].fingerprint:
        raise CheckpointError(f"{reader.folder}: {name} is damaged; nothing was written.")
    return tensor


def _format(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _write_share(
    reader: Reader, path: Path, tensors: list[str], number: int, files: int, index: Index, advance: Advance
) -> None:
    """Write file `number` of `files`: the same share of every tensor, split into boxes."""
    parts = []
    for name in sorted(tensors, key=lambda n: -DTYPES[reader.manifest.tensors[n].dtype].itemsize):
        record = reader.manifest.tensors[name]
        elements = math.prod(record.shape)
        share = boxes_of_range(record.shape, elements * number // files, elements * (number + 1) // files)
        parts += [(name, DTYPES[record.dtype], offset, shape) for offset, shape, _ in share]
    header, starts = header_of([(label_of(name, o, s), dtype, s) for name, dtype, o, s in parts])
    disk.write_new(path, [header])
    for (name, dtype, offset, shape), start in zip(parts, starts, strict=True):
        box = torch.empty(shape, dtype=dtype)
        reader.read(name, offset=offset, into=box)
        disk.append(path, [bytes_of(box)])
        index.setdefault(name, []).append(StoredBox(path.name, start, offset, shape))
        advance(box.numel() * box.element_size())
    disk.sync(path)


def _header_problems(path: Path, reader: Reader) -> list[str]:
    """Differences between a file's own header and the index."""
    try:
        entries, begin = read_header(path)
        recorded = {
            label: (entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
            for label, entry in entries.items()
        }
    except (CheckpointError, KeyError, TypeError) as error:
        return [f"{path}: its header cannot be read: {error}"]
    expected = {
        label_of(tensor, stored.offset, stored.shape): (
            reader.manifest.tensors[tensor].dtype,
            stored.shape,
            stored.start,
        )
        for tensor, boxes in reader.index.items()
        for stored in boxes
        if stored.file == path.name
    }
    if recorded == expected:
        return []
    return [
        f"{path}: its header and index.json disagree about {len(recorded.items() ^ expected.items()) // 2 or 1} parts"
    ]


def _forget_cached(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    with opened(path) as handle:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
