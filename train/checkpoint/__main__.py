"""`stratum checkpoint COMMAND`: list, verify, compare and rewrite checkpoints. Needs no GPU and builds no model.

torch takes seconds to import, so only the commands that read tensors import it: `--help`, `list` and `show` do not.

Nothing in a checkpoint is executed.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.system.console import open_console, progress
from recipes.schema import checkpoint_steps as steps
from recipes.schema import units
from recipes.schema.changes import differences
from recipes.schema.errors import CheckpointError, StratumError
from recipes.schema.foreign import printable_lines
from recipes.schema.layout import lay_out
from recipes.schema.manifest import Manifest, describe_layout, read_manifest
from recipes.schema.messages import complain
from recipes.schema.model import ModelConfig
from recipes.schema.options import CommandParser, run_or_path
from recipes.schema.parallel import ParallelConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.run import RunConfig
from recipes.schema.storage_rules import is_storage
from train.checkpoint import storage_command

_SECTIONS = (
    ("weights", "model."),
    ("fp32 masters", "optimizer.master."),
    ("first moments", "optimizer.exp_avg."),
    ("second moments", "optimizer.exp_avg_sq."),
    ("random state", "random."),
    ("answers to learn from", "stream."),
)
_EXAMPLES = """
stratum checkpoint list runs/smoke                         checkpoints of a run and their state
stratum checkpoint show smoke                              the newest one: layout, sizes, recipe, lineage
stratum checkpoint verify smoke                            read every byte and compare fingerprints
stratum checkpoint diff runs/smoke runs/mine --values      which tensors differ, and by how much
stratum checkpoint reshard runs/smoke runs/eight --files 8     the same checkpoint in eight equal files, in a new run
stratum checkpoint consolidate smoke smoke.safetensors     all weights in one file
stratum checkpoint list s3://bucket/runs/smoke             checkpoints of a run in object storage
stratum checkpoint fetch s3://bucket/runs/smoke runs/b     its newest checkpoint and its records, in a new run folder
"""
_NOTES = """
Give a checkpoint's folder, or a run for its newest checkpoint. `list`, `show`, `verify` and `fetch` also take a run or a step in
object storage (s3://BUCKET/PREFIX/NAME, gs://...); `verify` fetches it into a temporary folder. Nothing in a checkpoint is
executed.
Exit status: 0 success; 1 damaged (list, verify) or different (diff); 2 failed, with the reason.
"""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Names of torch's formats."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. -> exit status."""
    parser = CommandParser(
        "checkpoint",
        about="List, verify, compare and rewrite checkpoints. Needs no GPU and builds no model.",
        examples=_EXAMPLES,
        notes=_NOTES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checkpoint: dict[str, Any] = {"type": run_or_path, "help": "a checkpoint's folder, or a run (its newest)"}
    stored: dict[str, Any] = {"type": _place, "help": "the same, or an address in object storage"}

    command = commands.add_parser("list", help="checkpoints of a run: step, tokens, layout, size, state")
    command.add_argument("run", type=_place, help="a run, by its folder, name or address in object storage")
    command.add_argument(
        "--verify", action="store_true", help="also read every byte and compare it with what was saved"
    )
    command = commands.add_parser("show", help="what is in a checkpoint: layout, sizes, recipe, lineage")
    command.add_argument("checkpoint", **stored)
    command.add_argument("--tensors", action="store_true", help="also every tensor: format, shape, fingerprint")
    command.add_argument("--json", action="store_true", help="print the manifest as JSON")
    command = commands.add_parser("verify", help="read every byte and compare fingerprints")
    command.add_argument("checkpoint", **stored)
    command.add_argument("--all", action="store_true", help="every checkpoint of the run")
    command = commands.add_parser("diff", help="which tensors and recipe fields differ")
    command.add_argument("a", **checkpoint)
    command.add_argument("b", **checkpoint)
    command.add_argument("--values", action="store_true", help="measure how much tensors differ (reads them)")
    command.add_argument("--most", type=_count, default=20, metavar="N", help="tensors to name (default: 20)")
    command = commands.add_parser(
        "reshard",
        help="rewrite in another number of files; check a layout",
        about="Any layout can read any checkpoint, so you do not need this to change the layout. It writes files of equal size "
        "(for example one for each reading rank), drops the optimizer state, or checks that a layout fits the model: "
        "parallel.tensor=4 parallel.pipeline=2 --ranks 16.",
    )
    command.add_argument("checkpoint", **checkpoint)
    command.add_argument(
        "out",
        type=Path,
        help="a new run's folder, from which training can resume; or a folder for the checkpoint alone (step_...)",
    )
    command.add_argument("fields", nargs="*", metavar="parallel.FIELD=N", help="a layout to check against the model")
    command.add_argument("--ranks", type=_count, help="processes of that layout (default: as few as it needs)")
    command.add_argument("--files", type=_count, help="number of files (default: --ranks, else 1)")
    command.add_argument("--weights", action="store_true", help="weights only: training then starts with fresh moments")
    command = commands.add_parser("consolidate", help="one safetensors file")
    command.add_argument("checkpoint", **checkpoint)
    command.add_argument("out", type=Path, help="file to write, e.g. weights.safetensors")
    command.add_argument("--all", action="store_true", help="optimizer state too, under full names")
    command.add_argument("--dtype", choices=sorted(_DTYPES), help="convert weights (default: as stored)")
    command = commands.add_parser("fetch", help="copy a run from object storage into a new run folder")
    command.add_argument("address", type=_address, help="a run (its newest checkpoint) or a step in object storage")
    command.add_argument("out", type=Path, help="a new run's folder")
    command.add_argument(
        "--records", action="store_true", help="only recipe.yaml and metrics.jsonl, for status and report"
    )

    parsed = parser.parse_args(arguments)
    console = open_console()
    act = {
        "list": _list, "show": _show, "verify": _verify, "diff": _diff, "reshard": _reshard, "consolidate": _consolidate,
        "fetch": _fetch,
    }[parsed.command]  # fmt: skip
    try:
        return act(parsed, console)
    except StratumError as error:
        return complain(error)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return complain(f"{error.filename or 'the system'}: {error.strerror or error}")
    except MemoryError:
        sys.stderr.write("error: not enough memory for a tensor of this checkpoint.\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _count(word: str) -> int:
    """For argparse: an integer from 1 to 100,000."""
    if not (word.isascii() and word.isdigit() and 1 <= int(word[:7]) <= 100_000):
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer from 1 to 100,000")
    return int(word)


def _place(name: str) -> Path | str:
    """For argparse: a path, or an address in object storage as it is."""
    return name if is_storage(name) else run_or_path(name)


def _address(name: str) -> str:
    """For argparse: an address in object storage."""
    if not is_storage(name):
        raise argparse.ArgumentTypeError(f"{name!r} is not an address in object storage, like s3://BUCKET/PREFIX/NAME")
    return name


def _fetch(parsed: argparse.Namespace, console: Console) -> int:
    return storage_command.fetch_run(parsed.address, parsed.out, console, records_only=parsed.records)


def _list(parsed: argparse.Namespace, console: Console) -> int:
    if isinstance(parsed.run, str):
        return storage_command.list_steps(parsed.run, console, verify=parsed.verify)
    folder = _checkpoints_of(parsed.run)
    good, notes = steps.candidates(folder)
    newest = good[0][0] if good else None
    table = Table(box=None, pad_edge=False)
    for column in ("step", "tokens", "layout", "files", "size", "written", "state"):
        table.add_column(column, justify="left" if column in ("layout", "written", "state") else "right")
    damage = []
    for path in steps.steps_in(folder):
        step = f"{int(path.name.removeprefix('step_')):,}"
        when = units.moment(path.stat().st_mtime)
        cells = [""] * 4
        try:
            manifest = steps.manifest_of(path)
            size, files = units.size(manifest.bytes), str(len(manifest.files))
            cells = [f"{manifest.tokens:,}", describe_layout(manifest.layout), files, size]
            problems = _problems_of(path, manifest) if parsed.verify else []
        except CheckpointError as error:
            problems = [_briefly(error, path)]
        state = Text("DAMAGED", style="red")
        if not problems:
            words = ["verified" if parsed.verify else "whole", *["weights only"] * (manifest.updates is None)]
            state = Text(", ").join([*map(Text, words), *[Text("newest", style="green")] * (path == newest)])
        table.add_row(step, *cells, when, state)
        damage += [f"step {step} is damaged: {problem}" for problem in problems[:3]]
    console.print(table)
    for line in damage:
        console.print(printable_lines(line))
    for note in notes:
        if not note.startswith(steps.SKIPPED):
            console.print(f"note: {printable_lines(note)}")
    for leftover in sorted(folder.glob(".step_*")):
        console.print(
            f"note: {printable_lines(leftover.name)} is being written or deleted, or a killed process left it. In that case the "
            f"next start of the run removes it."
        )
    if not parsed.verify:
        console.print("`whole`: manifest, index and file sizes agree; --verify also reads the tensors.")
    return 1 if damage else 0


def _checkpoints_of(run: Path) -> Path:
    """The folder with a run's checkpoints. CheckpointError if there are none."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if not steps.steps_in(folder):
        raise CheckpointError(f"{folder} has no checkpoints. Give a run's folder, like runs/NAME.")
    return folder


def _problems_of(path: Path, manifest: Manifest) -> list[str]:
    from train.checkpoint import offline  # imports torch

    with _bar(f"verifying {path.name}", manifest) as advance:
        return offline.verify(path, advance)


def _briefly(error: CheckpointError, path: Path) -> str:
    """An error without the folder name, which the table already shows."""
    return str(error).replace(f"{path}/", "").split(" The checkpoint is damaged")[0]


def _show(parsed: argparse.Namespace, console: Console) -> int:
    path: Path | str
    if isinstance(parsed.checkpoint, str):
        bucket, found, manifest = storage_command.find(parsed.checkpoint)
        path = f"{bucket.address}/checkpoints/{found.name}"
    else:
        path, manifest = steps.checkpoint_at(parsed.checkpoint)
    if parsed.json:
        sys.stdout.write(json.dumps(asdict(manifest), indent=1) + "\n")
        return 0
    updates = "none (weights only)" if manifest.updates is None else f"{manifest.updates:,} updates"
    rows = [
        ("step", f"{manifest.step:,}"), ("tokens", f"{manifest.tokens:,}"), ("position", f"row {manifest.position:,}"),
        ("optimizer", updates), ("written at", describe_layout(manifest.layout)),
        ("weights", manifest.fingerprint), ("data", manifest.data_hash or "unknown"),
        ("tokenizer", manifest.tokenizer or "unknown"),
        ("versions", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
        ("on disk", f"{units.size(manifest.bytes)} in {len(manifest.files)} files, format {manifest.format}"),
    ]  # fmt: skip
    if manifest.recipe:
        model = manifest.recipe.get("model", {})
        rows.insert(0, ("run", str(manifest.recipe.get("run", {}).get("name"))))
        head = ", scalar head" if model.get("head") == "scalar" else ""
        text = f"{model.get('pattern')}, hidden {model.get('hidden')}, vocabulary {model.get('vocab')}{head}"
        rows.append(("model", text))
    if manifest.ledger.skipped_steps or manifest.ledger.rollbacks:
        ranges = ", ".join(f"{start:,}-{stop - 1:,}" for start, stop in manifest.ledger.left_out)
        rows.append(("spikes", manifest.ledger.describe() + (f" (rows {ranges})" if ranges else "")))
    rows += [(f"lineage: {key}", json.dumps(value)[:200]) for key, value in manifest.lineage.items()]
    console.print(printable_lines(str(path)))
    _pairs(console, rows)
    table = Table("", "tensors", "elements", "formats", "size", box=None, pad_edge=False)
    for title, prefix in _SECTIONS:
        section = [record for name, record in manifest.tensors.items() if name.startswith(prefix)]
        if section:
            elements = sum(math.prod(record.shape) for record in section)
            formats = ", ".join(sorted({record.dtype for record in section}))
            table.add_row(title, str(len(section)), f"{elements:,}", formats, units.size(sum(r.bytes for r in section)))
    console.print(table)
    if parsed.tensors:
        table = Table("tensor", "format", "shape", "fingerprint", box=None, pad_edge=False)
        for name, record in manifest.tensors.items():
            table.add_row(name, record.dtype, " x ".join(map(str, record.shape)), record.fingerprint)
        console.print(table)
    return 0


def _verify(parsed: argparse.Namespace, console: Console) -> int:
    if isinstance(parsed.checkpoint, str):
        if parsed.all:
            return storage_command.list_steps(parsed.checkpoint, console, verify=True)
        return storage_command.verify_step(parsed.checkpoint, console)
    if parsed.all:
        paths = steps.steps_in(_checkpoints_of(parsed.checkpoint))
    else:
        given = parsed.checkpoint
        paths = [given] if given.name.startswith("step_") else [steps.checkpoint_at(given)[0]]
    damaged = 0
    for path in paths:
        started = time.perf_counter()
        try:
            manifest = read_manifest(path)
            problems = _problems_of(path, manifest)
        except CheckpointError as error:
            problems = [str(error)]
        if problems:
            damaged += 1
            console.print(Text("DAMAGED", style="red"), printable_lines(str(path)))
            for problem in problems:
                console.print(f"  {printable_lines(problem)}")
            continue
        seconds = time.perf_counter() - started
        console.print(
            Text("intact ", style="green"),
            f"{printable_lines(str(path))}: {len(manifest.tensors)} tensors, {units.size(manifest.bytes)} in {seconds:.1f} s; "
            f"all fingerprints agree, all numbers are finite",
        )
    return 1 if damaged else 0


def _diff(parsed: argparse.Namespace, console: Console) -> int:
    (path_a, a), (path_b, b) = steps.checkpoint_at(parsed.a), steps.checkpoint_at(parsed.b)
    rows = [("", "A", "B"), ("folder", str(path_a), str(path_b))]
    for title, name in (
        ("step", "step"), ("tokens", "tokens"), ("row", "position"), ("optimizer updates", "updates"),
        ("data", "data_hash"), ("tokenizer", "tokenizer"), ("weights", "fingerprint"),
    ):  # fmt: skip
        x, y = (
            f"{value:,}" if isinstance(value, int) else str(value)[:32]
            for value in (getattr(a, name), getattr(b, name))
        )
        rows.append((title, x, y if x != y else "the same"))
    rows.append(
        ("layout", describe_layout(a.layout), describe_layout(b.layout) if a.layout != b.layout else "the same")
    )
    changes = differences(a.recipe, b.recipe) if a.recipe and b.recipe else []
    rows += [
        (c.key, str(c.old), f"{c.new}    ({c.kind if c.kind == 'safe' else f'changes {c.kind}'})") for c in changes
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*map(printable_lines, row))
    console.print(table)
    from train.checkpoint import offline  # imports torch
    from train.checkpoint.files import Reader  # likewise

    with _bar("comparing", a) as advance:
        found = list(offline.compare(Reader(path_a), Reader(path_b), values=parsed.values, advance=advance))
    if parsed.values:
        found.sort(key=lambda one: -math.inf if math.isnan(one.relative) else -one.relative)
    names = [name for name in a.tensors.keys() | b.tensors.keys() if not name.startswith("random.")]
    console.print(f"{len(names) - len(found)} of {len(names)} tensors are the same.")
    if found:
        table = Table(box=None, pad_edge=False)
        for column in ("tensor", "", *(("elements", "largest |A-B|", "norm(A-B)/norm(A)") if parsed.values else ())):
            table.add_column(column)
        for one in found[: parsed.most]:
            cells = (f"{one.differing:,} of {one.elements:,}", f"{one.largest:.3g}", f"{one.relative:.3g}")
            is_measured = parsed.values and not one.note.startswith(("only", "shape"))
            table.add_row(one.name, one.note or "different values", *(cells if is_measured else ()))
        console.print(table)
        if len(found) > parsed.most:
            console.print(f"... and {len(found) - parsed.most} more (--most {len(found)})")
    return 1 if found else 0


def _reshard(parsed: argparse.Namespace, console: Console) -> int:
    path, manifest = steps.checkpoint_at(parsed.checkpoint)
    if parsed.fields or parsed.ranks:
        layout = _check_layout(manifest, parsed.fields, parsed.ranks)
        console.print(f"The model fits {layout}.")
    from train.checkpoint import offline  # imports torch

    files = parsed.files or parsed.ranks or 1
    with _bar("resharding", manifest, share=_weights_only(manifest) if parsed.weights else 1.0) as advance:
        new = offline.reshard(path, parsed.out, files=files, with_optimizer=not parsed.weights, advance=advance)
    is_run = offline.is_run(parsed.out)
    where = parsed.out / "checkpoints" / steps.name_of(new.step) if is_run else parsed.out
    console.print(
        f"wrote {where}: {len(new.tensors)} tensors in {files} file{'s' * (files > 1)}, {units.size(new.bytes)}; "
        "fingerprints agree"
    )
    if is_run:
        console.print(
            f"To continue training from it: run.folder={parsed.out.parent} run.name={parsed.out.name}", markup=False
        )
    return 0


def _consolidate(parsed: argparse.Namespace, console: Console) -> int:
    path, manifest = steps.checkpoint_at(parsed.checkpoint)
    import torch  # takes seconds

    from train.checkpoint import offline  # imports torch

    dtype = getattr(torch, _DTYPES[parsed.dtype]) if parsed.dtype else None
    with _bar("writing", manifest, share=1.0 if parsed.all else _weights_only(manifest)) as advance:
        size = offline.consolidate(path, parsed.out, with_optimizer=parsed.all, dtype=dtype, advance=advance)
    console.print(f"wrote {parsed.out}, {units.size(size)}")
    return 0


def _check_layout(manifest: Manifest, fields: list[str], ranks: int | None) -> str:
    """The layout as text, if it fits the checkpoint's model. Otherwise raises RecipeError or CheckpointError with the reason."""
    known = ParallelConfig.__dataclass_fields__
    values: dict[str, Any] = {}
    for word in fields:
        key, _, value = word.partition("=")
        name = key.removeprefix("parallel.")
        if name not in known or not (value.isdigit() or value in ("true", "false")):
            raise CheckpointError(
                f"{word!r} is not parallel.FIELD=N. Fields: {', '.join(f'parallel.{n}' for n in known)}."
            )
        values[name] = int(value) if value.isdigit() else value == "true"
    recipe = recipe_from_mapping(manifest.recipe)
    parallel = ParallelConfig(**values)
    model: ModelConfig = recipe.model
    run: RunConfig = recipe.run
    world = ranks or parallel.tensor * parallel.pipeline * parallel.context
    return lay_out(model=model, parallel=parallel, run=run, row_tokens=recipe.data.row_tokens, world=world).describe()


@contextmanager
def _bar(what: str, manifest: Manifest, share: float = 1.0) -> Iterator[Callable[[float], None]]:
    total = sum(record.bytes for record in manifest.tensors.values()) * share
    with progress(what, total) as advance:
        yield advance


def _weights_only(manifest: Manifest) -> float:
    total = sum(record.bytes for record in manifest.tensors.values())
    return sum(r.bytes for n, r in manifest.tensors.items() if n.startswith("model.")) / max(1, total)


def _pairs(console: Console, rows: list[tuple[str, str]]) -> None:
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        console.print(f"  {printable_lines(key):<{width}}  {printable_lines(value)}")


if __name__ == "__main__":
    sys.exit(main())
