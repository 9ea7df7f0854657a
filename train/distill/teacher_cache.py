"""Teacher logits cached on disk: for each row, the k most likely tokens at every position and the mass of the rest.

    FOLDER/
        request.json           what the cache holds: teacher and its weights, k, temperature, tokenizer, row length, formats
        block_3f9a0c41d27e85b6.bin     some rows, each compressed with zlib (which adds a checksum)
        block_3f9a0c41d27e85b6.idx     their keys and lengths, with a hash; written last: without it the block does not count

A row is found by its content: its key is a hash of its tokens (and of its document numbers, if the model separates
documents). So the cached logits do not depend on rank, layout, order or epoch. A row that is drawn twice is stored once,
and a recipe with other mixture weights, seed or steps can use the same folder. Each file is written under a temporary name
and then renamed, so the command that fills the folder can be killed at any moment and continues.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.store.shards import token_dtype
from data.system import disk
from recipes.schema.errors import DataError, RecipeError, refuse
from recipes.schema.facts import REQUEST, CacheRequest, named, read_request
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_rules import cache_problems
from train.distill.soft_targets import TopK

KEY_BYTES = 16
COMPRESSION_LEVEL = 1
"""Higher levels save a few percent and take several times as long (docs/log.md)."""


def row_key(tokens: np.ndarray, documents: np.ndarray | None) -> bytes:
    """Key of a row: tokens [row_tokens], and the document number of each token if the model separates documents."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=KEY_BYTES)
    if documents is not None:
        digest.update(np.ascontiguousarray(documents, dtype="<i4").tobytes())
    return digest.digest()


def batch_keys(batch: Any, *, documents: bool) -> list[bytes]:
    """Keys of a batch's rows."""
    tokens = batch.tokens.numpy()
    marks: Any = batch.document_index.numpy() if documents else [None] * len(tokens)
    return [row_key(row, mark) for row, mark in zip(tokens, marks, strict=True)]


def open_request(folder: Path, request: CacheRequest) -> None:
    """Create the folder for `request`, or check that it was made for it. RecipeError names what differs."""
    path = folder / REQUEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, json.dumps(asdict(request), indent=1))
        return
    found = asdict(read_request(folder))
    differing = [
        f"{key}: {found[key]!r} there, {value!r} now" for key, value in asdict(request).items() if found[key] != value
    ]
    # The fingerprint identifies the weights: a copy of the checkpoint in another folder is the same teacher.
    if any(not text.startswith(("teacher: ", "step: ")) for text in differing):
        raise RecipeError(
            f"{folder} was written with other settings:\n  " + "\n  ".join(differing) + "\nUse another "
            "objective.teacher_cache."
        )


def write_block(folder: Path, keys: Sequence[bytes], rows: Sequence[TopK], request: CacheRequest) -> int:
    """Write rows of top-k logits ([row_tokens, k] each) as one block. -> bytes written. One rank calls it.

    The name is a hash of the keys: writing the same rows again replaces the block with equal bytes.
    """
    frames = [zlib.compress(_pack(row, request), COMPRESSION_LEVEL) for row in rows]
    name = f"block_{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}"
    disk.write_bytes(folder / f"{name}.bin", b"".join(frames))
    lengths = np.asarray([len(frame) for frame in frames], dtype="<i8").tobytes()
    body = b"".join(keys) + lengths
    digest = hashlib.sha256(body).digest()
    disk.write_bytes(folder / f"{name}.idx", len(frames).to_bytes(8, "little") + body + digest)
    return sum(map(len, frames))


@dataclass(frozen=True)
class _StoredRow:
    """Where a row's logits are stored."""

    path: Path
    offset: int
    length: int


class TeacherCache:
    """A folder of cached teacher logits, opened for reading."""

    def __init__(self, folder: Path, *, top_k: int = 0) -> None:
        """top_k: use fewer tokens than are stored; 0 uses all. DataError if an index is damaged."""
        self.folder = folder
        self.request = read_request(folder)
        self.top_k = top_k or self.request.top_k
        self._stored: dict[bytes, _StoredRow] = {}
        for index in sorted(folder.glob("block_*.idx")):
            self._stored |= _read_index(index)

    @classmethod
    def open(cls, recipe: Recipe, *, tokenizer: str | None) -> "TeacherCache":
        """The cache that a recipe names, checked against the recipe. RecipeError names what does not fit."""
        objective = recipe.objective
        assert objective.teacher_cache is not None
        folder = Path(objective.teacher_cache)
        cache = cls(folder, top_k=objective.top_k)
        teacher = named(objective.teacher) if objective.teacher is not None else None
        refuse(cache_problems(recipe, cache.request, tokenizer=tokenizer, teacher=teacher))
        return cache

    def __len__(self) -> int:
        """Number of stored rows."""
        return len(self._stored)

    def keys(self) -> Iterable[bytes]:
        """Keys of the stored rows."""
        return self._stored.keys()

    def check_rows(self, batch: Any) -> None:
        """DataError if a row of the batch is not stored. Looks up keys only; reads no logits."""
        for index, key in enumerate(batch_keys(batch, documents=self.request.documents)):
            if key not in self._stored:
                raise self._missing(batch, index)

    def _missing(self, batch: Any, index: int) -> DataError:
        return DataError(
            f"{self.folder} has no teacher logits for the row at position {int(batch.positions[index]):,}: it was written for "
            f"other data, another order or fewer steps, or it is incomplete. Add the missing rows: stratum teacher-cache with "
            f"this recipe; it continues where it stopped."
        )

    def read(self, batch: Any, *, documents: bool) -> TopK:
        """Top-k logits of a batch's rows, [rows, row_tokens, k]. DataError for a row that is missing or damaged."""
        rows = [self._row(key, batch, index) for index, key in enumerate(batch_keys(batch, documents=documents))]
        return TopK(*(torch.stack([getattr(row, name) for row in rows]) for name in ("ids_NK", "log_p_NK", "rest_N")))

    def _row(self, key: bytes, batch: Any, index: int) -> TopK:
        stored = self._stored.get(key)
        if stored is None:
            raise self._missing(batch, index)
        with stored.path.open("rb") as stream:
            stream.seek(stored.offset)
            frame = stream.read(stored.length)
        try:
            row = _unpack(zlib.decompress(frame), self.request)
        except (zlib.error, ValueError) as error:
            raise DataError(
                f"{stored.path} is damaged at byte {stored.offset:,} ({error}). Remove it and its .idx and run "
                f"stratum teacher-cache again."
            ) from error
        return reduce_to_k(row, self.top_k)


def reduce_to_k(targets: TopK, k: int) -> TopK:
    """Only the k most likely tokens; the mass of the others is added to the rest."""
    if k >= targets.ids_NK.shape[-1]:
        return targets
    dropped = targets.log_p_NK[..., k:].double().exp().sum(-1)
    return TopK(targets.ids_NK[..., :k], targets.log_p_NK[..., :k], (targets.rest_N.double() + dropped).float())


def _pack(targets: TopK, request: CacheRequest) -> bytes:
    ids = targets.ids_NK.numpy().astype(token_dtype(request.vocab))
    log_p = targets.log_p_NK.numpy().astype(f"<{np.dtype(request.values).str[1:]}")
    return b"".join(_byte_planes(part) for part in (ids, log_p, targets.rest_N.numpy().astype("<f4")))


def _byte_planes(numbers: np.ndarray) -> bytes:
    """The lowest byte of all numbers, then the next byte, and so on: similar bytes are adjacent and compress better."""
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


def _from_byte_planes(raw: bytes, dtype: np.dtype[Any]) -> np.ndarray:
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)


def _unpack(raw: bytes, request: CacheRequest) -> TopK:
    tokens, k = request.row_tokens, request.top_k
    ids_type, log_p_type = token_dtype(request.vocab), np.dtype(request.values)
    sizes = [tokens * k * ids_type.itemsize, tokens * k * log_p_type.itemsize, tokens * 4]
    if len(raw) != sum(sizes):
        raise ValueError(f"a row of {len(raw):,} bytes, {sum(sizes):,} expected")
    ends = np.cumsum(sizes)
    return TopK(
        torch.from_numpy(_from_byte_planes(raw[: ends[0]], ids_type).reshape(tokens, k).astype(np.int64)),
        torch.from_numpy(_from_byte_planes(raw[ends[0] : ends[1]], log_p_type).reshape(tokens, k).astype(np.float32)),
        torch.from_numpy(_from_byte_planes(raw[ends[1] :], np.dtype("<f4"))),
    )


def _read_index(path: Path) -> dict[bytes, _StoredRow]:
    raw = path.read_bytes()
    count, body = int.from_bytes(raw[:8], "little"), raw[8:-32]
    data = path.with_suffix(".bin")
    if len(body) != count * (KEY_BYTES + 8) or hashlib.sha256(body).digest() != raw[-32:]:
        raise DataError(f"{path} is damaged. Remove it and {data.name} and run stratum teacher-cache again.")
    lengths = np.frombuffer(body, "<i8", offset=count * KEY_BYTES)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    found = data.stat().st_size if data.exists() else -1
    if found != offsets[-1]:
        raise DataError(
            f"{data} is {found:,} bytes long, but its index says {offsets[-1]:,}. Remove both and run "
            f"stratum teacher-cache again."
        )
    keys = [body[start : start + KEY_BYTES] for start in range(0, count * KEY_BYTES, KEY_BYTES)]
    return {key: _StoredRow(data, int(offsets[n]), int(lengths[n])) for n, key in enumerate(keys)}
