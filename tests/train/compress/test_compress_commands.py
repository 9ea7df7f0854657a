"""The commands one after the other on a few lines of text, as a user runs them: teacher, teacher cache, scores, search."""

import re
import shlex
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  here, so that the processes forked below need not import it
import pytest
from pruning_folder import lay_out, shell
from ranks import run_ranks

from data import prepare as _prepare  # noqa: F401
from train import run as _assembly  # noqa: F401  likewise
from train.compress import importance as _importance  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    lay_out(root)
    return root


@pytest.mark.slow
def test_from_a_teacher_to_the_best_of_a_search(folder: Path) -> None:
    def run(*words: str, status: int = 0) -> str:
        ((ended, text),) = run_ranks(1, shell, folder, list(words))
        assert ended == status, text
        return text

    run("prepare", "-cn", "little")
    run("train", "-cn", "little")
    answers = [
        "objective=distill",
        "objective.teacher=runs/parent",
        "objective.teacher_cache=answers",
        "objective.top_k=8",
    ]
    assert "4 rows added, 0 were there before; top 8 tokens" in run("teacher-cache", "-cn", "little", *answers)
    assert "Finished at step 2" in run("train", "-cn", "little", *answers, "run.name=from_answers")
    table = run("teacher-cache", "-cn", "little", *answers, "--student", "runs/from_answers", "--block-rows", "2")
    assert "0 rows added, 4 were there before" in table and "divergence" in table

    hunt = ["-cn", "little", "run.name=hunt"]
    depth = ["compress.layers=3", "compress.attention_layers=1"]
    first = run("compress", "score", *hunt, *depth)
    assert "least block influence first" in first and re.search(r"removed 1 of 1: layer \d \(", first)
    assert {path.name for path in (folder / "cut/hunt").glob("*.png")} == {"widths.png", "layers.png"}
    assert "already has these scores" in run("compress", "score", *hunt, *depth)
    assert "widths over 3 rows" in run("compress", "score", *hunt, *depth, "compress.calibration_rows=3")
    refused = run("compress", "search", *hunt, "compress.budget_parameters=100", status=2)
    assert "no shape fits the budget" in refused and "compress.budget_parameters=100" in refused
    found = run(
        "compress",
        "search",
        *hunt,
        "compress.search_layers=[3,4]",
        "compress.search_ffn=32:64:32",
        "compress.candidates=2",
    )
    assert "4 shapes tried, 4 within the budget" in found
    assert "was not trained yet" in run("compress", "pick", *hunt, status=2)
    commands = re.findall(r"stratum train (.*)", found)
    assert len(commands) == 2
    for words in commands:
        assert "latest is missing" not in run("train", *shlex.split(words), "run.steps=1")
    uneven = run("train", *shlex.split(commands[0]), "run.steps=2")
    assert "Finished at step 2" in uneven
    assert "trained to different steps (hunt_1: step 2, hunt_2: step 1)" in run("compress", "pick", *hunt, status=2)
    run("train", *shlex.split(commands[1]), "run.steps=2")
    assert re.search(r"Best: hunt_[12]$", run("compress", "pick", *hunt).strip())
    shown = run("stages", "-cn", "little", "run.threads=1", "compress.layers=4")
    refused = run("stages", "-cn", "little", "run.name=mine", status=2)
    assert "run.name must not be given on the command line, because the stages set it" in refused
    assert "# once more\nstratum compress score" in shown and shown.count("compress.layers=") == 1, shown
