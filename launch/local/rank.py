"""`python -m launch.local.rank MODULE words...`: the entry point of each process of a run. It runs `python -m MODULE words...`.

The module runs in this same process, so signals reach the trainer directly. In addition, this entry point sets torchrun's
variables and gloo's interface if Slurm's `srun` started the process, stops the process if the launcher is killed, and writes a
record of a failure at once, so that the first of a thousand errors can be found.
"""

import contextlib
import faulthandler
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

from data.system.node import node_name
from data.system.parent import end_with_parent
from launch.local.continuation import STOPPED
from launch.local.failures import STACK_SIGNAL, RankFailure, record_stop, write_failure

LOGS = "STRATUM_LOGS"
"""Environment variable: folder of this attempt's logs and records."""
RANK_LOG = "STRATUM_RANK_LOG"
"""Environment variable: log for tracebacks instead of stderr, if the launcher shows this rank's output live."""
LAUNCHER = "STRATUM_LAUNCHER"
"""Environment variable: process id of the launcher; this process stops if the launcher dies."""
ALIVE = "alive"
"""File in an attempt's logs, written when a rank has started. Slurm scripts submit the next job only after that."""
_SIOCGIFADDR = 0x8915


def main() -> None:
    """Entry point of `python -m launch.local.rank`. Ends the process with the module's own exit status."""
    module, words = sys.argv[1], sys.argv[2:]
    # Slurm may send this warning while the module is still importing. Blocked, it waits until the trainer unblocks it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    started_by_srun = set_torchrun_variables(os.environ)
    _write_stacks_on_signal()
    _end_with_launcher()
    if started_by_srun:
        _mark_alive()
        set_gloo_interface(os.environ)
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        for late in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(late, signal.SIG_IGN)  # the run has ended: a late signal must not change its exit status
        sys.exit(_final_status(status, started_by_srun))
    except KeyboardInterrupt:
        sys.exit(_final_status(128 + signal.SIGINT, started_by_srun))
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, _from_module(error.__traceback__)))
        _record(1, text)
        _print_error(text)
        os._exit(1)  # a normal exit would hang: threads and process groups wait for peers that are gone


def _write_stacks_on_signal() -> None:
    """Make this process write its Python stacks into its log at STACK_SIGNAL, so that the launcher can show where it hangs."""
    log = sys.stderr.fileno()
    with contextlib.suppress(OSError, KeyError):
        log = os.open(os.environ[RANK_LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    faulthandler.register(STACK_SIGNAL, file=log, all_threads=True)


def set_torchrun_variables(environment: MutableMapping[str, str]) -> bool:
    """Set torchrun's variables from Slurm's, if `srun` started this process as one task for each rank. -> whether it did."""
    if "RANK" in environment or "SLURM_PROCID" not in environment or "MASTER_ADDR" not in environment:
        return False
    world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
    if nodes == 1:
        environment["MASTER_ADDR"] = "127.0.0.1"  # one node: the rendezvous need not be reachable from other machines
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(world)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(world // nodes)
    environment["GROUP_RANK"] = environment.get("SLURM_NODEID", "0")
    return True


def _mark_alive() -> None:
    with contextlib.suppress(OSError, KeyError):
        (Path(os.environ[LOGS]) / ALIVE).touch()


def set_gloo_interface(environment: MutableMapping[str, str]) -> None:
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
        sys.exit(128 + signal.SIGTERM)  # the launcher died before the call above


def _final_status(status: int, started_by_srun: bool) -> int:
    """Record a failure or a stop that the program reported by its exit status. -> the status to exit with.

    srun treats every status except 0 as a failure and kills the other ranks at once, also ranks that are still saving. So under
    srun, a rank that saved and stopped after a signal records this in a file and exits with 0.
    """
    if status in STOPPED:
        if started_by_srun:
            record_stop(Path(os.environ[LOGS]), status)
            return 0
    elif status:
        _record(status, "")
    return status


def _record(status: int, error: str) -> None:
    folder = os.environ.get(LOGS)
    if folder is not None:
        rank = int(os.environ.get("RANK", "0"))
        write_failure(Path(folder), RankFailure(rank, status, time.time(), node_name(), error))


def _print_error(text: str) -> None:
    path = os.environ.get(RANK_LOG)
    try:
        if path is None:
            sys.stderr.write(text)
            sys.stderr.flush()
        else:
            with open(path, "a") as stream:
                stream.write(text)
    except OSError:
        return  # the record contains it too


def _from_module(trace: TracebackType | None) -> TracebackType | None:
    """The traceback, without the frames of this module and runpy."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        start = start.tb_next
    return start or trace


if __name__ == "__main__":
    main()
