"""Weights & Biases, online or into the run's folder (`wandb sync` uploads that later).

wandb 0.31 keeps points apart only by its own step (`log(step=)`), drops steps that do not increase, and appends the rest when a
run of the same id is opened with resume="allow". So no point is sent twice: online the server says which step it has, offline the
files in the run's folder do. A killed process loses the end of its file (and online what it has not uploaded); it is sent again
from metrics.jsonl.

A run may change from one mode to the other. Online, steps in offline files count as sent, because `wandb sync` uploads them and
the server would append them again. Offline, steps in the files that W&B keeps of online runs count as well.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from recipes.schema.credentials import without_credentials
from recipes.schema.foreign import open_regular
from train.record.trackers.rows import Row
from train.record.trackers.tracker import TrackedRun

_FILE_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
"""Layout of a .wandb file: W&B's header, then blocks of LevelDB's log format. A chunk has 4 bytes of checksum, 2 of length, and 1
that says whether it is a whole record (1), or its first (2), a middle (3) or its last part (4)."""


class WeightsAndBiases:
    """A run at Weights & Biases."""

    def __init__(self, run: TrackedRun, *, mode: Literal["offline", "online"], project: str) -> None:
        import wandb  # optional package

        sys.argv = [without_credentials(word) for word in sys.argv]  # W&B stores the command line
        stored = max(steps_in_files(run.folder, run.key), default=-1)
        if mode == "offline":
            stored = max(stored, *steps_in_files(run.folder, run.key, kind="run"), -1)
        self._run = wandb.init(
            project=project,
            name=run.name,
            group=run.group,
            dir=str(run.folder),
            mode=mode,
            config=run.recipe,
            id=run.key,
            resume="allow",
            # Never prompt on the terminal, never wait without a limit, and do not capture our output.
            settings=wandb.Settings(silent=True, console="off", login_timeout=10, init_timeout=30, finish_timeout=60),
        )
        self.last_step = stored if mode == "offline" else max(stored, self._run.starting_step - 1)
        # The server counts points of runs that it continues from an offline folder itself, so our step is the axis to look at.
        self._run.define_metric("*", step_metric="step")

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({**row.scalars, "step": row.step}, step=row.step)

    def close(self) -> None:
        self._run.finish()


def steps_in_files(folder: Path, key: str, *, kind: Literal["offline-run", "run"] = "offline-run") -> Iterator[int]:
    """The steps in W&B's files of a run. kind: of offline or of online starts. Offline files that a kill has cut off are mended,
    because `wandb sync` sends nothing of several files if one of them has no record."""
    for path in sorted((folder / "wandb").glob(f"{kind}-*/run-{key}.wandb")):
        from wandb.proto.wandb_internal_pb2 import Record  # optional package

        readable = 0
        for content, end in _records(path):
            readable = end
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                yield record.history.step.num
        if kind == "run":
            continue
        if readable == 0:
            shutil.rmtree(path.parent)
        elif readable < path.stat().st_size:
            os.truncate(path, readable)


def _records(path: Path) -> Iterator[tuple[bytes, int]]:
    """(record, its end in the file) of a .wandb file, up to the first record that a kill has cut off."""
    with open_regular(path) as stream:
        content = stream.read()
    at, parts = _FILE_HEADER, b""
    while at + _CHUNK_HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _CHUNK_HEADER:  # too little room for a chunk: zeros to the end of the block
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        chunk = content[at + _CHUNK_HEADER : at + _CHUNK_HEADER + size]
        if kind not in (1, 2, 3, 4) or len(chunk) < size:
            return
        at += _CHUNK_HEADER + size
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            yield parts, at
