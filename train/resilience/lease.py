"""A trainer keeps the lease of its run folder (launch/lease.py) while it may write, so that two trainers never write at once."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.lease import FOLDER, HEARTBEAT_S, Lease, LeaseError, take

LOST = 2
"""Exit status if another process has taken over the run; launchers do not restart after it."""


@contextmanager
def run_lease(run: Path, *, rank: int, any_rank: Callable[[bool], bool]) -> Iterator[Callable[[], None]]:
    """Rank 0 keeps the run's lease while the context is open. Entering it is collective over the world, leaving it is not.
    any_rank: whether a flag is true on at least one rank (`Mesh.any_rank`).

    -> a function to call before a checkpoint is written. It ends this process if another one has taken over the run, which
    can happen only if this one was stopped, or could not reach the folder, for longer than launch.lease.EXPIRY_S. Raises
    LeaseError on every rank if another process trains in this folder.
    """
    lease, error = _try_to_take(run) if rank == 0 else (None, None)
    if any_rank(error is not None):
        raise error or LeaseError(f"rank 0 may not train in {run}; see its message.")
    if lease is None:
        yield lambda: None
        return
    ended = threading.Event()
    threading.Thread(target=_beat, args=(lease, run, ended), name="lease", daemon=True).start()
    try:
        yield lambda: _check(lease, run)
    finally:
        ended.set()
        lease.release()


def _try_to_take(run: Path) -> tuple[Lease | None, LeaseError | None]:
    try:
        return take(run / FOLDER, what=str(run)), None
    except LeaseError as error:
        return None, error
    except OSError as error:
        return None, LeaseError(f"{run} cannot be written: {error}. Make it writable, or set run.folder.")


def _beat(lease: Lease, run: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        _check(lease, run)


def _check(lease: Lease, run: Path) -> None:
    try:
        is_mine = lease.renew()
    except OSError as error:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} the lease of {run} cannot be renewed ({error}); trying again\n")
        return
    if not is_mine:
        sys.stderr.write(
            f"error: another process has taken over {run}, because this one did not renew its lease in time. This process "
            f"ends now and writes nothing more.\n"
        )
        sys.stderr.flush()
        os._exit(LOST)  # the new owner may be writing: exit without clean-up handlers, which could touch its files
