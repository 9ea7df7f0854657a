"""Weights read and written one at a time, without a model: from any layout, for any layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import trained
from ranks import run_ranks
from tiny import recipe_with, weights_at

from recipes.schema.manifest import read_manifest
from train.checkpoint import publishing
from train.checkpoint.__main__ import main as command
from train.checkpoint.files import scan
from train.checkpoint.storage import publish
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights

FOUR = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True, "precision.params": "bf16"}


def test_any_layout_is_read_whole_and_written_for_any_layout(tmp_path: Path) -> None:
    recipe = recipe_with(**FOUR)
    path = trained(tmp_path / "four", recipe, world=4)
    stored = StoredTensors(path)
    copy = tmp_path / "copy"
    (tmp_path / "aside").mkdir()
    write_weights(tmp_path / "aside", stored.weights, stored.read)
    publish(tmp_path / "aside", copy, read_manifest(path))
    assert read_manifest(copy).fingerprint == read_manifest(path).fingerprint
    assert StoredTensors(copy).weights == stored.weights
    assert not [name for name in stored.weights if "optimizer" in name or "extra_state" in name]

    original = run_ranks(1, weights_at, recipe_with(**{"precision.params": "bf16"}), 1, path)[0]
    for name in ("embedding.word_embeddings.weight", "decoder.layers.3.self_attention.linear_qkv.weight"):
        assert torch.equal(stored.read(name), original[name])
    parts = [stored.read(f"decoder.layers.0.mixer.in_proj.weight.{part}") for part in ("z", "x", "B", "C", "dt")]
    assert torch.equal(torch.cat(parts), original["decoder.layers.0.mixer.in_proj.weight"])
    again = run_ranks(1, weights_at, recipe_with(**{"precision.params": "bf16"}), 1, copy)[0]
    assert original.keys() == again.keys() and all(torch.equal(original[name], again[name]) for name in original)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    path = trained(tmp_path, recipe_with(), world=1)
    with pytest.raises(
        AssertionError, match=r"contains \d+ weights that this model does not have.*decoder\.layers\.[0-9]"
    ):
        run_ranks(1, weights_at, recipe_with(**{"model.pattern": "M-M*-M-M*"}), 1, path)
    with pytest.raises(AssertionError, match=r"this model has 3 weights that it does not contain.*decoder\.layers\.10"):
        run_ranks(1, weights_at, recipe_with(**{"model.pattern": "M-M*-M-M*-*"}), 1, path)


def test_nan_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same NaN on both sides is not a difference; a tensor with NaN on one side only is named first."""
    nan = float("nan")
    base = read_manifest(Path(__file__).with_name("version_0_1_0") / "step_00000002")
    sides = {
        "a": {"one": [1.0, nan, 3.0, -0.0], "two": [1.0, 2.0], "three": [5.0, 6.0]},
        "b": {"one": [2.0, nan, 3.0, 0.0], "two": [nan, 2.0], "three": [5.0, 6.0]},
    }
    for side, values in sides.items():
        tensors = {name: torch.tensor(numbers) for name, numbers in values.items()}
        (tmp_path / "aside").mkdir()
        stored = {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_weights(tmp_path / "aside", stored, tensors.__getitem__)
        index, records = scan(tmp_path / "aside")  # without the check of `publish`, like versions that allowed NaN
        files = {path.name: path.stat().st_size for path in (tmp_path / "aside").iterdir()}
        publishing.seal(tmp_path / "aside", replace(base, tensors=records, files=files), index)
        publishing.publish(tmp_path / "aside", tmp_path / side)
    assert command(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--values"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model.")]
    assert [line[0] for line in lines] == ["model.two", "model.one"]
    assert lines[0][3:] == ["1", "of", "2", "nan", "nan"]
    assert lines[1][3:6] == ["1", "of", "4"] and float(lines[1][6]) == 1.0
