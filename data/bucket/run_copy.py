"""How a run is stored in object storage, and how its checkpoints are published there without a rename.

    s3://BUCKET/PREFIX/NAME/
        owner.json                                   who may write (train.resilience.storage_lease)
        recipe.yaml  metrics.jsonl                   replaced after each step that is copied
        latest                                       name of the newest step, a hint for people
        checkpoints/step_00000100-0003/rank_00000.safetensors, ..., index.json
        checkpoints/step_00000100-0003/manifest.json written last: the step exists if and only if this object does

0003 is the number of the owner that wrote it. Each trainer that takes the run has a higher number, so two trainers never write
the same object, and a step is never overwritten: if a step is copied again later, the higher number counts. A deletion removes
the manifest first. Readers also compare the size of every listed object with the manifest.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.bucket.bucket import Bucket, ChangedError, MissingError, StorageError, StoredObject
from data.system import disk
from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import MANIFEST, Manifest, check_size, describe_not_finite, parse_manifest, read_text
from recipes.schema.run_folder import CHECKPOINTS, METRICS, POINTER, RECIPE, name_of, step_of

_FOLDER = re.compile(rf"{CHECKPOINTS}/(step_([0-9]{{1,18}})-([0-9]{{4,9}}))/([^/]+)")
RECORDS = (RECIPE, METRICS)
"""Files of the run's folder that are copied with the steps."""


@dataclass(frozen=True)
class StoredStep:
    """The objects of one step, by one owner; complete or not."""

    step: int
    owner: int
    sizes: dict[str, int] = field(default_factory=dict)
    """{file: bytes}, the manifest included if it is there."""
    changed: float = 0.0
    """Time of the last change of any of its objects, by the server's clock."""

    @property
    def name(self) -> str:
        """Its folder below `checkpoints/`."""
        return f"{name_of(self.step)}-{self.owner:04d}"

    @property
    def has_manifest(self) -> bool:
        """Whether it was published."""
        return MANIFEST in self.sizes

    def objects(self) -> list[str]:
        """Names of its objects, the manifest first: the order of deletion."""
        names = sorted(self.sizes, key=lambda name: (name != MANIFEST, name))
        return [f"{CHECKPOINTS}/{self.name}/{name}" for name in names]


def steps_in(bucket: Bucket) -> list[StoredStep]:
    """Steps with any object, oldest first. Of one step that several owners wrote, the newest owner's is the last."""
    found: dict[tuple[int, int], StoredStep] = {}
    for entry in bucket.objects(CHECKPOINTS):
        if match := _FOLDER.fullmatch(entry.name):
            _add(found, entry, step=int(match[2]), owner=int(match[3]), file=match[4])
    return [found[key] for key in sorted(found)]


def _add(found: dict[tuple[int, int], StoredStep], entry: StoredObject, *, step: int, owner: int, file: str) -> None:
    before = found.get((step, owner), StoredStep(step, owner))
    sizes = before.sizes | {file: entry.size}
    found[step, owner] = StoredStep(step, owner, sizes, max(before.changed, entry.changed))


def manifest_of(bucket: Bucket, stored: StoredStep) -> Manifest:
    """The manifest of a published step; the size of every object is compared with it. CheckpointError if they disagree."""
    place = f"{bucket.address}/{CHECKPOINTS}/{stored.name}"
    try:
        content, _ = bucket.read(f"{CHECKPOINTS}/{stored.name}/{MANIFEST}")
    except MissingError as error:
        raise CheckpointError(f"{place} was not published: it has no {MANIFEST}.") from error
    manifest = parse_manifest(content.decode(errors="replace"), place)
    if manifest.step != stored.step:
        raise CheckpointError(f"{place} contains step {manifest.step:,}, not the step in its name.")
    for name in manifest.files:
        check_size(manifest, f"{place}/{name}", stored.sizes.get(name))
    return manifest


def candidates(bucket: Bucket) -> tuple[list[tuple[StoredStep, Manifest]], list[str]]:
    """(whole steps, newest first, one for each step number; notes about published steps that are damaged)."""
    good: list[tuple[StoredStep, Manifest]] = []
    notes = []
    for stored in reversed(steps_in(bucket)):
        if not stored.has_manifest or (good and good[-1][0].step == stored.step):
            continue
        try:
            manifest = manifest_of(bucket, stored)
            if manifest.not_finite:
                raise CheckpointError(f"{bucket.address}: {describe_not_finite(manifest.not_finite)}")
            good.append((stored, manifest))
        except CheckpointError as error:
            notes.append(f"skipped: {error}")
    return good, notes


def publish(bucket: Bucket, folder: Path, *, owner: int, may_publish: Callable[[], bool]) -> StoredStep:
    """Copy a published checkpoint of the disk into the bucket, the manifest last and only if `may_publish` then says so.

    Files that an interrupted copy by the same owner has finished are not sent again. StorageError if the copy is not allowed or
    the bucket has another checkpoint of this step by this owner; OSError and CheckpointError if the folder cannot be read.
    """
    content = read_text(folder / MANIFEST)
    manifest = parse_manifest(content, folder)
    target = StoredStep(step_of(folder), owner)
    below = f"{CHECKPOINTS}/{target.name}"
    sizes = manifest.files | {MANIFEST: len(content.encode())}
    there = {entry.name.rpartition("/")[2]: entry.size for entry in bucket.objects(below)}
    if MANIFEST in there:  # its files belong to it: nothing may be written over them
        if bucket.read(f"{below}/{MANIFEST}")[0] != content.encode():
            raise StorageError(f"{bucket.address}/{below} already has another checkpoint of this step.")
        return StoredStep(target.step, owner, sizes)
    for name, size in sorted(manifest.files.items()):
        if there.get(name) != size:
            bucket.upload(folder / name, f"{below}/{name}")
    if not may_publish():
        raise StorageError(f"{bucket.address} belongs to another process now; step {target.step:,} is not published.")
    try:
        bucket.create(f"{below}/{MANIFEST}", content.encode())
    except ChangedError as error:
        raise StorageError(f"{bucket.address}/{below} already has another checkpoint of this step.") from error
    return StoredStep(target.step, owner, sizes)


def point_at(bucket: Bucket, name: str, *, owner: int) -> None:
    """Move the pointer to a step, unless an owner with a higher number has moved it. Compare and swap."""
    content = json.dumps({"step": name, "owner": owner}).encode()
    while True:
        try:
            before, version = bucket.read(POINTER)
        except MissingError:
            try:
                bucket.create(POINTER, content)
                return
            except ChangedError:
                continue
        if _owner_in(before) > owner:
            return
        try:
            bucket.replace(POINTER, content, version=version)
            return
        except ChangedError:
            continue


def _owner_in(pointer: bytes) -> int:
    try:
        return int(json.loads(pointer)["owner"])
    except (ValueError, KeyError, TypeError):
        return 0


def fetch(bucket: Bucket, stored: StoredStep, manifest: Manifest, folder: Path) -> None:
    """Copy a step into a new folder of the disk, durably; the manifest comes last. Contents are not compared yet."""
    below = f"{CHECKPOINTS}/{stored.name}"
    for name, size in sorted(manifest.files.items()):
        bucket.download(f"{below}/{name}", folder / name, size=size)
    content, _ = bucket.read(f"{below}/{MANIFEST}")
    disk.write_new(folder / MANIFEST, [content])
    for path in (folder / MANIFEST, folder):
        disk.sync(path)


def delete(bucket: Bucket, stored: StoredStep) -> None:
    """Delete a step. Its manifest goes first, so that no reader takes a part of it for a checkpoint."""
    bucket.delete(stored.objects())


def surplus(
    steps: list[StoredStep], *, keep_last: int, keep_every: int, owner: int, copying: int | None
) -> list[StoredStep]:
    """Steps to delete: older than the newest `keep_last`, except multiples of `keep_every`; earlier owners' copies of a step
    that was published again; and unfinished copies of earlier owners. This owner's copy of the step `copying` stays in any case:
    newer ones may be damaged, or the run went back before them."""
    published = [stored for stored in steps if stored.has_manifest]
    newest = {stored.step: stored for stored in published}
    kept_steps = sorted(newest)[-keep_last:]
    kept = [one for step, one in newest.items() if step in kept_steps or (keep_every and step % keep_every == 0)]
    kept += [one for one in steps if one.owner == owner and one.step == copying]
    kept += [one for one in steps if one.owner > owner and not one.has_manifest]
    return [one for one in steps if one not in kept]


def copy_records(bucket: Bucket, folder: Path) -> None:
    """Copy recipe.yaml and metrics.jsonl of a run's folder, as far as they exist."""
    for name in RECORDS:
        if (folder / name).is_file():
            bucket.upload(folder / name, name)


def fetch_record(bucket: Bucket, name: str, path: Path) -> bool:
    """Copy a file of `RECORDS` to a path, whole or not at all. -> False if the bucket does not have it."""
    found = next((entry for entry in bucket.objects() if entry.name == name), None)
    if found is None:
        return False
    aside = disk.aside_of(path)
    aside.unlink(missing_ok=True)
    bucket.download(name, aside, size=found.size)
    disk.put_in_place(aside, path)
    return True
