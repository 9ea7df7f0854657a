"""A teacher's answers, kept on disk: for each row its k most likely next tokens at every place, and the mass of the rest.

    FOLDER/
        request.json           what was asked: teacher and its weights, k, temperature, tokenizer, row length, number formats
        block_3f9a0c41d27e85b6.bin     some rows, each compressed by zlib (which adds a checksum)
        block_3f9a0c41d27e85b6.idx     their keys and lengths, with a hash; written last: a block without it does not exist

A row is found by what it says: its key is a hash of its tokens (and of its documents, where they are told apart). So an
answer does not depend on which rank asked, on the layout, the order or the epoch; a row drawn again is answered once, and a
recipe with other weights, seed or steps uses what is there. Blocks are written whole, aside, then renamed: the command
that fills the folder can be killed at any moment and continues.
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
"""Higher levels save a few per cent at several times the time (docs/log.md)."""


def row_key(tokens: np.ndarray, documents: np.ndarray | None) -> bytes:
    """Key of a row: tokens [row_tokens], and the document of each token where they are told apart."""
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
    """Make the folder for `request`, or check that it is one for it. RecipeError names what differs."""
    path = folder / REQUEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, json.dumps(asdict(request), indent=1))
        return
    found = asdict(read_request(folder))
    differing = [
        f"{key}: {found[key]!r} there, {value!r} now" for key, value in asdict(request).items() if found[key] != value
    ]
    if any(
        not text.startswith(("teacher: ", "step: ")) for text in differing
    ):  # the same weights elsewhere are the same
        raise RecipeError(
            f"{folder} holds a teacher's answers to another request:\n  " + "\n  ".join(differing) + "\nUse another "
            "objective.teacher_cache."
        )


def write_block(folder: Path, keys: Sequence[bytes], answers: Sequence[TopK], request: CacheRequest) -> int:
    """Write the answers to some rows ([row_tokens, k] each) under a name made of their keys. -> bytes. One rank calls it."""
    frames = [zlib.compress(_pack(answer, request), COMPRESSION_LEVEL) for answer in answers]
    name = f"block_{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}"
    disk.write_bytes(folder / f"{name}.bin", b"".join(frames))
    lengths = np.asarray([len(frame) for frame in frames], dtype="<i8").tobytes()
    body = b"".join(keys) + lengths
    digest = hashlib.sha256(body).digest()
    disk.write_bytes(folder / f"{name}.idx", len(frames).to_bytes(8, "little") + body + digest)
    return sum(map(len, frames))


@dataclass(frozen=True)
class _Place:
    """Where a row's answer lies."""

    path: Path
    offset: int
    length: int


class KeptAnswers:
    """A folder of answers, opened for reading."""

    def __init__(self, folder: Path, *, top_k: int = 0) -> None:
        """top_k: use fewer tokens than are kept; 0 uses all. DataError for a damaged index."""
        self.folder = folder
        self.request = read_request(folder)
        self.top_k = top_k or self.request.top_k
        self._places: dict[bytes, _Place] = {}
        for index in sorted(folder.glob("block_*.idx")):
            self._places |= _read_index(index)

    @classmethod
    def open(cls, recipe: Recipe, *, tokenizer: str | None) -> "KeptAnswers":
        """The answers a recipe names, checked against it. RecipeError names what does not fit."""
        objective = recipe.objective
        assert objective.teacher_cache is not None
        folder = Path(objective.teacher_cache)
        answers = cls(folder, top_k=objective.top_k)
        teacher = named(objective.teacher) if objective.teacher is not None else None
        refuse(cache_problems(recipe, answers.request, tokenizer=tokenizer, teacher=teacher))
        return answers

    def __len__(self) -> int:
        """Rows that are answered."""
        return len(self._places)

    def keys(self) -> Iterable[bytes]:
        """Keys of the rows that are answered."""
        return self._places.keys()

    def check_rows(self, batch: Any) -> None:
        """DataError where one of a batch's rows has no answer. Reads no answer."""
        for index, key in enumerate(batch_keys(batch, documents=self.request.documents)):
            if key not in self._places:
                raise self._missing(batch, index)

    def _missing(self, batch: Any, index: int) -> DataError:
        return DataError(
            f"{self.folder} holds no answer to the row at position {int(batch.positions[index]):,}: it was filled for other "
            f"data, another order or fewer steps, or not to its end. Let the teacher answer the rest: stratum "
            f"teacher-cache with this recipe; it continues where it stopped."
        )

    def read(self, batch: Any, *, documents: bool) -> TopK:
        """The answers to a batch's rows, [rows, row_tokens, k]. DataError for a row without one, or a damaged one."""
        rows = [self._row(key, batch, index) for index, key in enumerate(batch_keys(batch, documents=documents))]
        return TopK(*(torch.stack([getattr(row, name) for row in rows]) for name in ("ids_NK", "log_p_NK", "rest_N")))

    def _row(self, key: bytes, batch: Any, index: int) -> TopK:
        place = self._places.get(key)
        if place is None:
            raise self._missing(batch, index)
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            frame = stream.read(place.length)
        try:
            answer = _unpack(zlib.decompress(frame), self.request)
        except (zlib.error, ValueError) as error:
            raise DataError(
                f"{place.path} is damaged at byte {place.offset:,} ({error}). Remove it and its .idx and run "
                f"stratum teacher-cache again."
            ) from error
        return fewer(answer, self.top_k)


def fewer(answer: TopK, k: int) -> TopK:
    """The same answer with only its k most likely tokens; the others join the rest."""
    if k >= answer.ids_NK.shape[-1]:
        return answer
    dropped = answer.log_p_NK[..., k:].double().exp().sum(-1)
    return TopK(answer.ids_NK[..., :k], answer.log_p_NK[..., :k], (answer.rest_N.double() + dropped).float())


def _pack(answer: TopK, request: CacheRequest) -> bytes:
    ids = answer.ids_NK.numpy().astype(token_dtype(request.vocab))
    log_p = answer.log_p_NK.numpy().astype(f"<{np.dtype(request.values).str[1:]}")
    return b"".join(_byte_planes(part) for part in (ids, log_p, answer.rest_N.numpy().astype("<f4")))


def _byte_planes(numbers: np.ndarray) -> bytes:
    """First the lowest byte of all numbers, then the next: what is alike lies together, and compresses."""
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


def _read_index(path: Path) -> dict[bytes, _Place]:
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
            f"{data} is {found:,} bytes long, its index says {offsets[-1]:,}. Remove both and run "
            f"stratum teacher-cache again."
        )
    keys = [body[start : start + KEY_BYTES] for start in range(0, count * KEY_BYTES, KEY_BYTES)]
    return {key: _Place(data, int(offsets[n]), int(lengths[n])) for n, key in enumerate(keys)}
