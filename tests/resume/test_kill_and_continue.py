"""Real processes, real signals: a run that is killed or interrupted and started again ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from texts import VOCAB, config_of

from data.command import RECIPES
from data.config import DataConfig
from data.prepare import prepare
from train.metrics import METRICS, read_metrics

STEPS = 24
SHAPE = [
    "model.pattern=M*-", "model.hidden=32", "model.ffn=64", "model.heads=2", "model.kv_heads=2", "model.head_dim=16",
    "model.mamba_heads=4", "model.mamba_head_dim=8", "model.mamba_state=8", f"model.vocab={VOCAB}", "model.mamba_chunk=8",
]  # fmt: skip
RUN = [
    f"run.steps={STEPS}", "run.global_rows=4", "run.microbatch_rows=2", "run.threads=1", "schedule.warmup=2",
    "schedule.decay=4", "checkpoint.every_steps=6", "evaluate.every_steps=0", "evaluate.rows_per_source=2",
    "telemetry.log_every_steps=1", "telemetry.tensorboard=false",
]  # fmt: skip


@pytest.fixture
def words(prepared: DataConfig, tmp_path: Path) -> list[str]:
    """Overrides that make the smoke recipe tiny, over this test's own data."""
    sources = [f"~data.sources.{name}" for name in ("shakespeare", "python")]
    for name, source in prepared.sources.items():
        fields = {"path": source.path, "weight": source.weight, "text_field": source.text_field}
        sources += [f"+data.sources.{name}.{key}={value}" for key, value in fields.items()]
    data = [
        f"data.folder={prepared.folder}", f"data.tokenizer.vocab_size={VOCAB}", f"data.row_tokens={prepared.row_tokens}",
        f"data.heldout_fraction={prepared.heldout_fraction}",
    ]  # fmt: skip
    return ["-cn", "smoke", *SHAPE, *RUN, *sources, *data, f"run.folder={tmp_path}"]


@pytest.fixture
def prepared(texts: Path) -> DataConfig:
    config = config_of(texts)
    prepare(config, console=Console(quiet=True))
    return config


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "verse").mkdir(parents=True)
    for index in range(12):
        lines = [f"line {index} {n}: the quick brown fox über {n * index} naïve dogs\n" for n in range(20)]
        (folder / "verse" / f"{index:02d}.txt").write_text("".join(lines))
    records = [json.dumps({"content": f"def f{n}(x):\n    return x + {n}\n"}) + "\n" for n in range(180)]
    (folder / "code.jsonl").write_text("".join(records))
    return folder


def start(words: list[str], name: str, *, ranks: int = 1, extra: tuple[str, ...] = ()) -> subprocess.Popen:
    launcher = ["-m", "train"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "train"]
    return subprocess.Popen(
        [sys.executable, *launcher, *words, f"run.name={name}", *extra],
        cwd=RECIPES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(folder: Path) -> dict[int, float]:
    """The last loss of each step."""
    return {line["step"]: line["loss"] for line in read_metrics(folder / METRICS) if line["kind"] == "step"}


def saves(folder: Path) -> list[int]:
    """Steps whose checkpoint became durable."""
    return [line["step"] for line in read_metrics(folder / METRICS) if line["kind"] == "save"]


def wait_for_step(folder: Path, step: int, child: subprocess.Popen, *, saved: bool = False) -> None:
    """Until this step is done (and, with `saved`, any checkpoint durable)."""
    deadline = time.monotonic() + 90
    while not ((folder / METRICS).exists() and max(losses(folder), default=0) >= step and (not saved or saves(folder))):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, "training does not get on"
        time.sleep(0.01)


def finish(child: subprocess.Popen, status: int = 0) -> str:
    output, _ = child.communicate(timeout=120)
    assert child.returncode == status, output
    return output


def test_killed_and_interrupted_runs_end_as_the_undisturbed_one(words: list[str], tmp_path: Path) -> None:
    finish(start(words, "whole"))
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, STEPS + 1))

    child = start(words, "killed")
    wait_for_step(tmp_path / "killed", 8, child, saved=True)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()

    child = start(words, "killed")
    wait_for_step(tmp_path / "killed", 14, child)
    child.send_signal(signal.SIGINT)  # Ctrl-C: save at the step's end, say how to go on
    output = finish(child, status=128 + signal.SIGINT)
    assert "The same command continues from there" in output

    finish(start(words, "killed"))
    assert losses(tmp_path / "killed") == whole
    lines = read_metrics(tmp_path / "killed" / METRICS)
    resumed = [line["step"] for line in lines if line["kind"] == "resume"]
    assert len(resumed) == 2 and set(resumed) <= set(saves(tmp_path / "killed")), resumed
    final = [line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"][-1]
    assert (
        final
        == [
            line["bits_per_byte"] for line in read_metrics(tmp_path / "whole" / METRICS) if line["kind"] == "evaluation"
        ][-1]
    )

    too_small = finish(start(words, "other", extra=("model.vocab=256",)), status=2)
    assert f"vocabulary {VOCAB}), but model.vocab=256. Set model.vocab={VOCAB}" in too_small
    assert not (tmp_path / "other").exists()

    refused = finish(start(words, "killed", extra=("optim.lr=1",)), status=2)
    assert "optim.lr: 0.003 in the run's folder, 1.0 now" in refused


def test_torchrun_on_four_ranks_trains_the_same(words: list[str], tmp_path: Path) -> None:
    short = (*RUN, "run.steps=8", "schedule.warmup=2", "checkpoint.every_steps=4")
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "model.mamba_groups=2")
    finish(start(words, "one", extra=(*short, "model.mamba_groups=2")))
    finish(start(words, "four", ranks=4, extra=(*short, *layout)))
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert sorted(four) == list(range(1, 9))
    assert [four[s] for s in sorted(four)] == pytest.approx([one[s] for s in sorted(one)], rel=2e-6)
