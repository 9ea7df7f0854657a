"""`stratum launch slurm --host`: what reaches the login node through a real sshd, and the errors. Slurm is a stand-in `sbatch`
here; the last test submits to a real one."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_rig import slurm_rig, wait_for
from ssh_server import ALIAS, project_at, ssh_server
from texts import VOCAB, overrides_of, prepared_in, write_texts

from launch.runs import RunFolder
from launch.slurm.host import DEFAULT_FOLDER, Host, parse_host, remote_command
from launch.slurm.jobs import active_jobs
from recipes.schema.errors import RecipeError
from recipes.schema.run_folder import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[3]


def launch(*words: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`stratum launch slurm WORDS` on "this machine"."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "train.stratum", "launch", "slurm", *words], cwd=cwd, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=timeout_s, check=False,
    )  # fmt: skip


def test_hosts() -> None:
    assert parse_host("me@login") == Host("me@login", DEFAULT_FOLDER)
    assert parse_host("login:/scratch/my project") == Host("login", "/scratch/my project")
    assert parse_host("login:~/work") == Host("login", "work")
    for wrong in ("", "-oProxyCommand=x", "a b", "$(id)", ":/folder", "ssh://login:22", "login;id", "x\n"):
        with pytest.raises(RecipeError, match="HOST"):
            parse_host(wrong)


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "tcsh", "fish"])
def test_every_login_shell_reads_the_remote_command_alike(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    archive = tmp_path / "a.tgz"
    (tmp_path / "submit.sh").write_text("echo submitted; exit 7\n")
    subprocess.run(["tar", "-czf", str(archive), "-C", str(tmp_path), "submit.sh"], check=True)
    there = tmp_path / "there"
    done = subprocess.run(
        [shell, "-c", remote_command(str(there))], stdin=archive.open("rb"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, there.exists()) == (7, "submitted\n", False), done.stderr
    there.mkdir()  # another user's folder: nothing of it is run or removed
    (there / "submit.sh").write_text("echo foreign\n")
    done = subprocess.run(
        [shell, "-c", remote_command(str(there))], stdin=archive.open("rb"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, [one.name for one in there.iterdir()]) == (1, "", ["submit.sh"]), done.stderr
    assert (there / "submit.sh").read_text() == "echo foreign\n"


HOSTILE = 'it\'s a "run" $(id) `id` ; #1 !x'


def test_a_run_is_submitted_with_the_code_and_recipes_of_this_machine(tmp_path: Path) -> None:
    """Errors, a dry run and a submission through one sshd. No file stays behind in /tmp."""
    home, here = tmp_path / "home", tmp_path / "here"
    project = project_at(home / "my project")
    commands = tmp_path / "commands"
    (here / "mine").mkdir(parents=True)
    (here / "mine" / "own.yaml").write_text("defaults: [smoke, _self_]\noptim: {lr: 3.21e-3}\n")
    commands.mkdir()
    for name, text in {"sbatch": "echo 42", "squeue": "exit 0"}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    words = ["--config-dir=mine", "-cn", "own", f'run.name="{HOSTILE.replace(chr(34), "")}"', "run.steps=5"]
    server = tmp_path / "ssh"
    server.mkdir()
    (home / ".bash_profile").write_text(f"export PATH={commands}:$PATH\n")
    before = set(Path("/tmp").glob("stratum-*"))
    with ssh_server(server, home=home, environment={}):
        host = ("--host", f"{ALIAS}:my project")
        dry = launch(*words, *host, "--dry-run", cwd=here)
        assert dry.returncode == 0 and dry.stdout.startswith("#!/bin/bash"), dry
        assert f"--chdir={project}" in dry.stdout and not (project / "runs").exists(), "the folder on the host"
        done = launch(*words, *host, cwd=here)
        assert done.returncode == 0 and done.stdout.startswith("Submitted job 42"), done
        shown = done.stdout.splitlines()[-1].strip()
        assert shown.startswith(f"ssh -t {ALIAS} "), "the next commands, to copy"
        assert shlex.split(shlex.split(shlex.split(shown)[3])[2])[-3:-1] == ["stratum", "cancel"]
        (run,) = (project / "runs").iterdir()
        assert run.name == HOSTILE.replace('"', "")
        code = run / "logs" / "code"
        assert "3.21e-3" in (code / "config-0" / "own.yaml").read_text()
        assert (code / "launch/slurm/host.py").read_text() == (ROOT / "launch/slurm/host.py").read_text()
        job = (run / "logs" / "job.sh").read_text()
        assert str(project / ".venv/bin/python") in job or sys.executable in job
        assert "/tmp/stratum-" not in job
        mistake = launch("-cn", "smoke", "model.hiden=3", *host, cwd=here)
        assert mistake.returncode == 2 and "model.hidden" in mistake.stderr
        refused = launch("-cn", "smoke", "launch.slurm.time_limit_minutes=1", *host, cwd=here)
        assert refused.returncode == 2 and "save_before_end_s" in refused.stderr, "the rules run on the host"
        missing = launch("-cn", "smoke", "--host", f"{ALIAS}:nowhere", cwd=here)
        assert missing.returncode == 2 and "the folder nowhere cannot be used on login" in missing.stderr
        (server / "authorized_keys").write_text("")
        closed = launch("-cn", "smoke", *host, cwd=here)
        assert closed.returncode == 2 and "Permission denied" in closed.stderr
        assert f"`ssh {ALIAS} true` must work" in closed.stderr
    assert set(Path("/tmp").glob("stratum-*")) <= before


@pytest.mark.slurm
def test_a_run_submitted_over_ssh_trains_on_a_real_slurm(tmp_path: Path) -> None:
    home, server = tmp_path / "home", tmp_path / "ssh"
    server.mkdir()
    project = project_at(home / "stratum")
    config = prepared_in(write_texts(tmp_path))
    words = ["-cn", "smoke", *TINY, *overrides_of(config)]
    with slurm_rig(2):
        with ssh_server(
            server, home=home, environment={"SLURM_CONF": os.environ["SLURM_CONF"], "OMP_NUM_THREADS": "1"}
        ):
            done = launch(*words, "--host", ALIAS, cwd=tmp_path)
            assert done.returncode == 0, done
            run = RunFolder(project / "runs" / "far")
            wait_for(lambda: not active_jobs(run))
    losses = [line["loss"] for line in read_metrics(run.path / METRICS) if line["kind"] == "step"]
    assert len(losses) == 4, "\n".join(path.read_text() for path in run.logs.glob("slurm-*.log"))


TINY = [
    "model.pattern=M*-", "model.hidden=32", "model.ffn=64", "model.heads=2", "model.kv_heads=2", "model.head_dim=16",
    "model.mamba_heads=4", "model.mamba_head_dim=8", "model.mamba_state=8", f"model.vocab={VOCAB}", "model.mamba_chunk=8",
    "precision.scaling=none", "precision=fp32", "run.global_rows=4", "run.microbatch_rows=2", "run.threads=1", "run.steps=4",
    "schedule.warmup=2", "schedule.decay=1", "evaluate.every_steps=0", "evaluate.rows_per_source=2",
    "telemetry.log_every_steps=1", "telemetry.tensorboard=false", "run.name=far", "launch.nodes=2", "launch.processes=1",
]  # fmt: skip
