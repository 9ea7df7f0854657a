"""`stratum launch slurm --host USER@LOGIN[:FOLDER]`: submit from another machine, over one connection of ssh.

    packages, --config-dir folders --tar--> ssh --> login node: /tmp/stratum-XXXX/ --`stratum launch slurm` in FOLDER--> sbatch

The login node runs this machine's code with its own environment (FOLDER/.venv), and checks, writes and submits as if the command
had been typed there; the run's copy of the code (`launch.slurm.snapshot`) comes from here. The temporary folder is then removed.
ssh reads its own configuration and asks for passwords itself, on the terminal: none passes through this process. The remote
command contains no value of the user, and the words are in a script inside the archive, so no shell splits them.
"""

import io
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.children import FRONT, PYTHON_FLAGS
from launch.slurm.snapshot import CODE, take_snapshot, with_folder
from recipes.schema.errors import RecipeError

DEFAULT_FOLDER = "stratum"
"""Folder below the home folder of the host, if none is named."""
_SCRIPT = "submit.sh"
_NO_CONNECTION = 255
"""Exit status of ssh for its own errors."""


@dataclass(frozen=True)
class Host:
    """Where a run is submitted."""

    address: str
    """As for ssh: a name, an alias of ~/.ssh/config, or USER@NAME."""
    folder: str
    """Working directory of the command there; relative to the home folder unless it starts with `/`."""


def parse_host(text: str) -> Host:
    """USER@LOGIN[:FOLDER]. RecipeError for text that ssh would read as an option or that no host name can be."""
    address, _, folder = text.partition(":")
    if not re.fullmatch(r"(?!-)[^\s:'\"`$\\;&|<>()*?]+", address) or folder.startswith("//") or "\n" in folder:
        raise RecipeError(
            f"--host {text!r} is not [USER@]HOST[:FOLDER]. For another port, a key or an IPv6 address, give the host a name in "
            f"~/.ssh/config and use it: --host NAME."
        )
    return Host(address, folder.removeprefix("~/") or DEFAULT_FOLDER)


def submit_from(host: Host, words: Sequence[str], *, run: Path | None) -> int:
    """Run `stratum launch slurm WORDS` on a host. run: the run's folder there, for the hints; None prints none.

    -> its exit status. RecipeError if ssh is missing or cannot connect.
    """
    if shutil.which("ssh") is None:
        raise RecipeError("ssh is not installed here. Install OpenSSH's client, or run the command on the login node.")
    there = f"/tmp/stratum-{secrets.token_hex(8)}"
    try:
        status = subprocess.run(
            ["ssh", "-T", "--", host.address, remote_command(there)], input=archive(host, words, there), check=False
        ).returncode
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted. A job may have been submitted: ssh {host.address} squeue --me\n")
        raise
    if status == _NO_CONNECTION:
        raise RecipeError(
            f"ssh could not connect to {host.address}, or lost the connection; its message is above. "
            f"`ssh {shlex.quote(host.address)} true` must work; options such as a port, a key or a jump host belong into "
            f"~/.ssh/config. If the connection was lost, a job may have been submitted: look before you submit again."
        )
    if status == 0 and run is not None:
        shown = shlex.quote(str(run))
        sys.stdout.write(
            f"From here:\n  {hint(host, f'status {shown}')}\n  {hint(host, f'logs {shown} --follow')}\n"
            f"  {hint(host, f'cancel {shown}')}\n"
        )
    return status


def hint(host: Host, words: str) -> str:
    """A command line for this machine that runs `stratum WORDS` on the host."""
    there = f"cd {shlex.quote(host.folder)} && {{ [ ! -f .venv/bin/activate ] || . .venv/bin/activate; }} && stratum {words}"
    return f"ssh -t {shlex.quote(host.address)} {shlex.quote(f'bash -lc {shlex.quote(there)}')}"


def remote_command(there: str) -> str:
    """What sshd gives to the user's shell there: one quoted text for sh, which sh, csh and fish read alike."""
    trap = f'trap "rm -rf {there}" EXIT; trap "exit 1" HUP INT TERM'
    return f"exec sh -c 'mkdir -m 700 {there} || exit 1; {trap}; tar -xzf - -C {there} && bash -l {there}/{_SCRIPT} </dev/null'"


def archive(host: Host, words: Sequence[str], there: str) -> bytes:
    """A compressed tar archive with the code, the recipes of --config-dir, and the script that runs in `there` on the host."""
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as stream:
        copy = take_snapshot(Path(folder), words, with_environment=False)
        with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as tar:
            tar.add(copy.folder, arcname=CODE)
            text = script(host, with_folder(words, Path(there, CODE)), code=f"{there}/{CODE}").encode()
            entry = tarfile.TarInfo(_SCRIPT)
            entry.size, entry.mode = len(text), 0o600
            tar.addfile(entry, io.BytesIO(text))
        return stream.getvalue()


def script(host: Host, words: Sequence[str], *, code: str) -> str:
    """The script that a login shell runs on the host: its profile has set PATH, for sbatch, modules and Python."""
    folder, address = shlex.quote(host.folder), shlex.quote(host.address)
    return f"""\
cd -- "$HOME" && cd -- {folder} || {{
  printf 'error: the folder %s cannot be used on %s. Clone the project there and run `make setup` in it, or name another: ' \\
    {folder} {address} >&2
  printf -- '--host %s:FOLDER\\n' {address} >&2
  exit 2
}}
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
if ! "$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("hydra", "torch"))))' 2>/dev/null; then
  printf 'error: %s on %s has no .venv, and python3 there lacks torch or hydra-core. Run `make setup` in that folder.\\n' \\
    "$PWD" {address} >&2
  exit 2
fi
export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}
"$python" {" ".join(PYTHON_FLAGS)} -m {FRONT} launch slurm {shlex.join(words)}
"""
