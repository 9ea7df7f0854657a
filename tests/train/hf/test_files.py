"""Weight files: the safetensors package reads ours and we read its files; damage is named; pickles are not opened."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.schema.errors import CheckpointError
from train.hf.files import INDEX, Entry, WeightFiles, WeightWriter

TENSORS = {
    "a": torch.randn(7, 3),
    "b.c": torch.randn(5).to(torch.bfloat16),
    "d": torch.randn(2, 3, 4),
    "e": torch.randn(33, 2),
}


def write(folder: Path, *, file_bytes: int) -> None:
    plan = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]
    with WeightWriter(folder, plan, file_bytes=file_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)


@pytest.mark.parametrize(("file_bytes", "files"), [(10**9, 1), (200, 2), (1, 4)])
def test_the_package_reads_what_is_written(tmp_path: Path, file_bytes: int, files: int) -> None:
    write(tmp_path, file_bytes=file_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    read = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    if files == 1:
        assert paths[0].name == "model.safetensors" and not (tmp_path / INDEX).exists()
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert paths[-1].name == f"model-{files:05d}-of-{files:05d}.safetensors"
    ours = WeightFiles(tmp_path)
    assert all(torch.equal(ours.read(name), TENSORS[name]) for name in TENSORS)


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    files = WeightFiles(tmp_path)
    assert files.entries["b.c"] == Entry("b.c", (5,), torch.bfloat16)
    assert all(torch.equal(files.read(name), TENSORS[name]) for name in TENSORS)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickles \(pytorch_model\.bin\), which can run code"):
        WeightFiles(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors"):
        WeightFiles(tmp_path / "nothing")


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path, file_bytes=200)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=f"{second.name} cannot be read as safetensors"):
        WeightFiles(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=second.name):
        WeightFiles(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"a is in {first.name} and in {second.name}"):
        WeightFiles(tmp_path)
    save_file({"x": torch.ones(2)}, second)
    with pytest.raises(CheckpointError, match=r"disagree about 2 tensors"):
        WeightFiles(tmp_path)
    for place in (5, "../elsewhere.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": place}}))
        with pytest.raises(CheckpointError, match=r"x is in .* which is not a file of the directory"):
            WeightFiles(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"x": torch.ones(2, dtype=torch.int8)}, second)
    with pytest.raises(CheckpointError, match=r"x is stored as I8"):
        WeightFiles(tmp_path)
