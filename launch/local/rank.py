"""`python -m launch.local.rank MODULE words...`: what each process of a run starts as; becomes `python -m MODULE words...`.

It runs in the process itself, so a signal sent to the process reaches the trainer and nothing else. It adds three things:
torchrun's variables, and gloo's interface, where Slurm's `srun` started the process; an end together with the launcher, should
that be killed; and a record of how the process failed, written at once, so that the first of a thousand errors can be found.
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
"""Variable: folder of this attempt's logs and records."""
RANK_LOG = "STRATUM_RANK_LOG"
"""Variable: log that tracebacks go to instead of stderr, where the launcher shows this rank's output live."""
LAUNCHER = "STRATUM_LAUNCHER"
"""Variable: process id of the launcher this process ends with."""
ALIVE = "alive"
"""File in an attempt's logs: a rank has started. Slurm scripts submit no further job before."""
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
            signal.signal(late, signal.SIG_IGN)  # meant for a run that still trains; it must not spoil the exit status
        sys.exit(_orderly(status, started_by_srun))
    except KeyboardInterrupt:
        sys.exit(_orderly(128 + signal.SIGINT, started_by_srun))
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, _from_module(error.__traceback__)))
        _record(1, text)
        _say(text)
        os._exit(1)  # threads and process groups that wait for lost peers would hold up a normal end


def adopt_slurm(environment: MutableMapping[str, str]) -> bool:
    """Set torchrun's variables from Slurm's, where `srun` started this process, one task a rank. -> whether it did."""
    if "RANK" in environment or "SLURM_PROCID" not in environment or "MASTER_ADDR" not in environment:
        return False
    world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
    if nodes == 1:
        environment["MASTER_ADDR"] = "127.0.0.1"  # the rendezvous is nobody else's then
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
    """Have gloo listen on the interface that leads to rank 0, unless the environment names one: by itself it takes the
    address of the host's name, which on many nodes is a loopback one. Linux and IPv4 only; else nothing is set."""
    if "GLOO_SOCKET_IFNAME" in environment or sys.platform != "linux":
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", "1"))))  # sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(reply[20:24]) == address:
                    environment["GLOO_SOCKET_IFNAME"] = name
                    return


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when the launcher dies, so that no process stays behind: it saves and stops."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not end_with_parent():
        return
    if os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGTERM)  # it died before we asked


def _orderly(status: int, started_by_srun: bool) -> int:
    """Leave the record of an end that the program chose itself. -> the status to end with.

    srun ends a step at once when a rank fails, but takes any status other than 0 for a failure: a rank that saved and
    stopped as a signal asked would cut off the others' end. There such a stop is noted in a file, and ends with 0.
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
        return  # it stands in the record


def _from_module(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this module and of runpy."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        start = start.tb_next
    return start or trace


if __name__ == "__main__":
    main()
