"""Declared, pinned and documented packages agree with the imported and installed ones."""

import ast
import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rules.rooms import ROOT, imports, sources

MODULES = {
    "megatron-core": "megatron",
    "hydra-core": "hydra",
    "pyyaml": "yaml",
    "mlflow-skinny": "mlflow",
    "tensorboard": "torch.utils.tensorboard",
}
"""Import names that differ from the package's name."""


def declared() -> dict[str, set[str]]:
    """Package -> extras that name it ("" if every installation needs it), from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, set[str]] = {}
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            found.setdefault(Requirement(line).name, set()).add(extra)
    return found


def documented() -> dict[str, tuple[set[str], str]]:
    """Package -> (extras, who imports it), from docs/dependencies.md."""
    rows = [
        line.split("|")[1:-1]
        for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines()
        if line[:1] == "|"
    ]
    found = {}
    for cells in rows:
        name, *middle, door = (cell.strip() for cell in cells)
        if name != "package" and not name.startswith("-"):
            found[name] = ({""} if len(middle) == 1 else set(middle[0].split(", ")), door)
    return found


def test_the_page_lists_the_packages_of_pyproject() -> None:
    assert {name: extras for name, (extras, _) in documented().items()} == declared()


def test_packages_are_imported_by_the_files_that_the_page_names() -> None:
    wrong = []
    for name, (_, door) in documented().items():
        module = MODULES.get(name, name.replace("-", "_"))
        doors = [path for path in re.findall(r"`([^`]+)`", door) if not path.startswith(("make", "tests"))]
        wrong += [f"{name}: {path} does not exist" for path in doors if not (ROOT / path).exists()]
        files = [s.path for s in sources() if any(m == module or m.startswith(f"{module}.") for m, _ in imports(s))]
        wrong += [f"{name}: {file} imports it" for file in files if not file.startswith(tuple(doors) or ("?",))]
        if files:
            wrong += [
                f"{name}: nothing in {path} imports it" for path in doors if not any(f.startswith(path) for f in files)
            ]
    assert not wrong, "\n".join(["docs/dependencies.md:", *wrong])


def test_constraints_pin_every_package_that_gets_installed() -> None:
    """The packages of `pyproject.toml` with its `dev` extra, and all that they require on this machine."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}
    needed: set[str] = set()
    waiting = [(name, "") for name, extras in declared().items() if extras & {"", "dev"}]
    while waiting:
        name, extra = waiting.pop()
        if (name := canonicalize_name(name)) not in needed or extra:
            needed.add(name)
            requirements = map(Requirement, metadata.requires(name) or [])
            required = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
            waiting += [(r.name, extra) for r in required for extra in ("", *r.extras)]
    installed = {name: metadata.version(name) for name in needed}
    assert {name: pins.get(name) for name in needed} == installed
    assert pins.keys() == needed, f"pinned and not installed: {sorted(pins.keys() - needed)}"


def test_names_imported_from_hydra_exist() -> None:
    """Names of `hydra._internal` may move in any release. This imports nothing of `recipes`, which could then not be imported."""
    gone = []
    for path in sorted((ROOT / "recipes" / "schema").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra"):
                for alias in node.names:
                    try:
                        getattr(importlib.import_module(node.module or ""), alias.name)
                    except (ImportError, AttributeError):
                        gone.append(f"{Path(path).name}:{node.lineno}: {node.module}.{alias.name}")
    version = metadata.version("hydra-core")
    assert not gone, (
        f"hydra-core {version} does not have these names. Find their new place and change the imports, or go back to the version "
        "of constraints.txt:\n" + "\n".join(gone)
    )
