"""Merging weights: float64 arithmetic on sources of different layouts and formats, what is refused, and the memory it takes."""

import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import recipe_of
from hf_models import trained as trained_at
from ranks import run_ranks
from tiny import TINY, recipe_with

from data.system import disk
from recipes.schema.changes import function_changes
from recipes.schema.errors import CheckpointError, NumericsError, RecipeError
from recipes.schema.lora import LoraConfig
from recipes.schema.lora_rules import adapter_problems
from recipes.schema.manifest import Manifest
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.teacher_rules import kept_channels
from recipes.schema.tools import MergeConfig
from train.checkpoint import storage
from train.checkpoint.files import Reader, whole_tensor
from train.checkpoint.manifest import MASTER, MODEL, RunState
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights
from train.merge.run_merge import run_merge
from train.merge.weighted_sum import Source, check_sources, merge_weights, source_at, write_run

Tensors = dict[str, torch.Tensor]


def stored_formats(tensors: Tensors) -> dict[str, StoredTensor]:
    return {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def handmade(folder: Path, tensors: Tensors, **state: Any) -> Source:
    """A checkpoint of some tensors."""
    aside = folder / "aside"
    aside.mkdir(parents=True)
    write_weights(aside, stored_formats(tensors), tensors.__getitem__)
    known = RunState(**{"recipe": recipe_mapping(recipe_with()), "tokenizer": "t" * 64, **state})
    storage.publish(aside, folder / "step_00000000", known)
    return source_at(folder / "step_00000000")


def merged(folder: Path, sources: list[Source], weights: list[float], **options: Any) -> Manifest:
    check_sources(sources)
    done: list[int] = []
    options = {"rule": {}, "keep_step": False, "advance": done.append, **options}
    manifest = write_run(folder, sources, weights, **options)
    assert sum(done) == sum(record.bytes for record in manifest.tensors.values())
    return manifest


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (33, 20), "b.weight": (7,), "c": (), "d.weight": (4, 3, 5)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def test_sums_equal_float64_and_ends_are_bitwise_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with blocks of a few rows, and with a row longer than a block."""
    monkeypatch.setattr("train.merge.weighted_sum.BLOCK_ELEMENTS", 45)
    tensors = [random_tensors(seed) for seed in (1, 2, 3)]
    sources = [handmade(tmp_path / str(n), one) for n, one in enumerate(tensors)]
    for number, weights in enumerate([[0.7, 0.3, 0.0], [0.25, 0.25, 0.5], [1.5, -0.75, 0.25], [0, 1, 0], [1, 0, 0]]):
        manifest = merged(tmp_path / f"out{number}", sources, weights)
        found = StoredTensors(tmp_path / f"out{number}" / "checkpoints" / "step_00000000")
        for name in tensors[0]:
            exact = sum(w * one[name].double() for w, one in zip(weights, tensors, strict=True))
            torch.testing.assert_close(found.read(name).double(), exact, rtol=0, atol=1e-6)
            if 1 in weights:
                assert torch.equal(found.read(name), tensors[weights.index(1)][name])
        assert (manifest.step, manifest.updates, manifest.tokenizer) == (0, None, "t" * 64)


def test_the_lineage_names_every_source_and_weight(tmp_path: Path) -> None:
    first = handmade(tmp_path / "a", random_tensors(1), lineage={"imported_from": "somewhere"})
    second = handmade(tmp_path / "b", random_tensors(2), tokens=70)
    lineage = merged(tmp_path / "out", [first, second], [0.4, 0.6], rule={"alpha": 0.6}).lineage
    assert (lineage["made_by"], lineage["rule"], lineage["parent"]) == ("merge", {"alpha": 0.6}, str(first.path))
    assert [one["weight"] for one in lineage["sources"]] == [0.4, 0.6]
    assert [one["fingerprint"] for one in lineage["sources"]] == [s.manifest.fingerprint for s in (first, second)]
    assert lineage["sources"][1]["tokens"] == 70 and lineage["before"] == {"imported_from": "somewhere"}


def test_layouts_and_formats_may_differ_and_masters_are_read(tmp_path: Path) -> None:
    """Two tensor ranks in bf16 with fp32 masters, and one file in fp32: the sum of the masters, rounded once."""
    recipe = recipe_of(replace(TINY, pattern="M-*-"), params="bf16", tensor=2)
    two = source_at(trained_at(tmp_path / "two", recipe, world=2))
    assert len(list(two.path.glob("*.safetensors"))) == 2
    plain = {name: torch.randn(tensor.shape) for name, tensor in StoredTensors(two.path).weights.items()}
    one = handmade(tmp_path / "one", plain, recipe=two.manifest.recipe)
    for number, sources in enumerate(([two, one], [one, two])):
        merged(tmp_path / f"out{number}", sources, [0.3, 0.7])
        found = StoredTensors(tmp_path / f"out{number}" / "checkpoints" / "step_00000000")
        readers = [Reader(source.path) for source in sources]
        assert any(MASTER + name in readers[number].manifest.tensors for name in found.weights)
        for name, tensor in found.weights.items():
            parts = [
                whole_tensor(r, MASTER + name if MASTER + name in r.manifest.tensors else MODEL + name).double()
                for r in readers
            ]
            exact = 0.3 * parts[0] + 0.7 * parts[1]
            assert tensor.dtype == StoredTensors(sources[0].path).weights[name].dtype
            tolerance = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(found.read(name).double(), exact, rtol=tolerance, atol=1e-6)


def test_a_window_keeps_step_position_and_data(tmp_path: Path) -> None:
    states = [{"step": step, "position": 4 * step, "tokens": 256 * step, "data_hash": "h"} for step in (3, 5)]
    sources = []
    for state in states:
        one = handmade(tmp_path / str(state["step"]), random_tensors(state["step"]), **state)  # type: ignore[arg-type]
        sources.append(one)
    manifest = merged(tmp_path / "out", sources, [0.5, 0.5], keep_step=True)
    assert (manifest.step, manifest.position, manifest.tokens, manifest.data_hash) == (5, 20, 1280, "h")
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == "step_00000005\n"
    assert manifest.recipe["run"]["name"] == "out" and manifest.recipe["run"]["start_from"] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer": "u" * 64}, RecipeError, "different tokenizers (tttttttttttt and uuuuuuuuuuuu)"),
        ({"recipe": recipe_with(**{"model.norm_eps": 1e-3})}, RecipeError, "model.norm_eps: 1e-05 and 0.001"),
        ({"recipe": recipe_with(**{"model.pattern": "M-M*-M-M--"})}, RecipeError, "model.pattern"),
        ({"recipe": {}}, CheckpointError, "has no recipe"),
        ({"lineage": {"kept": {"hidden": [1, 2]}}}, RecipeError, "pruned to the same shape"),
    ],
)
def test_another_model_or_tokenizer_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    if change.get("recipe"):
        change = {"recipe": recipe_mapping(change["recipe"])}
    sources = [handmade(tmp_path / "a", random_tensors(1)), handmade(tmp_path / "b", random_tensors(2), **change)]
    with pytest.raises(error) as raised:
        check_sources(sources)
    assert message in str(raised.value)


def test_averaged_adapters_can_train_on_and_two_models_with_adapters_are_refused(tmp_path: Path) -> None:
    """(a + b)(c + d) is not ac + bd. A model with adapters names what it adapts, or its recipe would be refused."""
    recipe = recipe_with(**{"model.lora": LoraConfig(rank=4), "run.start_from": "runs/base"})
    mapping = recipe_mapping(recipe)
    sources = [handmade(tmp_path / str(seed), random_tensors(seed), recipe=mapping) for seed in (1, 2)]
    with pytest.raises(RecipeError, match=r"which a sum of two models does not support\. .*--adapters"):
        run_merge(MergeConfig(alpha="0.5"), [source.path for source in sources], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    manifest = merged(tmp_path / "window", sources, [0.5, 0.5], keep_step=True)
    assert adapter_problems(recipe_from_mapping(manifest.recipe)) == []


def test_what_cannot_be_summed_is_refused(tmp_path: Path) -> None:
    first = handmade(tmp_path / "a", random_tensors(1))
    other = handmade(tmp_path / "shape", random_tensors(2) | {"b.weight": torch.zeros(8)})
    with pytest.raises(RecipeError, match=r"b\.weight: \(7,\) and \(8,\)"):
        check_sources([first, other])
    fewer = random_tensors(2)
    del fewer["c"]
    with pytest.raises(RecipeError, match=r"c: \(\) and missing"):
        check_sources([first, handmade(tmp_path / "fewer", fewer)])
    codes = handmade(tmp_path / "codes", random_tensors(2) | {"b.weight": torch.zeros(7, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"b\.weight is stored as torch\.int8"):
        check_sources([codes, codes])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "nemotron_h"}))
    with pytest.raises(CheckpointError, match="Import it first: stratum hf import"):
        source_at(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"quantization_config": {}}))
    with pytest.raises(CheckpointError, match="has quantised weights"):
        source_at(tmp_path / "hf")


def test_a_result_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    largest = torch.finfo(torch.float32).max
    sources = [
        handmade(tmp_path / str(sign), random_tensors(1) | {"b.weight": torch.full((7,), sign * largest)})
        for sign in (1, -1)
    ]
    with pytest.raises(NumericsError, match=r"b\.weight \(7 elements\)"):
        merged(tmp_path / "out", sources, [2, -1])
    bad = Source(sources[0].path, replace(sources[0].manifest, tensors={
        name: replace(record, not_finite=3) for name, record in sources[0].manifest.tensors.items()
    }))  # fmt: skip
    with pytest.raises(CheckpointError, match="cannot be merged: 4 tensors contain NaN or infinity"):
        check_sources([sources[0], bad])
    assert not (tmp_path / "out").exists() and not disk.aside_of(tmp_path / "out").exists()


def test_a_damaged_source_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """One bit of a weight, which no size and no header shows."""
    sources = [handmade(tmp_path / str(seed), random_tensors(seed)) for seed in (1, 2)]
    file = sources[1].path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"2/step_00000000 is damaged: model\.\S+ is not what was saved"):
        merged(tmp_path / "out", sources, [0.5, 0.5])
    assert not (tmp_path / "out").exists() and not disk.aside_of(tmp_path / "out").exists()


def test_a_pruned_parent_is_found_behind_a_merge() -> None:
    pruned = {"kept": {"hidden": [0, 2, 5]}, "parent_model": {"hidden": 8}, "before": {}}
    assert kept_channels({"made_by": "merge", "before": pruned}, of=8) == [0, 2, 5]
    assert kept_channels({"made_by": "merge", "before": {}}, of=8) is None


def test_unknown_recipes_have_no_changes_of_function() -> None:
    mapping = recipe_mapping(recipe_with())
    assert function_changes({}, mapping) == [] == function_changes(mapping, mapping)


def _peak(rank: int, work: Callable[[], object]) -> int:
    """Bytes by which work raises the peak of this process's memory."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that the parent freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two sources with one tensor each, of 48 and of 192 MiB. Merging takes blocks of 16 MiB, reading all of it."""
    peaks = []
    for rows in (3 << 20, 12 << 20):
        folder = tmp_path / str(rows)
        for name in "ab":
            handmade(folder / name, {"w": torch.full((rows, 4), 1.0 + ord(name))})
        sources = [StoredTensors(folder / name / "step_00000000") for name in "ab"]
        (folder / "out").mkdir()
        merge = partial(
            merge_weights, sources, [0.5, 0.5], folder / "out", formats=sources[0].weights, advance=lambda _: None
        )
        peaks += run_ranks(1, _peak, merge)
        assert os.path.getsize(folder / "out" / "rank_00000.safetensors") > rows * 16
    assert max(peaks) < 96 << 20 and abs(peaks[0] - peaks[1]) < 8 << 20, peaks
    assert run_ranks(1, _peak, lambda: sources[0].read("w"))[0] > 190 << 20
