"""Checkpoints of a small run, and their copies in object storage."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data.bucket import run_copy
from data.bucket.bucket import Bucket, Retries
from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.manifest import MANIFEST, manifest_text, read_manifest
from recipes.schema.run_folder import name_of
from train.checkpoint.copying import StorageCopy
from train.resilience import storage_lease

FAST = Retries(count=6, first_wait_s=0.01, most_wait_s=0.05, total_s=20.0, timeout_s=0.6)


def step_of_run(pair: Path, run: Path, step: int) -> Path:
    """A published checkpoint of `step`: a copy of a real one with another step in its manifest."""
    folder = run / "checkpoints" / name_of(step)
    shutil.copytree(pair / name_of(4), folder)
    (folder / MANIFEST).write_text(manifest_text(replace(read_manifest(folder), step=step)))
    return folder


@contextmanager
def copying_to(address: str, run: Path, **config: object) -> Iterator[StorageCopy]:
    bucket = Bucket(address, retries=FAST)
    fields = {"retries": 0, "retry_wait_s": 0.01} | config
    copy = StorageCopy(bucket, storage_lease.take(bucket), run=run, config=CheckpointConfig(**fields))  # type: ignore[arg-type]
    try:
        yield copy
    finally:
        copy.close(has_failed=False)


def steps_there(bucket: Bucket) -> list[tuple[int, int]]:
    return [(stored.step, stored.owner) for stored, _ in reversed(run_copy.candidates(bucket)[0])]
