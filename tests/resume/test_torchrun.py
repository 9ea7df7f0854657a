"""torchrun starts the trainer too: four processes of its own train as one does."""

from pathlib import Path

import pytest
from processes import RUN, finish, fork, losses, start


def test_torchrun_on_four_ranks_trains_the_same(words: list[str], tmp_path: Path) -> None:
    short = (*RUN, "run.steps=8", "schedule.warmup=2", "checkpoint.every_steps=4")
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "model.mamba_groups=2")
    finish(fork(words, "one", extra=(*short, "model.mamba_groups=2")))
    finish(start(words, "four", ranks=4, extra=(*short, *layout)))
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert sorted(four) == list(range(1, 9))
    assert [four[s] for s in sorted(four)] == pytest.approx([one[s] for s in sorted(one)], rel=2e-6)
