"""A real sshd on loopback, and the `ssh` that reaches it by the alias `login`, started and stopped by the tests."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ALIAS = "login"


@contextmanager
def ssh_server(root: Path, *, home: Path, environment: dict[str, str]) -> Iterator[Path]:
    """While the context is open, `ssh login` runs commands as this user, with `home` as home folder.

    environment: variables of the sessions, which get none of this process's. PATH finds an `ssh` that adds `-F CONFIG` to the
    real one, because ssh finds the user's configuration by the account, not by $HOME. -> root.
    """
    missing = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None]
    if missing or not Path("/usr/sbin/sshd").exists():
        pytest.skip("no sshd here: apt-get install openssh-server")
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (root / "authorized_keys").write_text((root / "key.pub").read_text())
    variables = " ".join(f'"{name}={value}"' for name, value in {**environment, "HOME": str(home)}.items())
    (root / "sshd_config").write_text(f"""\
Port {port}
ListenAddress 127.0.0.1
HostKey {root}/host_key
AuthorizedKeysFile {root}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
SetEnv {variables}
""")
    (root / "config").write_text(f"""\
Host {ALIAS}
  HostName 127.0.0.1
  Port {port}
  IdentityFile {root}/key
  IdentitiesOnly yes
  StrictHostKeyChecking accept-new
  UserKnownHostsFile {root}/known_hosts
""")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd separates privileges in it
    bin_folder = root / "bin"
    bin_folder.mkdir()
    (bin_folder / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {shlex.quote(str(root / "config"))} "$@"\n'
    )
    (bin_folder / "ssh").chmod(0o755)
    with (root / "sshd.log").open("w") as log:
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(root / "sshd_config")], stderr=log)
    try:
        _wait_for_port(port, server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
            yield root
    finally:
        server.terminate()
        server.wait(timeout=20)


def project_at(folder: Path) -> Path:
    """A project on the "cluster": only an environment, which has the packages of this one. -> folder."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return folder


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"sshd does not listen on port {port}; status {server.poll()}")
