"""A rank that does not come to a collective operation is named, with the operation, after exactly launch.timeout_s."""

import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks

from launch.local.failures import RankFailure, tell
from recipes.schema.layout import Layout
from train.parallel.mesh import close_mesh, open_mesh
from train.resilience.hangs import MARK, hangs_named, record_operations

TIMEOUT_S = 2.5


def _hang(rank: int) -> tuple[float, list[str], set[timedelta]]:
    """Three ranks meet once; then rank 2 sleeps while the others wait for it."""
    record_operations()
    layout = Layout(world=3, tensor=1, pipeline=1, context=1, data=3, virtual=1, microbatches_per_step=1)
    mesh = open_mesh(layout, torch.device("cpu"), rank=rank, seed=1, timeout_s=TIMEOUT_S)
    timeouts = {
        group._get_backend(torch.device("cpu")).options._timeout for group in dist.distributed_c10d._world.pg_map
    }
    mesh.any_of(False)
    begun, notes = time.monotonic(), []
    try:
        with hangs_named(timeout_s=TIMEOUT_S):
            if rank == 2:
                time.sleep(TIMEOUT_S + 3.5)
            else:
                mesh.any_of(True)
    except RuntimeError as error:
        notes = list(getattr(error, "__notes__", []))
    spent = time.monotonic() - begun
    close_mesh()
    return spent, notes, timeouts


def test_a_hung_rank_is_named_after_exactly_the_timeout() -> None:
    results = run_ranks(3, _hang)
    for rank in (0, 1):
        spent, notes, timeouts = results[rank]
        assert TIMEOUT_S <= spent < TIMEOUT_S + 3.0, "seconds, not rounded up to a minute"
        assert timeouts == {timedelta(seconds=TIMEOUT_S)}
        (note,) = notes
        assert note.startswith(f"{MARK}ranks 0, 1 waited for all_reduce number ")
        assert "of the group of ranks 0, 1, 2 (launch.timeout_s=2.5); rank 2 did not arrive" in note


def test_the_launcher_says_first_who_did_not_arrive(tmp_path: Path) -> None:
    error = f"Traceback:\n  ...\nRuntimeError: Timed out waiting\n{MARK}ranks 0, 1 waited for x; rank 2 did not arrive"
    said = tell(tmp_path, [RankFailure(0, 1, 0.0, "n1", error), RankFailure(2, 137, 1.0)])
    assert said.startswith("ranks 0, 1 waited for x; rank 2 did not arrive. Rank 0 was the first to give up")
