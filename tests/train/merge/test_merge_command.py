"""`stratum merge` as a user gives it: two models, an average, a sweep; the result trains on, generates and is exported."""

import json
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  here, so that the processes forked below need not import it
import pytest
from pruning_folder import lay_out, shell
from ranks import run_ranks
from task_files import CAPITALS, CHOICES, task_in

from data import prepare as _prepare  # noqa: F401
from recipes.schema.checkpoint_steps import checkpoint_at
from train import run as _assembly  # noqa: F401  likewise
from train.merge import run_merge as _merge  # noqa: F401


def run(folder: Path, *words: str, status: int = 0) -> str:
    """`stratum WORDS` in the folder. -> what it printed."""
    ((ended, text),) = run_ranks(1, shell, folder, list(words))
    assert ended == status, text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, a run `parent` with checkpoints of steps 1 to 3, and a run `other` with other weights."""
    root = tmp_path_factory.mktemp("merge")
    lay_out(root)
    keep = ["checkpoint.every_steps=1", "checkpoint.keep_last=5", "run.steps=3"]
    run(root, "prepare", "-cn", "little")
    run(root, "train", "-cn", "little", *keep)
    run(root, "merge", "parent", "--out", "runs/other", "--window", ":2", "--weights=-2,3")
    return root


def test_a_merge_generates_trains_on_and_is_exported(folder: Path) -> None:
    left = folder / "runs" / ".half.writing" / "checkpoints"  # what a killed merge left
    left.mkdir(parents=True)
    text = run(folder, "merge", "parent", "runs/other", "--out", "runs/half", "--alpha", "0.5")
    assert not left.parent.exists()
    assert "0.500000  runs/parent" in text and "wrote runs/half" in text and "step 0" in text
    assert "is not empty" in run(folder, "merge", "parent", "other", "--out", "runs/half", "--alpha", "1", status=2)
    assert run(folder, "generate", "half", "--prompt", "line", "--tokens", "4")
    assert "Finished at step 3" in run(folder, "train", "half")
    assert "wrote half_hf" in run(folder, "hf", "export", "half", "--out", "half_hf", "--no-check")
    assert checkpoint_at(folder / "runs" / "half")[1].lineage["made_by"] == "merge"


def test_an_average_of_a_run_continues_it(folder: Path) -> None:
    text = run(folder, "merge", "parent", "--out", "runs/mean", "--window", "1:", "--weights", "linear")
    assert "0.500000  runs/parent/checkpoints/step_00000001" in text and "step 3" in text
    text = run(folder, "train", "mean", "run.steps=4")
    assert "Finished at step 4" in text
    for window, weights, message in (
        ("3:", "equal", "has 1 checkpoint of runs/parent, and two are needed. Its checkpoints are of steps: 1, 2, 3."),
        ("1-3", "equal", "--window 1-3 is not FROM:TO"),
        (":", "0.5,0.5", "--weights has 2 numbers for 3 checkpoints, of steps 1, 2, 3."),
        (":", "0.5,0.5,0.5", "sum to 1.5. They must sum to 1."),
        (":", "nan,0.5,0.5", "sum to nan. They must sum to 1."),
        (":", "linaer", "use equal, linear, cosine, minus_sqrt, or numbers"),
    ):
        words = ["merge", "parent", "--out", "runs/no", "--window", window, "--weights", weights]
        assert message in run(folder, *words, status=2)
    assert not (folder / "runs" / "no").exists()


def test_a_sweep_takes_the_best_and_continues_after_a_kill(folder: Path) -> None:
    words = ["merge", "parent", "other", "--alpha", "0,0.5,1", "--evaluate", "heldout", "--rows", "2", "--out"]
    assert "best" in run(folder, *words, "runs/best")
    found = json.loads((folder / "runs" / "best" / "merge.json").read_text())
    scores = {one["alpha"]: one["score"] for one in found["candidates"]}
    assert found["best"] == min(scores, key=lambda alpha: scores[alpha]) and len(set(scores.values())) == 3
    lineage = checkpoint_at(folder / "runs" / "best")[1].lineage
    assert [one["weight"] for one in lineage["sources"]] == [1 - found["best"], found["best"]]

    left = folder / "runs" / ".again.merge.json"  # a score that a killed sweep stored is not computed again
    stored = [one | {"parts": {"python": 0.001}} for one in found["candidates"] if one["alpha"] == 0.5]
    left.write_text(json.dumps(found | {"candidates": stored}))
    assert "alpha 0.5:" not in run(folder, *words, "runs/again") and not left.exists()
    assert json.loads((folder / "runs" / "again" / "merge.json").read_text())["best"] == 0.5
    left.write_text(json.dumps(found | {"candidates": stored, "request": {}}))
    assert "alpha 0.5:" in run(folder, *words, "runs/another")
    assert not [path.name for path in (folder / "runs").iterdir() if "candidate" in path.name]


def test_a_sweep_by_tasks_takes_the_highest_mean(folder: Path) -> None:
    task = task_in(folder / "task", CAPITALS, **CHOICES)
    long = task_in(
        folder / "long", [{"text": "a text"}, {"text": "another"}], kind="rolling", prompt="{text}", name="texts"
    )
    words = ["merge", "parent", "other", "--alpha", "0.2,0.4", "--out", "runs/tasks", "--evaluate"]
    assert "texts gives bits per byte" in run(folder, *words, f"{task},{long}", status=2)
    assert "alpha 0.2:" in run(folder, *words, str(task))
    assert json.loads((folder / "runs" / "tasks" / "merge.json").read_text())["higher_is_better"] is True


def test_wrong_words_are_refused_before_anything_is_read(folder: Path) -> None:
    (folder / "runs" / "link").symlink_to("nowhere")
    for words, message in (
        ("parent runs/parent/checkpoints/step_00000003 --out runs/no --alpha 0.5", "have the same weights"),
        (
            "parent other --out runs/parent/checkpoints/step_00000009 --alpha 0.5",
            "parent/checkpoints, which has checkpoints",
        ),
        (
            "parent other --out runs/parent/checkpoints/step_00000003/no --alpha 0.5",
            "step_00000003, which has checkpoints",
        ),
        ("parent other --out prepared/no --alpha 0.5", "prepared, which has checkpoints or data"),
        ("parent other --out runs/link --alpha 0.5", "runs/link is a symbolic link"),
        ("parent other --out words.txt --alpha 0.5", "words.txt is a file"),
        ("parent other --out runs/no", "2 models take --alpha 0.5 and no other."),
        ("parent --out runs/no --alpha 0.5", "1 model takes --window FROM:TO, --ema or --adapters and no other."),
        ("parent --out runs/no --window : --ema", "1 model takes --window FROM:TO, --ema or --adapters and no other."),
        ("parent other --out runs/no --alpha 0.5 --ema", "2 models take --alpha 0.5 and no other."),
        ("parent --out runs/no --ema --evaluate heldout", "--evaluate chooses between values of --alpha."),
        ("parent --out runs/no --ema", "has no moving average of its weights (optimizer.ema.*). Train with"),
        ("parent other --out runs/no --alpha 0.5,0.6", "several values of --alpha and --evaluate go together"),
        ("parent other --out runs/no --alpha 1.5", "'1.5' is not a number from 0 to 1"),
        ("parent other --out runs/no --alpha nan", "'nan' is not a number from 0 to 1"),
        ("parent other --alpha 0.5", "--out is missing"),
        ("parent other --out . --alpha 0.5", "run.name='' is empty"),
        ("parent nobody --out runs/no --alpha 0.5", "nobody is neither a checkpoint"),
        ("parent other --out runs/no --alpha 0.2,0.2 --evaluate heldout", "has a value twice"),
        ("parent other --out runs/no --alpha 0.2,0.4 --evaluate nedle-1k", "needle-1k"),
    ):
        assert message in run(folder, "merge", *words.split(), status=2), words
