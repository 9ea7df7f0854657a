"""Scores equal the formulas on activations from separate hooks, at every layout; removing a layer equals zeroing it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning_parents import GEMMA, HYBRID, Rows, recipe_of, score
from ranks import run_ranks
from teachers import save_teacher
from tiny import RECIPE, engine_of, rows_of

from recipes.schema.errors import CheckpointError, RecipeError
from train.build import check, mesh_of
from train.checkpoint.storage import read_weights
from train.compress.importance import attention_quota, removal_scores
from train.compress.parent import Parent, layout_recipe, scoring_engine
from train.compress.scores import Removal, Scores, best, best_in_groups, best_mamba

ROWS = 5
"""Odd, so that a microbatch is filled up with a row that does not count."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2 with sequence parallelism, PP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("parent"), replace(RECIPE, model=HYBRID))


@pytest.fixture(scope="module")
def alone(parent: Path) -> Scores:
    return run_ranks(1, score, parent, recipe_of(HYBRID), 1, ROWS, 2, 1)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_do_not_depend_on_the_layout(layout: str, parent: Path, alone: Scores) -> None:
    world, parallel = LAYOUTS[layout]
    for scores in run_ranks(world, score, parent, recipe_of(HYBRID, **parallel), world, ROWS, 2, 1):
        np.testing.assert_allclose(scores.hidden, alone.hidden, rtol=2e-5)
        np.testing.assert_allclose(scores.influence, alone.influence, rtol=2e-4, atol=1e-7)
        for number, parts in alone.layers.items():
            for kind, values in parts.items():
                np.testing.assert_allclose(scores.layers[number][kind], values, rtol=2e-5, err_msg=f"{number} {kind}")
        for site, values in alone.energy.items():
            np.testing.assert_allclose(scores.energy[site], values, rtol=2e-5, err_msg=site)
        assert [r.layer for r in scores.removals] == [r.layer for r in alone.removals]
        for ours, theirs in zip(scores.removals, alone.removals, strict=True):
            for a, b in zip(ours.candidates, theirs.candidates, strict=True):
                assert a.logit_error == pytest.approx(b.logit_error, rel=1e-4)
                assert a.loss_increase == pytest.approx(b.loss_increase, rel=1e-4, abs=1e-6)


def test_scores_are_the_papers_formulas(parent: Path, alone: Scores) -> None:
    """Activations from the test's hooks, formulas in float64 (arXiv 2407.14679 3.1, 2504.11409 3)."""
    (seen,) = run_ranks(1, activations, parent)

    def aggregated(x_SBC: torch.Tensor) -> np.ndarray:
        return x_SBC.double().abs().mean(0).square().sum(0).sqrt().numpy()

    np.testing.assert_allclose(alone.layers[1]["ffn"], aggregated(seen["ffn"]), rtol=1e-5)
    by_head = seen["attention"].double().unflatten(-1, (HYBRID.heads, HYBRID.head_dim)).norm(dim=-1)
    np.testing.assert_allclose(alone.layers[3]["heads"], aggregated(by_head), rtol=1e-5)
    inner = HYBRID.mamba_heads * HYBRID.mamba_head_dim
    x = seen["in_proj"][..., inner : 2 * inner]
    np.testing.assert_allclose(alone.layers[0]["mamba"].reshape(-1), aggregated(x), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(seen["entering"].double(), seen["leaving"].double(), dim=-1)
    assert alone.influence[1] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


def activations(rank: int, path: Path) -> dict[str, torch.Tensor]:
    with engine_of(recipe_of(HYBRID), rank=rank, world=1) as engine:
        chunk = engine.chunks[0].module
        read_weights(path, [chunk], groups=engine.mesh.groups)
        layers, seen = chunk.decoder.layers, {}
        layers[1].mlp.linear_fc2.register_forward_pre_hook(lambda _m, i: seen.update(ffn=i[0]))
        layers[3].self_attention.linear_proj.register_forward_pre_hook(lambda _m, i: seen.update(attention=i[0]))
        layers[0].mixer.in_proj.register_forward_hook(lambda _m, _i, o: seen.update(in_proj=o[0]))
        layers[0].register_forward_hook(lambda _m, _i, o: seen.update(entering=o))
        layers[1].register_forward_hook(lambda _m, _i, o: seen.update(leaving=o[0] if isinstance(o, tuple) else o))
        batch = rows_of(0, np.arange(ROWS))
        with torch.no_grad():
            chunk(batch.tokens, torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens), None)
        return seen


def test_a_layer_taken_out_is_a_layer_that_adds_nothing(parent: Path, alone: Scores) -> None:
    (errors,) = run_ranks(1, zeroed, parent)
    found = {c.layer: (c.logit_error, c.loss_increase) for c in alone.removals[0].candidates}
    assert set(found) == set(range(len(HYBRID.pattern)))
    for layer, (error, rise) in errors.items():
        assert found[layer] == (pytest.approx(error, rel=1e-4), pytest.approx(rise, rel=1e-3, abs=1e-5)), layer


def zeroed(rank: int, path: Path) -> dict[int, tuple[float, float]]:
    """Logits with a layer's last matrix set to zero, against all layers: relative squared error, rise of the loss."""
    with engine_of(recipe_of(HYBRID), rank=rank, world=1) as engine:
        chunk = engine.chunks[0].module
        batch = Rows().training_rows(np.arange(ROWS))
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)

        def run() -> torch.Tensor:
            with torch.no_grad():
                return chunk(batch.tokens, positions, None).double()

        def loss(z: torch.Tensor) -> float:
            return float(torch.nn.functional.cross_entropy(z.flatten(0, 1), batch.labels.flatten()))

        read_weights(path, [chunk], groups=engine.mesh.groups)
        whole, results = run(), {}
        for layer, last in ((0, "mixer.out_proj"), (1, "mlp.linear_fc2"), (3, "self_attention.linear_proj")):
            read_weights(path, [chunk], groups=engine.mesh.groups)
            chunk.decoder.layers[layer].get_submodule(last).weight.data.zero_()
            z = run()
            results[layer] = (float((z - whole).square().sum() / whole.square().sum()), loss(z) - loss(whole))
        return results


def test_rounds_that_are_done_are_not_measured_again(parent: Path, alone: Scores) -> None:
    """Killed after the first removal, scoring ends with the same second one."""
    (again,) = run_ranks(1, second_removal, parent, alone.removals[:1])
    assert again == alone.removals[1:]


def second_removal(rank: int, path: Path, before: list[Removal]) -> list[Removal]:
    torch.set_num_threads(1)
    recipe = layout_recipe(Parent(path, None, recipe_of(HYBRID)), recipe_of(HYBRID), world=1)  # type: ignore[arg-type]
    with (
        mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=rank) as mesh,
        scoring_engine(Parent(path, None, recipe), recipe, mesh) as engine,  # type: ignore[arg-type]
    ):
        return list(removal_scores(engine, HYBRID, Rows(), rows=ROWS, remove=2, attention_layers=1,  # type: ignore[arg-type]
                                   metric="logit_mse", before=before))  # fmt: skip


def test_the_configured_number_of_attention_layers_is_left(alone: Scores) -> None:
    """Two layers are removed, and one of two attention layers must be left: one of each kind."""
    kinds = [HYBRID.pattern[removal.layer] for removal in alone.removals]
    assert kinds.count("*") == 1
    with pytest.raises(RecipeError, match="attention_layers=5"):
        attention_quota(list(HYBRID.pattern), 2, 5)


def test_gemmas_parts_are_scored_too(tmp_path: Path) -> None:
    path = save_teacher(tmp_path, replace(RECIPE, model=GEMMA))
    (scores,) = run_ranks(1, score, path, recipe_of(GEMMA), 1, 2)
    assert scores.layers[0]["heads"].shape == (4,) and scores.layers[1]["ffn"].shape == (GEMMA.ffn,)
    assert "decoder.layers.1.post_norm" in scores.energy
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    np.testing.assert_array_equal(again.hidden, scores.hidden)
    np.testing.assert_array_equal(again.layers[1]["ffn"], scores.layers[1]["ffn"])
    assert again.model == scores.model
    damaged = (tmp_path / "scores" / "scores.npz").read_bytes()
    (tmp_path / "scores" / "scores.npz").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read .*Delete .*scores.json and measure them again"):
        Scores.load(tmp_path / "scores")
    with pytest.raises(CheckpointError, match=r"has no scores: scores.json is missing"):
        Scores.load(tmp_path / "nothing")


def test_choices_by_hand() -> None:
    values = np.array([3.0, 1.0, 2.0, 2.0, 9.0, 0.0])
    assert best(values, 3).tolist() == [0, 2, 4]  # of equal ones the first
    assert best_in_groups(values, 2, 2).tolist() == [0, 4]
    # Heads 0-1 and 2-3 are groups. Channel 1 is the strongest over heads; judged by it alone, head 1 beats head 0.
    scores = np.array([[9.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 9.0]])
    heads, channels = best_mamba(scores, heads=2, channels=1, groups=2)
    assert channels.tolist() == [1] and heads.tolist() == [1, 3]
