"""`python -m launch.local.rank MODULE words...`: the entry point of each process of a run; it runs `python -m MODULE words...`.

The module runs in this same process, so signals reach the trainer directly. This entry point adds: torchrun's variables and
gloo's interface, if Slurm's `srun` started the process; a stop if the launcher is killed; and a record of a failure, written at
once, so that the first of a thousand errors can be found.
"""

import contextlib
import fcntl
import os
import runpy
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType

from data.system.parent import end_with_parent
from launch.local.continuation import STOPPED
from launch.local.failures import RankFailure, note_stop, write_failure

LOGS = "STRATUM_LOGS"
"""Environment variable: folder of this attempt's logs and records."""
RANK_LOG = "STRATUM_RANK_LOG"
"""Environment variable: log for tracebacks instead of stderr, if the launcher shows this rank's output live."""
LAUNCHER = "STRATUM_LAUNCHER"
"""Environment variable: process id of the launcher; this process stops if the launcher dies."""
ALIVE = "alive"
"""File in an attempt's logs: a rank has started. Slurm scripts submit the next job only after that."""
_SIOCGIFADDR = 0x8915


def main() -> None:
    """Entry point of `python -m launch.local.rank`. Ends the process with the module's own exit status."""
    module, words = sys.argv[1], sys.argv[2:]
    started_by_srun = adopt_slurm(os.environ)
    _end_with_launcher()
    if started_by_srun:
        _prove_alive()
        name_interface(os.environ)
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        for late in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(late, signal.SIG_IGN)  # too late for a run that has ended; it must not change the exit status
        sys.exit(_orderly(status, started_by_srun))
    except KeyboardInterrupt:
        sys.exit(_orderly(128 + signal.SIGINT, started_by_srun))
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, _from_module(error.__traceback__)))
        _record(1, text)
        _say(text)
        os._exit(1)  # a normal exit would wait for threads and process groups that wait for lost peers


def adopt_slurm(environment: MutableMapping[str, str]) -> bool:
    """Set torchrun's variables from Slurm's, if `srun` started this process as one task for each rank. -> whether it did."""
    if "RANK" in environment or "SLURM_PROCID" not in environment or "MASTER_ADDR" not in environment:
        return False
    world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
    if nodes == 1:
        environment["MASTER_ADDR"] = "127.0.0.1"  # on one node, other machines need not reach the rendezvous
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(world)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(world // nodes)
    environment["GROUP_RANK"] = environment.get("SLURM_NODEID", "0")
    return True


def _prove_alive() -> None:
    with contextlib.suppress(OSError, KeyError):
        (Path(os.environ[LOGS]) / ALIVE).touch()


def name_interface(environment: MutableMapping[str, str]) -> None:
    """Make gloo use the interface that leads to rank 0, unless the environment names one. By default it uses the address of the
    host's name, which on many nodes is a loopback address. Linux and IPv4 only; otherwise nothing is set."""
    if "GLOO_SOCKET_IFNAME" in environment or sys.platform != "linux":
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", "1"))))  # UDP: this sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(reply[20:24]) == address:
                    environment["GLOO_SOCKET_IFNAME"] = name
                    return


def _end_with_launcher() -> None:
    """Make Linux send SIGTERM if the launcher dies: this process then saves and stops."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not end_with_parent():
        return
    if os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGTERM)  # it died before the call above


def _orderly(status: int, started_by_srun: bool) -> int:
    """Write the record of a failure that the program reported by its status. -> the status to end with.

    srun takes every status other than 0 for a failure, and then kills the other ranks at once. So under srun, a rank that saved
    and stopped after a signal records this in a file and ends with 0; otherwise it would kill ranks that are still saving.
    """
    if status in STOPPED:
        if started_by_srun:
            note_stop(Path(os.environ[LOGS]), status)
            return 0
    elif status:
        _record(status, "")
    return status


def _record(status: int, error: str) -> None:
    folder = os.environ.get(LOGS)
    if folder is not None:
        rank = int(os.environ.get("RANK", "0"))
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        write_failure(Path(folder), RankFailure(rank, status, time.time(), host, error))


def _say(text: str) -> None:
    path = os.environ.get(RANK_LOG)
    try:
        if path is None:
            sys.stderr.write(text)
            sys.stderr.flush()
        else:
            with open(path, "a") as stream:
                stream.write(text)
    except OSError:
        return  # the record has it too


def _from_module(trace: TracebackType | None) -> TracebackType | None:
    """The traceback, without the frames of this module and runpy."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        start = start.tb_next
    return start or trace


if __name__ == "__main__":
    main()
