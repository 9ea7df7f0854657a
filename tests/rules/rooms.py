"""The rooms of the house and the arrows between them, from the imports. `python tests/rules/rooms.py` prints both.

A room is a folder of a package, a file at its top, or a file that `STOREYS` names by itself (lower rooms need the formats of
Hugging Face's files). Imports inside functions and type-checking blocks count.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("recipes", "data", "launch", "train")

STOREYS = (
    # recipes
    ("recipes", "recipes.schema"),
    # data
    ("data", "data.system", "data.chat.record", "data.media.record"),
    ("data.chat.preferences",),
    ("data.native", "data.bucket", "data.batch", "data.sources", "data.store", "data.tokenizer", "data.order"),
    ("data.chat",),
    ("data.media",),
    ("data.rows", "data.make"),
    ("data.prepared",),
    ("data.dataset", "data.prepare"),
    ("data.stream",),
    ("data.inspect", "data.trace"),
    ("data.commands",),
    # launch
    (
        "launch",
        "launch.plan.cost",
        "launch.runs",
        "launch.queue",
        "launch.facts",
        "launch.time_spent",
        "launch.starts",
        "launch.children",
        "launch.user_errors",
    ),
    ("launch.plan.published", "launch.compose", "launch.lease"),
    ("launch.plan", "launch.local"),
    ("launch.slurm", "launch.kubernetes", "launch.stages", "launch.smoke", "launch.doctor"),
    ("launch.status", "launch.logs"),
    ("launch.__main__",),
    # train
    (
        "train",
        "train.megatron",
        "train.native",
        "train.resilience",
        "train.hf.mapping",
        "train.hf.files",
        "train.command_list",
    ),
    ("train.record", "train.parallel", "train.hf.config"),
    ("train.precision", "train.optim", "train.quantize"),
    ("train.model",),
    ("train.objective", "train.engine", "train.align.losses", "train.align.log_prob_gap"),
    ("train.step", "train.checkpoint", "train.report"),
    ("train.copies", "train.integrity"),
    (
        "train.distill",
        "train.align.dpo",
        "train.align.policy_step",
        "train.align.reward",
        "train.loop",
        "train.quantize.loading",
    ),
    ("train.build",),
    ("train.quantize.calibrate",),
    ("train.compress", "train.inference", "train.teacher_cache"),
    ("train.evaluate",),
    ("train.align", "train.merge"),
    ("train.run", "train.replay", "train.speed"),
    ("train.hf", "train.serve", "train.__main__", "train.completion", "train.notebook"),
    ("train.stratum",),
)
"""Rooms from the ground up; a room imports only rooms below its own storey. (launch stands on data, train on launch.)"""

FLOORS = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}


@dataclass(frozen=True)
class Source:
    """One module, parsed."""

    name: str
    path: str
    text: str
    tree: ast.Module


@cache
def sources() -> list[Source]:
    """Every module of the four packages."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text()
            found.append(Source(name, str(path.relative_to(ROOT)), text, ast.parse(text)))
    return found


@cache
def imports(source: Source) -> tuple[tuple[str, int], ...]:
    """Every imported module with its line; `from a import b` counts as a.b too, which may be a module."""
    return tuple(_walk_imports(source))


def _walk_imports(source: Source) -> Iterator[tuple[str, int]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(module: str) -> str | None:
    """The room a module is in: a folder of a package (or a folder inside `launch.plan`), or a file at its top or in `STOREYS`."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    if ".".join(parts[:3]) in FLOORS:
        return ".".join(parts[:3])
    for depth in (3, 2):
        if len(parts) >= depth and (ROOT / Path(*parts[:depth])).is_dir() and (depth == 2 or parts[1] == "plan"):
            return ".".join(parts[:depth])
    return ".".join(parts[:2])


def floor_of(module: str) -> int | None:
    """Floor of a module's room; None for modules outside and for rooms that have none yet."""
    room = room_of(module)
    return None if room is None else FLOORS.get(room)


def arrows(all_sources: list[Source]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    names = {source.name for source in all_sources}
    found: dict[str, set[str]] = {}
    for source in all_sources:
        modules = {module for module, _ in imports(source)}
        longer = {module for module in modules if any(other.startswith(f"{module}.") for other in modules & names)}
        found[source.name] = (modules - longer) & names
    return found


def main() -> None:
    """Print files and lines of each room, and the arrows between rooms."""
    everything = sources()
    files: dict[str, list[Source]] = defaultdict(list)
    for source in everything:
        files[str(room_of(source.name))].append(source)
    drawn = {(room_of(module), room_of(target)) for module, targets in arrows(everything).items() for target in targets}
    between = {(here, there) for here, there in drawn if here != there}
    print(f"{len(files)} rooms, {len(STOREYS)} storeys, {len(between)} arrows between rooms\n")
    print("| storey | room | files | lines | stands on |\n|---|---|---|---|---|")
    for room in sorted(files, key=lambda name: (-FLOORS.get(name, -1), name)):
        lines = sum(len(source.text.splitlines()) for source in files[room])
        below = ", ".join(sorted(str(there) for here, there in between if here == room))
        print(f"| {FLOORS.get(room)} | {room} | {len(files[room])} | {lines:,} | {below} |")


if __name__ == "__main__":
    main()
