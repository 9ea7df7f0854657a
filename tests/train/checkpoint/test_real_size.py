"""A checkpoint of Nano 12B at its real size, 172 GB, in sparse files: all that does not read the numbers themselves.

Names and shapes are those of the model built without memory. Each of the recipe's 736 ranks has a file with its share of weights
and optimizer state: an equal range of all elements.
"""

import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from tiny import RECIPE

from launch.compose import compose
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import parameters
from train.build import check, mesh_of
from train.checkpoint import publishing
from train.checkpoint.files import Reader, boxes_of_range, header_of, label_of, read_header
from train.checkpoint.manifest import DTYPE_NAMES, Index, Manifest, StoredBox, TensorRecord
from train.model.backend import ReferenceBackend
from train.model.build import build_model

pytestmark = pytest.mark.slow
STATES = {"model.": torch.bfloat16} | dict.fromkeys(
    ("optimizer.master.", "optimizer.exp_avg.", "optimizer.exp_avg_sq."), torch.float32
)


def shapes_of_whole_model(rank: int) -> dict[str, tuple[int, ...]]:
    recipe = compose(["-cn", "nemotron_nano_12b_v2"], program="test")
    assert not isinstance(recipe, int)
    small = replace(RECIPE, parallel=ParallelConfig())
    with (
        mesh_of(small, check(small, world=1), device=torch.device("cpu"), rank=rank) as mesh,
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta")),
    ):
        (chunk,) = build_model(
            recipe.model, parallel=small.parallel, precision=RECIPE.precision, run=RECIPE.run, row_tokens=64, mesh=mesh,
            backend=ReferenceBackend(),
        )  # fmt: skip
        assert sum(p.numel() for p in chunk.parameters()) == parameters(recipe.model).total
        return {name: tuple(p.shape) for name, p in chunk.named_parameters()}


def test_a_checkpoint_of_172_gb_is_indexed_and_opened(tmp_path: Path) -> None:
    (shapes,) = run_ranks(1, shapes_of_whole_model, timeout_s=300)
    ranks, began = 736, time.process_time()
    index: Index = {}
    sizes = {}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    for rank in range(ranks):
        low, high = elements * rank // ranks, elements * (rank + 1) // ranks
        parts, at = [], 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            inside = boxes_of_range(shape, max(0, low - at), min(size, high - at))
            for offset, box, _ in inside:
                parts += [(state + name, dtype, offset, box) for state, dtype in STATES.items()]
            at += size
        parts.sort(key=lambda part: -part[1].itemsize)
        header, starts = header_of([(label_of(name, o, s), dtype, s) for name, dtype, o, s in parts])
        path = tmp_path / f"rank_{rank:05d}.safetensors"
        path.write_bytes(header)
        sizes[path.name] = starts[-1] + torch.Size(parts[-1][3]).numel() * parts[-1][1].itemsize
        os.truncate(path, sizes[path.name])
        for (name, _, offset, box), start in zip(parts, starts, strict=True):
            index.setdefault(name, []).append(StoredBox(path.name, start, offset, box))
    manifest = Manifest(
        tensors={
            state + name: TensorRecord(DTYPE_NAMES[dtype], shape, "0" * 32)
            for name, shape in shapes.items()
            for state, dtype in STATES.items()
        },
        files=sizes,
    )
    publishing.seal(tmp_path, manifest, index)
    written = time.process_time()
    reader = Reader(tmp_path)
    opened = time.process_time()
    assert reader.index == index
    data = sum(record.bytes for record in reader.manifest.tensors.values())
    assert data == 14 * elements and 172e9 < data < 173e9
    for name in sizes:
        entries, begin = read_header(tmp_path / name)
        assert begin + max(entry["data_offsets"][1] for entry in entries.values()) == sizes[name]
    # One rank's part: rows of the embedding at each end, and its moments; zeros, because nothing is stored.
    name, shape = next((n, s) for n, s in shapes.items() if "embedding" in n)
    for state, dtype in STATES.items():
        for first in (0, shape[0] - 64):
            into = torch.ones(64, shape[1], dtype=dtype)
            reader.read(state + name, offset=(first, 0), into=into)
            assert not into.any()
    read = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    boxes = sum(map(len, index.values()))
    on_disk = sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512
    print(
        f"{data / 1e9:.1f} GB, {len(sizes)} files, {boxes:,} boxes, {on_disk / 1e6:.0f} MB on disk; processor seconds: written "
        f"{written - began:.2f}, opened {opened - written:.2f}, headers and boxes {read - opened:.2f}; peak {peak:.0f} MiB"
    )
    assert opened - written < 5 and read - opened < 10
    assert on_disk < 1e9
