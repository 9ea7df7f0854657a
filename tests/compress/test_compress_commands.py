"""The commands as a user gives them, one after the other, on a few lines of text: teacher, kept answers, scores, search."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot  # noqa: F401  here, so that the processes forked below need not import it
import pytest
from ranks import run_ranks

from data import prepare
from train import __main__ as training
from train import run as _assembly  # noqa: F401  likewise
from train import teacher_cache
from train.compress import __main__ as compress
from train.compress import importance as _importance  # noqa: F401

MODEL = """
{pattern: M-*-, hidden: 32, vocab: 320, ffn: 64, heads: 4, kv_heads: 2, head_dim: 8, mamba_heads: 4, mamba_groups: 2,
 mamba_head_dim: 8, mamba_state: 8, mamba_chunk: 8}
"""
RECIPE = """
defaults: [model: little, data: little, parallel: single, precision: fp32, objective: next_token, optim: adamw,
           schedule: constant, checkpoint: standard, evaluate: standard, telemetry: standard, launch: standard,
           compress: standard, _self_]
run: {name: parent, steps: 2, folder: runs, seed: 1, global_rows: 2, microbatch_rows: 2, deterministic: true, device: cpu,
      threads: 1, stop_after_steps: null, start_from: null}
data: {folder: prepared, sources: {python: {path: words.txt, weight: 1.0}}, tokenizer: {vocab_size: 320}, row_tokens: 16,
       workers: 1, heldout_fraction: 0.2}
schedule: {warmup: 0}
evaluate: {rows_per_source: 2, every_steps: 1}
telemetry: {tensorboard: false}
compress: {parent: runs/parent, folder: cut, calibration_rows: 4, depth_rows: 2}
stages: {once more: "compress score run.name=hunt compress.layers=3 compress.attention_layers=1"}
"""


def shell(rank: int, folder: Path, program: ModuleType, words: list[str]) -> tuple[int, str]:
    """For `run_ranks`: a command in a process and folder of its own. -> (exit status, what it printed)."""
    import os

    os.chdir(folder)
    sys.argv = ["command", *words, *([] if "--config-dir" in " ".join(words) else ["--config-dir", "recipes"])]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = program.main()
    return status, out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    (root / "recipes").mkdir()
    (root / "recipes" / "little.yaml").write_text("# @package _global_\n" + RECIPE)
    for group, text in (("model", MODEL), ("data", "defaults: [reading, _self_]\nseed: 1234\n")):
        (root / "recipes" / group).mkdir()
        (root / "recipes" / group / "little.yaml").write_text(text)
    (root / "words.txt").write_text("\n\n".join(f"line {n} of {n * n} words, {n % 7} again" for n in range(400)))
    return root


def test_from_a_teacher_to_the_best_of_a_search(folder: Path) -> None:
    def run(program: ModuleType, *words: str, status: int = 0) -> str:
        ((ended, text),) = run_ranks(1, shell, folder, program, list(words))
        assert ended == status, text
        return text

    run(prepare, "-cn", "little")
    run(training, "-cn", "little")
    answers = [
        "objective=distill",
        "objective.teacher=runs/parent",
        "objective.teacher_cache=answers",
        "objective.top_k=8",
    ]
    assert "4 rows answered now, 0 before; 8 tokens" in run(teacher_cache, "-cn", "little", *answers)
    assert "Finished at step 2" in run(training, "-cn", "little", *answers, "run.name=from_answers")
    table = run(teacher_cache, "-cn", "little", *answers, "+cache.student=runs/from_answers", "+cache.block_rows=2")
    assert "0 rows answered now, 4 before" in table and "divergence" in table

    hunt = ["-cn", "little", "run.name=hunt"]
    depth = ["compress.layers=3", "compress.attention_layers=1"]
    first = run(compress, "score", *hunt, *depth)
    assert "least block influence first" in first and re.search(r"removed 1 of 1: layer \d \(", first)
    assert {path.name for path in (folder / "cut/hunt").glob("*.png")} == {"widths.png", "layers.png"}
    assert "holds these scores" in run(compress, "score", *hunt, *depth)
    assert "widths over 3 rows" in run(compress, "score", *hunt, *depth, "compress.calibration_rows=3")
    refused = run(compress, "search", *hunt, "compress.budget_parameters=100", status=2)
    assert "no shape fits the budget" in refused and "compress.budget_parameters=100" in refused
    found = run(
        compress,
        "search",
        *hunt,
        "compress.search_layers=[3,4]",
        "compress.search_ffn=32:64:32",
        "compress.candidates=2",
    )
    assert "4 shapes tried, 4 within the budget" in found
    assert "was not trained yet" in run(compress, "pick", *hunt, status=2)
    commands = re.findall(r"python -m train (.*)", found)
    assert len(commands) == 2
    for words in commands:
        assert "latest is missing" not in run(training, *shlex.split(words), "run.steps=1")
    assert re.search(r"Best: hunt_[12]$", run(compress, "pick", *hunt).strip())
    shown = run(compress, "stages", "-cn", "little", "run.threads=1", "compress.layers=4")
    assert "# once more\npython -m train.compress score" in shown and shown.count("compress.layers=") == 1, shown
