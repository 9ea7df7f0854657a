"""Ports for worlds on one machine: no two worlds share one."""

import os
import signal
import socket
from contextlib import ExitStack

import pytest

from launch.local import ports
from launch.local.ports import reserved_port


def test_every_world_has_its_own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "PORTS", range(32000, 32008))
    with ExitStack() as worlds:
        taken = {worlds.enter_context(reserved_port()) for _ in range(3)}
        assert len(taken) == 3
        with pytest.raises(OSError, match="no free port from 32000 to 32007"):
            for _ in range(6):
                worlds.enter_context(reserved_port())


def test_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved_port() as port:
        pass
    monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(OSError, match="no free port"), reserved_port():
            pass
    with reserved_port() as again:
        assert again == port


def test_ranks_keep_the_port_their_parent_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved_port() as port:
        rank = os.fork()
        if rank == 0:
            signal.pause()
    monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
    try:
        with pytest.raises(OSError, match="no free port"), reserved_port():
            pass
    finally:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    with pytest.raises(FileNotFoundError, match="of the caller"), reserved_port():
        raise FileNotFoundError("an error of the caller is the caller's")
