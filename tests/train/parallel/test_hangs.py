"""A rank that does not enter a collective operation is named, with the operation, after exactly launch.timeout_s."""

import math
import os
import pickle
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, start_ranks

from launch.local.failures import RankFailure, failure_message, first_failure
from recipes.schema.layout import Layout
from train.parallel.mesh import close_mesh, open_mesh
from train.resilience.hangs import HANG, LOST, hangs_named, record_operations

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
        assert note.startswith(f"{HANG}ranks 0, 1 waited for all_reduce number ")
        assert "of the group of ranks 0, 1, 2 (launch.timeout_s=2.5); rank 2 did not arrive" in note


def test_the_launcher_says_first_who_did_not_arrive(tmp_path: Path) -> None:
    error = f"Traceback:\n  ...\nRuntimeError: Timed out waiting\n{HANG}ranks 0, 1 waited for x; rank 2 did not arrive"
    said = failure_message(tmp_path, [RankFailure(0, 1, 0.0, "n1", error), RankFailure(2, 137, 1.0)])
    assert said.startswith("ranks 0, 1 waited for x; rank 2 did not arrive. Rank 0 was the first to give up")


def _lose(rank: int, ready: Path) -> tuple[float, float, str]:
    """Rank 1 never enters the second operation; it is killed when rank 0 waits. -> (start, end of the wait, rank 0's note)"""
    record_operations()
    layout = Layout(world=2, tensor=1, pipeline=1, context=1, data=2, virtual=1, microbatches_per_step=1)
    mesh = open_mesh(layout, torch.device("cpu"), rank=rank, seed=1, timeout_s=600.0)
    mesh.any_of(False)
    if rank == 1:
        ready.touch()
        time.sleep(60)
    begun = time.time()
    try:
        with hangs_named(timeout_s=600.0):
            mesh.any_of(True)
    except RuntimeError as error:
        return begun, time.time(), "".join(getattr(error, "__notes__", []))
    return begun, math.inf, ""


def test_the_neighbour_of_a_killed_rank_has_not_waited_for_the_timeout(tmp_path: Path) -> None:
    """Its note names the lost rank, but no ten minutes of waiting are booked: the failure began when its connection closed."""
    children = {rank: pid for pid, rank in start_ranks(2, _lose, tmp_path / "ready", folder=tmp_path).items()}
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children[1], signal.SIGKILL)
    assert [os.waitstatus_to_exitcode(os.waitpid(children[rank], 0)[1]) for rank in (0, 1)] == [0, -signal.SIGKILL]
    begun, ended, note = pickle.loads((tmp_path / "0.pickle").read_bytes())[1]
    assert note.startswith(f"{LOST}rank 0 waited for all_reduce number ")
    assert "(until a connection was lost); rank 1 did not arrive and is in no operation" in note
    neighbour = RankFailure(0, 1, ended, error=f"RuntimeError: Connection closed by peer\n{note}")
    failed = first_failure([neighbour, RankFailure(1, 137, ended + 1)], timeout_s=600.0)
    assert failed == ended and failed > begun
    hung = RankFailure(0, 1, ended, error=f"RuntimeError: Timed out\n{HANG}rank 0 waited")
    assert first_failure([hung], timeout_s=600.0) == ended - 600


def _listeners(rank: int) -> list[str]:
    """Addresses on which rank 0's process listens while the world is open."""
    layout = Layout(world=2, tensor=1, pipeline=1, context=1, data=2, virtual=1, microbatches_per_step=1)
    mesh = open_mesh(layout, torch.device("cpu"), rank=rank, seed=1, timeout_s=60.0)
    own = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    found = []
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # 0A: listening
                found.append(fields[1].split(":")[0])
    mesh.barrier()
    close_mesh()
    return found


def test_the_rendezvous_of_local_ranks_listens_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = [address for addresses in run_ranks(2, _listeners) for address in addresses]
    assert found and set(found) <= {"0100007F", "00000000000000000000000001000000"}, (
        "127.0.0.1 and ::1, as the kernel writes them"
    )
