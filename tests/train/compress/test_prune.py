"""Pruning to the same sizes gives the parent; cutting zeros changes no logit; every width is really cut; the result trains."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pruning_parents import GEMMA, HYBRID, logits, recipe_of, score
from ranks import run_ranks
from teachers import save_teacher
from tiny import RECIPE, Numbers, steps_of

from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import parameters
from recipes.schema.typed import build
from train.checkpoint import storage
from train.checkpoint.manager import checkpoint_at
from train.checkpoint.manifest import read_manifest
from train.checkpoint.tensors import StoredTensors, write_weights
from train.compress.commands import _write_pruned
from train.compress.parent import Parent
from train.compress.prune import _AXES as AXES
from train.compress.prune import Depth, KeptParts, Target, _indices, choose, cut_weights, head_merges, pruned_model
from train.compress.scores import Removal, Scores
from train.distill.objective import kept_channels
from train.distill.teacher import teacher_recipe
from train.hf.convert import export_weights

SMALLER = {
    "hidden": Target(hidden=48),
    "ffn": Target(ffn=80),
    "heads": Target(heads=2),
    "mamba_heads": Target(mamba_heads=4),
    "mamba_head_dim": Target(mamba_head_dim=12),
    "layers": Target(layers=5),
}


def all_of(model: ModelConfig) -> Target:
    """Every width that a model has, cut."""
    mamba = {"mamba_heads": 4, "mamba_head_dim": 12} if "M" in model.pattern else {}
    return Target(hidden=48, ffn=80, heads=2, **mamba)


@pytest.fixture(scope="module", params=["hybrid", "gemma"])
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    model = HYBRID if request.param == "hybrid" else GEMMA
    return save_teacher(tmp_path_factory.mktemp("parent"), replace(RECIPE, model=model)), model


@pytest.fixture(scope="module")
def scores(parent: tuple[Path, ModelConfig]) -> Scores:
    path, model = parent
    return run_ranks(1, score, path, recipe_of(model), 1, 4)[0]


@pytest.fixture(scope="module")
def before(parent: tuple[Path, ModelConfig]) -> torch.Tensor:
    """The parent's logits."""
    return run_ranks(1, logits, *parent)[0]


def cut(
    parent: Path, folder: Path, scores: Scores, target: Target, kept: KeptParts | None = None, *, merge: bool = False
) -> ModelConfig:
    kept = kept if kept is not None else choose(scores, target)
    small = pruned_model(build(ModelConfig, scores.model, "model"), target, kept.layers)
    cut_weights(parent, aside_of(folder), scores=scores, kept=kept, small=small, merge_heads=merge)
    finish(folder)
    return small


def aside_of(folder: Path) -> Path:
    """The temporary folder of a checkpoint."""
    aside = folder.with_name(f".{folder.name}.writing")
    aside.mkdir()
    return aside


def finish(folder: Path) -> None:
    storage.publish(folder.with_name(f".{folder.name}.writing"), folder, storage.RunState())


def test_pruning_to_the_identity_is_bitwise_the_parent(
    parent: tuple[Path, ModelConfig], scores: Scores, tmp_path: Path
) -> None:
    path, model = parent
    assert cut(path, tmp_path / "same", scores, Target()) == model
    before, after = StoredTensors(path), StoredTensors(tmp_path / "same")
    assert before.weights == after.weights
    for name in before.weights:
        assert torch.equal(before.read(name), after.read(name)), name


@pytest.mark.parametrize("axis", SMALLER)
def test_every_width_is_really_cut(
    axis: str, parent: tuple[Path, ModelConfig], scores: Scores, before: torch.Tensor, tmp_path: Path
) -> None:
    """A no-op would not change parameters or logits (as with a hook on the wrong module)."""
    path, model = parent
    if model is GEMMA and (axis.startswith("mamba") or axis == "layers"):
        pytest.skip("no Mamba layers; four layers only")
    small = cut(path, tmp_path / "small", scores, SMALLER[axis])
    stored = sum(tensor.shape_numel for tensor in StoredTensors(tmp_path / "small").weights.values())
    assert stored == parameters(small).total < parameters(model).total
    (after,) = run_ranks(1, logits, tmp_path / "small", small)
    change = float((after - before).norm() / before.norm())
    assert 1e-3 < change < 2, f"logits changed by {change}"


def test_cutting_what_is_zero_changes_no_logit(
    parent: tuple[Path, ModelConfig], scores: Scores, tmp_path: Path
) -> None:
    """All widths at once: norms that divided by the mean over all channels must still give the same."""
    path, model = parent
    target = all_of(model)
    kept = choose(scores, target)
    zeroed = tmp_path / "zeroed"
    stored = StoredTensors(path)

    def read(name: str) -> torch.Tensor:
        tensor = stored.read(name)
        number = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        suffix = name.split(".", 3)[3] if number is not None else name
        for dim, axis in enumerate(AXES[suffix]):
            indices = _indices(axis, number, tensor.shape[dim], model, kept)
            if indices is not None:
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), indices)
                tensor.index_fill_(dim, torch.from_numpy(gone), 0.0)
        return tensor

    write_weights(aside_of(zeroed), stored.weights, read)
    finish(zeroed)
    measured = run_ranks(1, score, zeroed, recipe_of(model), 1, 4)[0]
    small = cut(zeroed, tmp_path / "small", measured, target, kept)
    before, after = (run_ranks(1, logits, *what)[0] for what in ((zeroed, model), (tmp_path / "small", small)))
    assert float(before.std()) > 0.05
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-5)


def test_without_the_norms_correction_the_logits_would_differ(
    parent: tuple[Path, ModelConfig], scores: Scores, tmp_path: Path
) -> None:
    path, _ = parent
    even = replace(scores, energy={site: np.ones_like(values) for site, values in scores.energy.items()})
    small = cut(path, tmp_path / "corrected", scores, Target(hidden=48))
    cut(path, tmp_path / "plain", even, Target(hidden=48))
    corrected, plain = (run_ranks(1, logits, tmp_path / name, small)[0] for name in ("corrected", "plain"))
    assert not torch.allclose(corrected, plain, rtol=1e-3)


def test_a_pruned_model_trains_on(parent: tuple[Path, ModelConfig], scores: Scores, tmp_path: Path) -> None:
    path, model = parent
    small = cut(path, tmp_path / "small", scores, all_of(model))
    (start, numbers), (_, two) = (
        run_ranks(world, train_on, tmp_path / "small", recipe_of(small, tensor=world))[0] for world in (1, 2)
    )
    assert len(set(numbers.losses)) == 3 and all(np.isfinite(numbers.grad_norms))
    assert start == pytest.approx(numbers.losses[0], rel=1e-5), "training starts from the pruned weights"
    np.testing.assert_allclose(two.losses, numbers.losses, rtol=2e-5)


def train_on(rank: int, path: Path, recipe: object) -> tuple[float, Numbers]:
    import torch.distributed as dist
    from tiny import rows_of

    from train.build import build_engine, check, mesh_of

    world = recipe.parallel.tensor  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    layout = check(recipe, world=world)  # type: ignore[arg-type]
    with mesh_of(recipe, layout, device=torch.device("cpu"), rank=rank) as mesh:  # type: ignore[arg-type]
        engine = build_engine(recipe, mesh, weights=path)  # type: ignore[arg-type]
        chunk = engine.chunks[0].module
        batch = rows_of(0, np.arange(4))
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        with torch.no_grad():
            start = float(chunk(batch.tokens, positions, None, labels=batch.labels).mean())
        dist.barrier()
        return start, steps_of(engine, recipe, range(3))  # type: ignore[arg-type]


def test_pairs_of_merged_heads_are_the_papers() -> None:
    """arXiv 2407.14679, section 2.3: head i takes head 2K - i + 1, ranks from 1, by hand."""
    scores = np.array([3.0, 9.0, 1.0, 7.0, 5.0])  # by rank: heads 1, 3, 4, 0, 2
    assert head_merges(scores, 3, groups=1) == [(3, 2), (4, 0)]  # ranks 2 and 5, 3 and 4; the first stays as it is
    assert head_merges(scores, 2, groups=1) == [(1, 0), (3, 4)]  # ranks 1 and 4, 2 and 3; the fifth is lost
    assert head_merges(scores, 5, groups=1) == []
    assert head_merges(np.array([1.0, 2.0, 4.0, 3.0]), 2, groups=2) == [(1, 0), (2, 3)]  # never across key/value heads


def test_kept_query_heads_absorb_the_dropped_ones(
    parent: tuple[Path, ModelConfig], scores: Scores, tmp_path: Path
) -> None:
    """Twice the kept head's query rows minus the dropped one's; keys, values and everything else as without merging."""
    path, model = parent
    target = Target(heads=2)
    plain, merged = (StoredTensors(_cut_to(tmp_path / str(m), path, scores, target, merge=m)) for m in (False, True))
    whole, width, per_group = StoredTensors(path), model.head_dim, model.heads // model.kv_heads
    changed = [name for name in plain.weights if not torch.equal(plain.read(name), merged.read(name))]
    attention = [n for n, parts in scores.layers.items() if "heads" in parts]
    assert changed == [f"decoder.layers.{n}.self_attention.linear_qkv.weight" for n in attention]
    for number, name in zip(attention, changed, strict=True):
        before = whole.read(name).view(model.kv_heads, per_group + 2, width, -1)
        after = merged.read(name).view(model.kv_heads, 3, width, -1)
        by_group = scores.layers[number]["heads"].reshape(model.kv_heads, per_group)
        for group, (first, second) in enumerate(by_group):
            kept, gone = (0, 1) if first >= second else (1, 0)
            torch.testing.assert_close(after[group, 0], 2 * before[group, kept] - before[group, gone])
            assert torch.equal(after[group, 1:], before[group, per_group:])


def _cut_to(folder: Path, path: Path, scores: Scores, target: Target, *, merge: bool) -> Path:
    cut(path, folder, scores, target, merge=merge)
    return folder


def test_sizes_that_do_not_fit_are_refused_together() -> None:
    with pytest.raises(RecipeError) as error:
        pruned_model(HYBRID, Target(hidden=100, heads=3, mamba_heads=7), list(range(8)))
    text = str(error.value)
    assert "compress.hidden=100 is more than the parent's 64" in text
    assert "compress.heads=3" in text and "Use 2 or 4" in text
    assert "compress.mamba_heads=7" in text and "Use 6 or 8" in text
    with pytest.raises(RecipeError, match=r"compress.mamba_heads=4 cuts nothing: w-\*- has no Mamba layers"):
        pruned_model(GEMMA, Target(mamba_heads=4), list(range(4)))
    with pytest.raises(RecipeError, match=r"compress.heads=2 cuts nothing: M-M-M- has no attention layers"):
        pruned_model(HYBRID, Target(layers=6, heads=2), [0, 1, 2, 4, 5, 7])


def test_layers_are_chosen_as_the_recipe_says() -> None:
    """The configured numbers of removals, of block influences and of attention layers, computed by hand."""
    scores = Scores(model=asdict(HYBRID), parent="", rows=1, depth_metric="logit_mse")  # M-M*-M*-
    scores.influence = np.array([9.0, 1.0, 8.0, 2.0, 3.0, 7.0, 0.5, 6.0])
    scores.removals = [Removal(7, []), Removal(3, []), Removal(0, [])]
    parts = {"M": {"mamba": np.ones((8, 16))}, "-": {"ffn": np.ones(128)}, "*": {"heads": np.ones(4)}}
    scores.hidden, scores.layers = np.ones(64), {n: parts[kind] for n, kind in enumerate(HYBRID.pattern)}

    def layers(keep: int, **how: Any) -> list[int]:
        return choose(scores, Target(layers=keep), Depth(**how)).layers

    assert layers(6) == layers(6, metric="logit_mse") == layers(6, attention_layers=1) == [0, 1, 2, 4, 5, 6]
    assert layers(6, metric="block_influence") == [0, 2, 3, 4, 5, 7]
    assert layers(6, metric="block_influence", attention_layers=2) == [0, 2, 3, 5, 6, 7]
    assert layers(5, metric="block_influence", attention_layers=0) == [0, 2, 4, 5, 7]
    for keep, how, message in (
        (6, {"attention_layers": 2}, "removes 0 attention layers, but the first 2 removals in the scores include 1"),
        (6, {"metric": "perplexity"}, "removes 2 layers by perplexity, but the scores tried 3 by logit_mse"),
        (3, {}, "removes 5 layers, but the scores tried 3"),
        (8, {"attention_layers": 1}, "2 attention layers of 8, of which 8 stay .compress.layers.. Use 2"),
        (9, {}, "compress.layers=9 is more than the parent's 8"),
    ):
        with pytest.raises(RecipeError, match=message):
            layers(keep, **how)


def test_kept_channels_are_traced_through_two_prunings() -> None:
    """Of eight channels 1, 3, 4, 7 stayed, of those the second and the last: 3 and 7 of the first parent's."""
    first = {"kept": {"hidden": [1, 3, 4, 7]}, "parent_model": {"hidden": 8}, "before": {}}
    second = {"kept": {"hidden": [1, 3]}, "parent_model": {"hidden": 4}, "before": first, "started_from": "runs/x"}
    assert kept_channels(second, of=4) == [1, 3]
    assert kept_channels(second, of=8) == [3, 7]
    assert kept_channels(second, of=16) is None and kept_channels({}, of=8) is None


def test_a_pruned_checkpoint_says_where_it_comes_from_and_is_exported(
    parent: tuple[Path, ModelConfig], scores: Scores, tmp_path: Path
) -> None:
    """Written by the command, then exported to Hugging Face's format, where the converter compares each tensor."""
    path, model = parent
    manifest = read_manifest(path)
    whole = Parent(path, manifest, teacher_recipe(manifest, path))
    folder = tmp_path / "small"
    text = _write_pruned(whole, scores, Target(hidden=48, ffn=80), folder, name="small")
    assert f"{parameters(model).total:,} -> " in text and str(folder / "model" / "small.yaml") in text
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000000"
    assert "exists already" in _write_pruned(whole, scores, Target(hidden=48, ffn=80), folder, name="small")
    with pytest.raises(RecipeError, match=r"compress.merge_heads=true has nothing to merge"):
        _write_pruned(whole, scores, Target(hidden=48), folder, name="small", merge_heads=True)
    found, pruned = checkpoint_at(folder)
    assert pruned.recipe["model"]["hidden"] == 48 and pruned.tokenizer == manifest.tokenizer and pruned.updates is None
    kept = pruned.lineage["kept"]
    assert len(kept["hidden"]) == 48 and kept["layers"] == list(range(len(model.pattern)))
    assert (
        pruned.lineage["parent_fingerprint"] == manifest.fingerprint and pruned.lineage["parent_step"] == manifest.step
    )
    assert yaml.safe_load((folder / "model" / "small.yaml").read_text())["ffn"] == 80
    small = teacher_recipe(pruned, found).model
    (tmp_path / "hf").mkdir()
    converted = export_weights(StoredTensors(found), tmp_path / "hf", model=small)
    assert converted.parameters == parameters(small).total
