"""The teacher cache: training from it equals training with the teacher, at any layout; wrong or damaged caches are refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from teachers import TEACHER, TOKENIZER, distill_tiny, save_teacher, student_of
from tiny import masked_rows, rows_of

from data.batch import Batch
from recipes.schema.errors import DataError, RecipeError
from recipes.schema.recipe import Recipe
from recipes.schema.tools import TeacherCacheConfig
from train.build import check, mesh_of
from train.distill.teacher import open_teacher
from train.distill.teacher_cache import TeacherCache, batch_keys, read_request, reduce_to_k
from train.teacher_cache.write_cache import _cache_all_rows

STEPS, ROWS_A_STEP = 2, 4


class Rows:
    """The rows two training steps of tests/tiny.py see, by position; later positions repeat them."""

    tokenizer = SimpleNamespace(fingerprint=TOKENIZER)

    def training_rows(self, positions: np.ndarray) -> Batch:
        places = positions % (STEPS * ROWS_A_STEP)
        rows = [rows_of(int(p) // ROWS_A_STEP, np.array([int(p) % ROWS_A_STEP])) for p in places]
        return Batch(
            *(
                torch.cat([getattr(row, name) for row in rows])
                for name in ("tokens", "labels", "document_index", "source")
            ),
            positions=positions,
        )


def write(rank: int, recipe: Recipe, world: int, values: str, rows: int) -> None:
    torch.set_num_threads(1)
    tensor = recipe.objective.teacher_tensor or 1
    recipe = replace(recipe, run=replace(recipe.run, global_rows=2 * world // tensor, microbatch_rows=2),
                     parallel=replace(recipe.parallel, tensor=tensor))  # fmt: skip
    online = replace(recipe, objective=replace(recipe.objective, kind="distill", teacher_cache=None))
    with mesh_of(online, check(recipe, world=world), device=torch.device("cpu"), rank=rank) as mesh:
        teacher = open_teacher(recipe, mesh=mesh, tokenizer=TOKENIZER)
        assert teacher is not None
        config = TeacherCacheConfig(values=values, block_rows=3)  # type: ignore[arg-type]
        _cache_all_rows(recipe, config, mesh=mesh, teacher=teacher, dataset=Rows(), rows=rows)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def cache_of(
    teacher: Path, folder: Path, *, world: int, tensor: int = 1, values: str = "float32", k: int = 12
) -> Recipe:
    """Write a cache. -> the recipe that trains from it."""
    changed = {"objective.teacher_cache": str(folder), "objective.top_k": k, "run.microbatch_rows": 2}
    recipe = student_of(teacher, **changed, **{"objective.teacher_tensor": tensor})
    run_ranks(world, write, recipe, world, values, 2 * STEPS * ROWS_A_STEP)  # every row twice
    return recipe


def test_any_layout_writes_and_reads_what_the_teacher_computes_online(teacher: Path, tmp_path: Path) -> None:
    by_one = cache_of(teacher, tmp_path / "one", world=1)
    by_two = cache_of(teacher, tmp_path / "two", world=2)
    by_pair = cache_of(teacher, tmp_path / "pair", world=2, tensor=2)
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert files == {p.name for p in (tmp_path / "two").iterdir()}, "the layout that writes them does not matter"
    assert len(TeacherCache(tmp_path / "one")) == STEPS * ROWS_A_STEP, "a row drawn twice is stored once"
    online = replace(by_one, objective=replace(by_one.objective, teacher_cache=None))
    (expected,) = run_ranks(1, distill_tiny, online, 1, STEPS)
    for recipe, world in ((by_one, 1), (by_two, 2), (by_pair, 2)):
        for numbers in run_ranks(world, distill_tiny, recipe, world, STEPS):
            np.testing.assert_allclose(numbers.losses, expected.losses, rtol=2e-6)
            np.testing.assert_allclose(numbers.grad_norms, expected.grad_norms, rtol=1e-5)
    masked = [run_ranks(1, distill_tiny, recipe, 1, STEPS, masked_rows)[0] for recipe in (by_one, online)]
    np.testing.assert_allclose(masked[0].losses, masked[1].losses, rtol=2e-6)  # of chats
    np.testing.assert_allclose(masked[0].grad_norms, masked[1].grad_norms, rtol=1e-5)
    half = cache_of(teacher, tmp_path / "half", world=1, values="float16")
    (rounded,) = run_ranks(1, distill_tiny, half, 1, STEPS)
    np.testing.assert_allclose(rounded.losses, expected.losses, rtol=1e-3)
    assert rounded.losses != expected.losses

    fewer_online = replace(online, objective=replace(online.objective, top_k=5))
    fewer_cached = replace(by_one, objective=replace(by_one.objective, top_k=5))
    results = [run_ranks(1, distill_tiny, recipe, 1, 1)[0].losses for recipe in (fewer_online, fewer_cached)]
    np.testing.assert_allclose(*results, rtol=2e-6)


def test_interrupted_writing_continues_and_damage_is_named(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    recipe = cache_of(teacher, folder, world=1)
    complete = {p.name: p.read_bytes() for p in folder.iterdir()}
    lost = sorted(folder.glob("*.idx"))[0]
    lost.unlink()  # killed between a block's two files
    (folder / f".{lost.name}.writing").write_bytes(b"half")
    assert len(TeacherCache(folder)) < STEPS * ROWS_A_STEP
    with pytest.raises(RankFailed, match="has no teacher logits for the row at position"):
        run_ranks(1, distill_tiny, recipe, 1, STEPS)
    run_ranks(1, write, recipe, 1, "float32", STEPS * ROWS_A_STEP)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")} == complete

    block = sorted(folder.glob("*.bin"))[0]
    raw = bytearray(block.read_bytes())
    raw[len(raw) // 2] ^= 4
    block.write_bytes(raw)
    batch = Rows().training_rows(np.arange(STEPS * ROWS_A_STEP))
    with pytest.raises(DataError, match="is damaged at byte"):
        TeacherCache(folder).read(batch, documents=False)
    block.write_bytes(raw[:-1])
    with pytest.raises(DataError, match="its index says"):
        TeacherCache(folder)
    index = sorted(folder.glob("*.idx"))[0]
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"\.idx is damaged"):
        TeacherCache(folder)


def test_a_cache_of_other_settings_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    recipe = cache_of(teacher, folder, world=1)
    assert read_request(folder).top_k == 12
    with pytest.raises(RankFailed, match="top_k: 12 there, 9 now"):
        run_ranks(1, write, replace(recipe, objective=replace(recipe.objective, top_k=9)), 1, "float32", 4)
    wrong = replace(
        recipe,
        objective=replace(recipe.objective, temperature=2.0, top_k=40),
        model=replace(recipe.model, vocab=512),
        data=replace(recipe.data, row_tokens=32),
    )
    with pytest.raises(RecipeError) as error:
        TeacherCache.open(wrong, tokenizer="f" * 16)
    for what in ("model.vocab=512", "objective.temperature=2.0", "data.row_tokens=32", "top_k=40", "tokenizer ffff"):
        assert what in str(error.value)
    other = save_teacher(tmp_path / "other", replace(TEACHER, run=replace(TEACHER.run, seed=78)))
    changed = replace(recipe, objective=replace(recipe.objective, teacher=str(other)))
    with pytest.raises(RankFailed, match=r"fingerprint: '[0-9a-f]*' there, '[0-9a-f]*' now"):
        run_ranks(1, write, changed, 1, "float32", 4)
    with pytest.raises(RankFailed, match="numbers: 'fp32' there, 'fp32, blockwise' now"):
        low = replace(recipe, objective=replace(recipe.objective, teacher_scaling="blockwise"))
        run_ranks(1, write, low, 1, "float32", 4)
    with pytest.raises(RecipeError, match=r"objective.teacher=.*other.*was written by .*Use objective.teacher=null"):
        TeacherCache.open(changed, tokenizer=None)
    TeacherCache.open(
        replace(recipe, objective=replace(recipe.objective, teacher=str(tmp_path / "gone"))), tokenizer=None
    )
    with pytest.raises(DataError, match="is not a teacher cache"):
        TeacherCache(tmp_path / "nothing")


def test_a_rows_key_is_its_content() -> None:
    batch = Rows().training_rows(np.array([0, 8, 1]))
    plain = batch_keys(batch, documents=False)
    assert plain[0] == plain[1] != plain[2]
    assert plain[0] != batch_keys(batch, documents=True)[0]


def test_fewer_tokens_join_the_rest(teacher: Path, tmp_path: Path) -> None:
    cache_of(teacher, tmp_path / "cache", world=1)
    cached = TeacherCache(tmp_path / "cache").read(Rows().training_rows(np.arange(2)), documents=False)
    smaller = reduce_to_k(cached, 3)
    whole = cached.log_p_NK.exp().sum(-1) + cached.rest_N
    torch.testing.assert_close(smaller.log_p_NK.exp().sum(-1) + smaller.rest_N, whole)
    torch.testing.assert_close(whole, torch.ones_like(whole))
