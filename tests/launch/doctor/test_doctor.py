"""`stratum doctor` as a user runs it: with nothing installed, in the project's environment, on simulated GPU machines.

The output of nvidia-smi and the kernel follows their documentation; no such machine was available.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.doctor.command import colored, look, report
from launch.doctor.deep import deep
from launch.doctor.gpu import ON_GPU, visible_gpus
from launch.doctor.machine import Finding, Machine

ROOT = Path(__file__).resolve().parents[3]
BELOW = ("data/__init__.py", "data/system/__init__.py", "data/system/node.py")
"""What doctor imports of the rooms below it."""
TOPOLOGY = """        GPU0    GPU1    NIC0    CPU Affinity
GPU0     X      NV18    PIX     0-51
GPU1    NV18     X      PIX     0-51
NIC0    PIX     PIX      X
"""


def doctor(*words: str, cwd: Path = ROOT, flags: tuple[str, ...] = ("-S", "-E")) -> subprocess.CompletedProcess[str]:
    """The command in a Python that sees only the standard library (-S: no site-packages)."""
    command = [sys.executable, *flags, "-m", "launch.doctor", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def bare_copy(folder: Path) -> Path:
    """The project as it is just after `git clone`: no environment."""
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "recipes/__init__.py",
        "recipes/schema/__init__.py",
        "recipes/schema/units.py",
        "recipes/schema/terminal.py",
        *BELOW,
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_with_nothing_installed_it_says_what_to_do(tmp_path: Path) -> None:
    result = doctor(cwd=bare_copy(tmp_path))
    assert result.returncode == 1 and not result.stderr
    assert "wrong   torch" in result.stdout and "-> run `make setup`" in result.stdout
    assert "ok      Python" in result.stdout and "wrong." in result.stdout


def test_older_pythons_can_read_it() -> None:
    """With Python 3.8 there must be a message, not a syntax error."""
    import ast

    for name in (
        "doctor/command.py",
        "doctor/deep.py",
        "doctor/gpu.py",
        "doctor/machine.py",
        "doctor/__init__.py",
        "doctor/__main__.py",
        "__init__.py",
    ):
        ast.parse((ROOT / "launch" / name).read_text(), feature_version=(3, 8))


def test_in_the_projects_environment_nothing_is_wrong() -> None:
    result = doctor("--json", flags=())
    found = json.loads(result.stdout)
    assert found["ready"] and result.returncode == 0, found
    by_name = {one["what"]: one for one in found["findings"]}
    for name in ("torch", "megatron-core", "hydra-core", "datasets", "wandb"):
        assert by_name[name]["state"] == "ok"
    assert by_name["disk"]["found"].endswith("GB free for runs")


def test_on_a_cpu_machine_nothing_is_required_that_only_gpus_or_other_systems_need() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has NVIDIA's driver")
    found = json.loads(doctor("--json", flags=()).stdout)["findings"]
    for one in found:
        if one["what"] in ON_GPU:
            assert one["state"] == "ok" or one["remedy"].startswith("nothing to do here: only GPUs use it"), one
        assert "tzdata" not in one["found"] or sys.platform == "win32", one


def test_deep_checks_on_this_machine(tmp_path: Path) -> None:
    """Two processes over gloo: right numbers, the bytes of the disk, the sum, the clock; nothing is left in the folder.

    The budget is long, because this machine may be shared.
    """
    found = {one.what: one for one in deep(Machine(), folder=tmp_path, budget_s=300)}
    assert list(found) == ["products", "memory", "disk", "all-reduce", "clock"]
    assert [one.state for one in found.values()] == ["ok"] * 5, found
    assert not list(tmp_path.iterdir())


def test_deep_checks_that_hang_or_cannot_start_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (late,) = deep(Machine(), folder=tmp_path, budget_s=0.2)
    assert (late.state, late.found) == ("wrong", "no end after 0.2 s")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "train" / "__init__.py").write_text("import torch_that_is_not_installed\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    (bare,) = deep(Machine(), folder=tmp_path)
    assert bare.found.endswith("status 1: ModuleNotFoundError: No module named 'torch_that_is_not_installed'")
    assert bare.state == "wrong" and "make setup" in bare.remedy
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1':\n    print('CUDA error: lost', file=sys.stderr)\n    os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "second"))
    (lost,) = deep(Machine(), folder=tmp_path)
    assert lost.found == "device 1, status 7: CUDA error: lost", "not that rank 0 waited for it"


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("", 0), ("1", 1), ("0,1", 2), ("-1", 0)])
def test_only_gpus_that_processes_can_use_are_counted(
    gpu_machine: Machine, visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus(gpu_machine) == count


def test_make_help_lists_every_command() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    targets = {line.split(":")[0] for line in lines if "## " in line and line[:1].isalpha() and ":" in line}
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("  make ")}
    assert listed == targets and "bench-fp8" in listed


def test_a_machine_for_gpus_needs_them() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has NVIDIA's driver")
    result = doctor("--gpu", flags=())
    assert result.returncode == 1 and "wrong   GPUs" in result.stdout and "wrong   mamba-ssm" in result.stdout


@pytest.fixture
def gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two H100s with NVLink and two RDMA ports, one of them down."""
    tools, root = tmp_path / "bin", tmp_path / "root"
    tools.mkdir()
    (tmp_path / "topology").write_text(TOPOLOGY)
    smi(tools, ["NVIDIA H100 80GB HBM3, 81559, 580.95.05, 9.0, 0, Disabled"] * 2)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for port, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        folder = root / f"sys/class/infiniband/{port}/ports/1"
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
        (folder / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:       2113548296 kB\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory.max").write_text("1099511627776\n")
    return Machine(root)


def smi(tools: Path, rows: list[str]) -> None:
    """An nvidia-smi that answers doctor's three queries."""
    lines = "\n".join(rows)
    drivers = "\n".join(row.split(", ")[2] for row in rows)
    program = tools / "nvidia-smi"
    program.write_text(
        f"#!/bin/bash\ncase $1 in\n*query-gpu=name*) cat <<'E'\n{lines}\nE\n;;\n*query-gpu=driver*) cat <<'E'\n{drivers}\nE\n;;\n"
        f"topo) cat {tools.parent / 'topology'};;\n*) exit 1;;\nesac\n"
    )
    program.chmod(0o755)


def findings(machine: Machine, folder: Path) -> dict[str, Finding]:
    found = look(machine, folder=folder)
    assert colored(report(found)).count("\033[0m") == len(found)
    return {one.what: one for one in found}


def test_a_gpu_node(gpu_machine: Machine, tmp_path: Path) -> None:
    found = findings(gpu_machine, tmp_path)
    assert found["GPUs"] == Finding("GPU", "GPUs", "ok", "2 x NVIDIA H100 80GB HBM3 (79.6 GiB)")
    assert (found["low precision"].state, found["low precision"].found) == ("ok", "FP8 (compute capability 9)")
    assert found["driver"].state == "ok" and "580.95.05" in found["driver"].found
    assert found["NVLink"].found == "18 links a pair"
    assert "mlx5_0:1 at 400 Gb/sec; down: mlx5_1:1" in found["RDMA ports"].found and found["RDMA ports"].remedy
    assert found["GPUDirect RDMA"].state == "absent" and "nvidia_peermem" in found["GPUDirect RDMA"].remedy
    assert found["memory"].found == "1,024 GiB", "the control group's, not the machine's"


@pytest.mark.parametrize(
    ("rows", "what", "state", "words"),
    [
        (["NVIDIA H100 80GB HBM3, 81559, 535.161.08, 9.0, 0, Disabled"], "driver", "wrong", "580"),
        (["NVIDIA A100-SXM4-80GB, 81920, 580.65.06, 8.0, 0, Disabled"], "low precision", "absent", "precision=bf16"),
        (["NVIDIA B200, 183359, 580.65.06, 10.0, 0, Disabled"], "low precision", "ok", "NVFP4"),
        ([f"NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0, {errors}, Disabled" for errors in (0, 7)],
         "memory errors", "wrong", "GPU 1"),
        (["NVIDIA L4, 23034, 580.65.06, 8.9, 0, Disabled", "NVIDIA A10G, 23028, 580.65.06, 8.6, [N/A], [N/A]"],
         "GPUs", "absent", "CUDA_VISIBLE_DEVICES"),
        (["NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0, 0, Enabled"], "MIG", "absent", "MIG"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_gpus(
    rows: list[str], what: str, state: str, words: str, gpu_machine: Machine, tmp_path: Path
) -> None:
    smi(tmp_path / "bin", rows)
    one = findings(gpu_machine, tmp_path)[what]
    assert one.state == state and words in one.found + one.remedy


def test_a_card_without_a_driver(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has NVIDIA's driver")
    device = tmp_path / "sys/bus/pci/devices/0000:17:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    one = findings(Machine(tmp_path), tmp_path)["GPUs"]
    assert one.state == "wrong" and "driver" in one.remedy


def test_another_version_than_the_pinned_one(tmp_path: Path) -> None:
    project = bare_copy(tmp_path / "project")
    site = project / ".venv/lib/python3.12/site-packages/torch-2.9.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    one = findings(Machine(project=project), tmp_path)["torch"]
    assert one.state == "wrong" and one.found.startswith("2.9.0, pinned 2.") and "make setup" in one.remedy
