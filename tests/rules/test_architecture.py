"""The rules of the house, kept by machine: who may import whom, one door per library, texts under fields, no stray state.

Every rule is a function over parsed sources that returns complaints `file:line: what, what to do`; each is also shown to
catch a small sample that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("train", "data", "launch")

FLOORS = {
    "train.errors": 0, "train.config": 0, "train.stopwatch": 0, "train.model.pattern": 0, "train.parallel.layout": 0,
    "train.cost": 0, "train.optim.schedule": 0, "data.errors": 0, "data.build_c": 0, "data.fields": 0, "data.config": 0,
    "data.typed": 0, "data.shares": 1, "data.ahead": 1,
    "data.sources": 1, "data.corpus": 1, "data.work": 1, "data.megatron_sets": 1, "data.shard_job": 1,
    "data.pool": 1, "data.progress": 1, "data.tokenizer": 1, "data.shards": 1, "data.manifest": 1, "data.origins": 1,
    "data.verify": 1, "data.cache": 1, "data.reader": 1, "data.curriculum": 1, "data.order": 1, "data.fim": 1,
    "data.pack": 1, "data.compiled": 1, "data.fill": 1, "data.blend": 1, "data.batch": 1, "data.dataset": 1,
    "data.stream": 1, "data.command": 1,
    "train.recipe": 1, "train.gemm": 1, "data.trace": 7, "data.inspect": 7,
    "train.model": 2, "train.precision": 2, "train.parallel": 2, "train.optim": 2, "train.telemetry": 2, "train.displays": 2,
    "train.machine": 2, "train.metrics": 1,
    "train.faults": 2, "train.engine": 2,
    "train.objective": 3, "train.compress": 3, "train.evaluate": 3, "train.checkpoint": 3, "train.report": 3, "train.hf": 3,
    "train.precision_report": 3, "train.objective.place": 0, "train.precision.scaling": 0, "train.precision.control": 0,
    "train.objective.asked": 0, "train.step": 4, "train.loop": 5, "train.run": 6,
    "train.compress.__main__": 7, "launch.stages": 7, "train.teacher_cache": 7,
    "train.__main__": 7, "train.generate": 7, "train.hf.__main__": 7, "train.hf.command": 7, "data.prepare": 7, "launch": 7,
}  # fmt: skip
"""Floor of each module or package (the longest matching name counts). Imports point down or stay level."""

DOORS = {
    "transformer_engine": {"train.precision.te"},
    "mamba_ssm": {"train.model.mixer"},
    "causal_conv1d": {"train.model.mixer"},
    "hydra": {"data.command"},
    "omegaconf": {
        "data.command",
        "data.prepare",
        "data.trace",
        "data.inspect",
        "train.recipe",
        "train.__main__",
        "train.generate",
        "train.compress.__main__",
        "launch.stages",
        "train.teacher_cache",
    },
    "wandb": {"train.displays"},
    "tensorboard": {"train.displays"},
    "matplotlib": {
        "data.inspect",
        "train.report",
        "train.precision_report",
        "train.compress.pictures",
        "launch.plan_picture",
        "launch.validate_picture",
    },
    "transformers": {"train.hf"},
    "safetensors": {"train.hf"},
    "tokenizers": {"data.tokenizer.hf"},
    "tiktoken": {"data.tokenizer.ranks"},
    "sentencepiece": {"data.tokenizer.pieces"},
    "pyarrow": {"data.sources"},
    "fsspec": {"data.sources.files", "data.cache"},
    "datasets": {"data.sources.sets"},
}
"""Modules that may import an outside library."""

STDLIB_ONLY = [name for name, floor in FLOORS.items() if floor == 0]


@dataclass(frozen=True)
class Source:
    """One module, parsed."""

    name: str
    path: str
    tree: ast.Module


def sources() -> list[Source]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found.append(Source(name, str(path.relative_to(ROOT)), ast.parse(path.read_text())))
    return found


def sample(name: str, text: str) -> list[Source]:
    return [Source(name, "sample.py", ast.parse(text))]


def imports(source: Source) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, also inside functions and type-checking blocks."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def floor_of(module: str) -> int | None:
    matches = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return FLOORS[max(matches, key=len)] if matches else None


def imports_point_down(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        here = floor_of(source.name)
        if here is None:
            if source.name not in PACKAGES:
                complaints.append(f"{source.path}:1: {source.name} has no floor; give it one in tests/rules")
            continue
        for module, line in imports(source):
            there = floor_of(module)
            if there is not None and there > here:
                complaints.append(
                    f"{source.path}:{line}: floor {here} imports {module} of floor {there}; turn it round"
                )
    return complaints


def data_and_launch_keep_to_themselves(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        package = source.name.split(".")[0]
        for module, line in imports(source):
            top = module.split(".")[0]
            if package == "data" and top in ("train", "launch"):
                complaints.append(f"{source.path}:{line}: data imports {module}; data knows neither train nor launch")
            if package == "launch" and (
                top in ("torch", "megatron") or (top == "train" and (floor_of(module) or 0) > 1)
            ):
                complaints.append(f"{source.path}:{line}: launch imports {module}; it runs where there is no torch")
    return complaints


def one_door_per_library(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        for module, line in imports(source):
            parts = module.split(".")
            for library in DOORS.keys() & set(parts[:1] + parts[-1:] + parts[2:3]):
                if parts[0] not in (library, "torch"):
                    continue
                doors = DOORS[library]
                if not any(source.name == door or source.name.startswith(door + ".") for door in doors):
                    complaints.append(f"{source.path}:{line}: imports {library}; go through {', '.join(sorted(doors))}")
    return complaints


def fields_have_texts(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        if source.name not in ("train.config", "data.config", "train.generate"):
            continue
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(statement, ast.AnnAssign) and not is_text:
                    name = ast.unparse(statement.target)
                    complaints.append(f"{source.path}:{statement.lineno}: {name} has no text under it; write one")
    return complaints


def modules_say_what_they_are(all_sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:1: no module text; say what enters, what leaves, what holds"
        for source in all_sources
        if source.tree.body and not ast.get_docstring(source.tree)
    ]


def no_module_level_state(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        for node in source.tree.body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            value = getattr(node, "value", None)
            mutable = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp)
            for target in targets:
                if mutable and isinstance(target, ast.Name) and not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", target.id):
                    complaints.append(
                        f"{source.path}:{node.lineno}: {target.id} is state; pass it, or make it a CONSTANT"
                    )
            if isinstance(node, ast.FunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Global):
                        complaints.append(f"{source.path}:{inner.lineno}: `global`; hand the value in instead")
    return complaints


def library_code_does_not_print(all_sources: list[Source]) -> list[str]:
    entry_points = {"train.__main__"}
    return [
        f"{source.path}:{node.lineno}: print in library code; use logging, or write to a stream handed in"
        for source in all_sources
        if source.name not in entry_points
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


RULES: dict[Callable[[list[Source]], list[str]], tuple[str, str]] = {
    imports_point_down: ("train.model.pattern", "def f():\n    from train.loop import train_loop\n"),
    data_and_launch_keep_to_themselves: ("data.blend", "import train.config\n"),
    one_door_per_library: ("train.loop", "from torch.utils.tensorboard import SummaryWriter\n"),
    fields_have_texts: ("train.config", "class A:\n    x: int = 1\n    y: int = 2\n"),
    modules_say_what_they_are: ("train.loop", "x = 1\n"),
    no_module_level_state: ("train.loop", "registry = {}\n"),
    library_code_does_not_print: ("train.loop", "print(1)\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[list[Source]], list[str]]) -> None:
    complaints = rule(sources())
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_catches_its_breach(rule: Callable[[list[Source]], list[str]]) -> None:
    assert rule(sample(*RULES[rule]))


def test_the_ground_floor_needs_the_standard_library_only() -> None:
    """A login node has no torch, no numpy, no Hydra: the planner must still run there."""
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.split('.')[0]\n"
        f"        if top not in {PACKAGES!r} and top not in sys.stdlib_module_names:\n"
        "            raise ImportError(f'{name} is not in the standard library')\n"
        "sys.meta_path.insert(0, Refuse())\n" + "".join(f"import {name}\n" for name in STDLIB_ONLY)
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_tracked_files_hold_no_machine_paths() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(work|root|home/\w+|farm)/|pythonhosted|pypi\.org|deb\.debian\.org")
    found = []
    for name in listed:
        path = ROOT / name
        if (
            path.suffix in (".gz", ".png", ".safetensors")
            or name == "tests/rules/test_architecture.py"
            or not path.is_file()
        ):
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("directory", PACKAGES)
def test_files_stay_short(directory: str) -> None:
    long = [str(p) for p in (ROOT / directory).rglob("*.py") if len(p.read_text().splitlines()) > 600]
    assert not long, f"{long}: ask which second thing has moved in"
