"""Checkpoint files that are foreign or damaged are read within bounds, or refused with one message."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mutations import check_reader, json_mutants, mutants
from unprivileged import load_kernels

from recipes.schema import checkpoint_steps as steps
from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import _digest, sha256
from train.checkpoint import offline
from train.checkpoint.__main__ import main as command
from train.checkpoint.files import Reader, scan, whole_tensor

STEP = Path(__file__).with_name("version_0_1_0") / "step_00000002"
COUNTS = pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.slow)], ids=["few", "many"])


def read_step(path: Path) -> None:
    """Everything that reads a step's folder."""
    folder = path.parent
    command(["show", str(folder)])
    command(["verify", str(folder)])
    steps.candidates(folder.parent)
    offline.verify(folder, lambda _: None)
    with suppress(CheckpointError):
        scan(folder)
    reader = Reader(folder)
    for name in reader.manifest.tensors:
        reader.sums(name)
    whole_tensor(reader, "model.output_layer.weight")


def with_right_digests(content: bytes, variants: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """An attacker can compute the digest of a hostile manifest."""
    for case, text in variants:
        body = json.loads(text)
        if isinstance(body, dict):
            body.pop("digest", None)
            body["digest"] = _digest(body)
        yield case, json.dumps(body).encode()


@pytest.fixture
def step(tmp_path: Path) -> Path:
    load_kernels()
    folder = tmp_path / "checkpoints" / STEP.name
    shutil.copytree(STEP, folder)
    return folder


@COUNTS
@pytest.mark.parametrize("name", ["manifest.json", "index.json", "rank_00000.safetensors"])
def test_damaged_bytes_are_contained(name: str, count: int, step: Path) -> None:
    check_reader(read_step, {name: mutants((step / name).read_bytes(), count=count, seed=1)}, folder=step)


def test_a_header_entry_without_a_field_is_one_error(step: Path) -> None:
    path = step / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"data_offsets", b"data_offsetz", 1))
    with pytest.raises(CheckpointError, match=r"is not a safetensors file: its entry .* lacks or misstates a field"):
        scan(step)


@COUNTS
def test_a_hostile_manifest_is_contained(count: int, step: Path) -> None:
    content = (step / "manifest.json").read_bytes()
    variants = with_right_digests(content, json_mutants(content, count=count, seed=2))
    check_reader(read_step, {"manifest.json": variants}, folder=step)


def read_step_with_index(path: Path) -> None:
    """Correct size and digest of the index in the manifest, then read."""
    manifest = path.parent / "manifest.json"
    body = json.loads(manifest.read_text())
    body.pop("digest")
    text = path.read_text()
    body["files"]["index.json"] = path.stat().st_size
    body["index_sha256"] = sha256(text)
    manifest.write_text(json.dumps(body | {"digest": _digest(body)}))
    read_step(path)


@COUNTS
def test_a_hostile_index_is_contained(count: int, step: Path) -> None:
    content = (step / "index.json").read_bytes()
    check_reader(read_step_with_index, {"index.json": json_mutants(content, count=count, seed=3)}, folder=step)


@COUNTS
def test_a_damaged_pointer_is_contained(count: int, step: Path) -> None:
    def read(path: Path) -> None:
        assert [manifest.step for _, manifest in steps.candidates(path.parent)[0]] == [2]
        command(["list", str(path.parent)])

    check_reader(read, {"latest": mutants(b"step_00000002\n", count=count, seed=4)}, folder=step.parent)
