"""Every benchmark still starts and ends, at its smallest size. Forked from this process: a benchmark costs no imports.

Figures are not looked at. `make check` also checks the types of `tests/bench`, of those too that take minutes at any size.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
from ranks import IN_EVERY_RANK

from tests.bench import quick
from train.checkpoint import saving

ROOT = Path(__file__).resolve().parents[1]


def run_bench(words: list[str], output: Path) -> tuple[int, str]:
    """`python -m WORDS` in a forked process. -> its exit status and output."""
    for module in IN_EVERY_RANK:
        importlib.import_module(module)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = list(words)
            os.chdir(ROOT)
            sys.path.insert(0, str(ROOT))
            try:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    sys.stderr.write(end.code)
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, output.read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("tests.bench --part smoke --rounds 2 --block 1 --rows 1 --threads 1", "whole loop over the bare step, CPU time"),
        ("tests.bench.align --rounds 2 --block 1 --rows 1 --threads 1", "| DPO / SFT, time of a step |"),
        ("tests.bench.checkpoint --hidden 64 --rounds 0 --folder {folder}", "saves longer by fingerprints"),
        ("tests.bench.conversion smoke {folder}/conversion", "| import |"),
        ("tests.bench.distill --rounds 1 --threads 1", "distillation step"),
        ("tests.bench.inference --part context --families mamba --contexts 64 --hidden 128", "| mamba | 64 |"),
        ("tests.bench.moe --hidden 64 --ffn 32 --experts 4 --tokens 64 --rounds 1", "| expert layer |"),
        ("tests.bench.model --part mamba --lengths 16 --rounds 1 --threads 1", "| 128 x 16 |"),
        ("tests.bench.resilience --part copies --rounds 1 --rows 1 --folder {folder}", "| return from memory |"),
        ("tests.bench.speculation --part rollback --rounds 1 --hidden 128", "| 128 |"),
        ("tests.bench.precision --rounds 1 --threads 1", "| nvfp4 |"),
    ],
)  # fmt: skip
def test_a_benchmark_runs_to_its_end(words: str, line: str, tmp_path: Path) -> None:
    status, output = run_bench(words.format(folder=tmp_path).split(), tmp_path / "output")
    assert status == 0 and line in output, output


def test_a_ratio_below_its_baseline_fails_after_repeats(tmp_path: Path) -> None:
    """Real measurements of the smallest measure; only the stored ratios are made up."""
    stored, name = tmp_path / "baselines.json", "experts: forward and backward"
    words = f"tests.bench.quick --only experts --baselines {stored}".split()
    status, output = run_bench(words, tmp_path / "none")
    assert status == 0 and "No baselines for this kind of machine" in output, output
    stored.write_text(json.dumps({quick.machine_kind(): {name: 0.01, "rows: plain": 100.0}}))
    status, output = run_bench(words, tmp_path / "slow")
    assert status == 0 and "| 0.01 | 1 |" in output, output
    stored.write_text(json.dumps({quick.machine_kind(): {name: 100.0}}))
    status, output = run_bench(words, tmp_path / "fast")
    assert status == 1 and f"| 100.00 | {quick.TRIES} |" in output and f"SLOWER: {name}" in output, output


def test_a_drop_is_ten_percent_and_a_ratio_that_is_gone_counts() -> None:
    baselines = {"a": 2.0, "b": 1.0, "c": 0.5}
    assert quick.below({"a": 1.81, "b": 0.91, "c": 0.46}, baselines) == []
    assert quick.below({"a": 1.79, "b": 0.91}, baselines) == ["a", "c"]


def test_stored_ratios_replace_those_of_their_measure(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps({quick.machine_kind(): {"experts: renamed": 1.0, "rows: plain": 2.0}}))
    with mock.patch.object(quick, "ratios_of", return_value={"experts: new": 3.0}):
        quick.store(["experts"], path)
    assert json.loads(path.read_text()) == {quick.machine_kind(): {"experts: new": 3.0, "rows: plain": 2.0}}


def test_a_save_that_fails_in_a_benchmark_shows_its_error(tmp_path: Path) -> None:
    words = f"tests.bench.checkpoint --hidden 64 --rounds 0 --folder {tmp_path}".split()
    with mock.patch.object(saving, "write_verified", side_effect=OSError(28, "No space left on device")):
        status, output = run_bench(words, tmp_path / "output")
    assert status == 1 and "cannot be written: No space left on device" in output, output
