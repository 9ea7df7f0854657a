"""`stratum checkpoint list | show | verify | fetch s3://...`: checkpoints of a run in object storage."""

import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.bucket import run_copy
from data.bucket.bucket import Bucket
from data.bucket.run_copy import StoredStep
from recipes.schema import checkpoint_steps as steps
from recipes.schema import units
from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import printable_lines
from recipes.schema.manifest import Manifest, describe_layout
from recipes.schema.run_folder import CHECKPOINTS, METRICS
from train.resilience.storage_lease import owner_of

_STEP = re.compile(rf"(.+)/{CHECKPOINTS}/step_([0-9]{{1,18}})-([0-9]{{4,9}})/?")


def list_steps(address: str, console: Console, *, verify: bool) -> int:
    """Print the checkpoints of a run in storage. verify: also fetch each one and compare its fingerprints. -> exit status."""
    bucket = Bucket(address)
    there = run_copy.steps_in(bucket)
    if not any(stored.has_manifest for stored in there):
        raise CheckpointError(f"{address} has no checkpoints. Name a run in storage, like s3://BUCKET/PREFIX/NAME.")
    good = {stored.name: manifest for stored, manifest in run_copy.candidates(bucket)[0]}
    newest = next(iter(good), None)
    table = Table(box=None, pad_edge=False)
    for column in ("step", "tokens", "layout", "files", "size", "written", "state"):
        table.add_column(column, justify="left" if column in ("layout", "written", "state") else "right")
    damage, unfinished = [], []
    for stored in there:
        if not stored.has_manifest:
            unfinished.append(stored.name)
            continue
        cells = [""] * 4
        problems = []
        try:
            manifest = run_copy.manifest_of(bucket, stored)
            size, files = units.size(manifest.bytes), str(len(manifest.files))
            cells = [f"{manifest.tokens:,}", describe_layout(manifest.layout), files, size]
            problems = _problems_of(bucket, stored, manifest) if verify else []
        except CheckpointError as error:
            problems = [str(error)]
        state = Text("DAMAGED", style="red")
        if not problems:
            words = ["verified" if verify else "whole", *["replaced by a later copy"] * (stored.name not in good)]
            state = Text(", ").join([*map(Text, words), *[Text("newest", style="green")] * (stored.name == newest)])
        table.add_row(f"{stored.step:,}", *cells, units.moment(stored.changed), state)
        damage += [f"step {stored.step:,} is damaged: {problem}" for problem in problems[:3]]
    console.print(table)
    for line in damage:
        console.print(printable_lines(line))
    for name in unfinished:
        console.print(
            f"note: {name} is being copied or deleted, or a killed process left it. The next copy removes it."
        )
    if owner := owner_of(bucket):
        console.print(f"note: written by {printable_lines(owner.describe())}, unless it was killed.")
    if not verify:
        console.print(
            "`whole`: the manifest and the sizes of all objects agree; --verify also fetches and reads the tensors."
        )
    return 1 if damage else 0


def verify_step(address: str, console: Console) -> int:
    """Fetch a checkpoint into a temporary folder, compare its fingerprints and print the result. -> exit status."""
    bucket, stored, manifest = find(address)
    place = printable_lines(f"{bucket.address}/{CHECKPOINTS}/{stored.name}")
    problems = _problems_of(bucket, stored, manifest)
    if problems:
        console.print(Text("DAMAGED", style="red"), place)
        for problem in problems:
            console.print(f"  {printable_lines(problem)}")
        return 1
    size = units.size(manifest.bytes)
    console.print(
        Text("intact ", style="green"), f"{place}: {len(manifest.tensors)} tensors, {size}; all fingerprints agree"
    )
    return 0


def fetch_run(address: str, out: Path, console: Console, *, records_only: bool) -> int:
    """Copy a run's records and one checkpoint from storage into a new run folder. -> exit status."""
    if steps.steps_in(out / CHECKPOINTS):
        raise CheckpointError(f"{out} already has checkpoints. Name a new folder.")
    bucket = Bucket(_STEP.sub(r"\1", address))
    _refuse_other_records(bucket, out)
    out.mkdir(parents=True, exist_ok=True)
    found = [name for name in run_copy.RECORDS if run_copy.fetch_record(bucket, name, out / name)]
    if records_only:
        if not found:
            raise CheckpointError(f"{address} has no records. Name a run in storage, like s3://BUCKET/PREFIX/NAME.")
        console.print(f"Fetched {' and '.join(found)} into {out}. Look at them: stratum report {out}")
        return 0
    bucket, stored, manifest = find(address)
    from train.checkpoint.copying import fetch_step  # imports torch, which `list` and `show` do not need

    notes: list[str] = []
    path = fetch_step(bucket, stored, manifest, out / CHECKPOINTS, notes)
    if path is None:
        raise CheckpointError(notes[-1])
    console.print(f"Fetched and verified {printable_lines(str(path))} ({units.size(manifest.bytes)}).")
    return 0


def _refuse_other_records(bucket: Bucket, out: Path) -> None:
    """CheckpointError if a folder has the records of another run, or lines that the storage does not have."""
    if not any((out / name).exists() for name in run_copy.RECORDS):
        return
    from train.checkpoint.copying import is_prefix  # imports torch, which `list` and `show` do not need

    with tempfile.TemporaryDirectory(prefix="stratum-fetch-") as folder:
        stored = Path(folder) / METRICS
        there = run_copy.fetch_record(bucket, METRICS, stored)
        if not ((out / METRICS).exists() and there and is_prefix(out / METRICS, stored)):
            raise CheckpointError(f"{out} has records that {bucket.address} does not have. Name a new folder.")


def find(address: str) -> tuple[Bucket, StoredStep, Manifest]:
    """The step that an address names: a step's folder, or the newest of a run. CheckpointError without one."""
    if match := _STEP.fullmatch(address):
        bucket, step, owner = Bucket(match[1]), int(match[2]), int(match[3])
        for stored in run_copy.steps_in(bucket):
            if (stored.step, stored.owner) == (step, owner):
                return bucket, stored, run_copy.manifest_of(bucket, stored)
        raise CheckpointError(f"{address} does not exist. `stratum checkpoint list {match[1]}` shows what there is.")
    bucket = Bucket(address)
    good, notes = run_copy.candidates(bucket)
    if not good:
        more = "".join(f"\n  {note}" for note in notes)
        raise CheckpointError(
            f"{address} has no whole checkpoint. Name a run in storage, like s3://BUCKET/PREFIX/NAME.{more}"
        )
    return bucket, *good[0]


def _problems_of(bucket: Bucket, stored: StoredStep, manifest: Manifest) -> list[str]:
    from train.checkpoint.copying import fetch_step  # imports torch, which `list` and `show` do not need

    notes: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="stratum-verify-"))
    try:
        fetch_step(bucket, stored, manifest, folder, notes)
    finally:
        shutil.rmtree(folder)
    return notes
