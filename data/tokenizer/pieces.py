"""SentencePiece `.model` files, through the `sentencepiece` library.

SentencePiece may normalise a text and put a space before it, as the file says. Decoding returns the normalised text, and
bytes per token are counted on it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data.tokenizer.backend import Backend
from recipes.schema.errors import DataError

FILE = "tokenizer.model"
_SPACE = "▁"


class SentencePiece(Backend):
    """A loaded `.model`."""

    file = FILE
    is_exact = False

    def __init__(self, path: Path, content: bytes) -> None:
        """path: for messages. content: of the file. DataError if the library refuses it."""
        self._model = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise DataError(
                f"{path} is not a SentencePiece model: {error}. Set data.tokenizer.path to another file."
            ) from error
        p = self._processor
        self.vocab_size = p.vocab_size()
        numbers = range(self.vocab_size)
        self._silent = [p.is_control(n) or p.is_unknown(n) or p.is_unused(n) for n in numbers]
        self.special = {p.id_to_piece(n): n for n in numbers if p.is_control(n) or p.is_unknown(n)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of several texts."""
        return [
            np.asarray(ids, dtype=np.int64) for ids in self._processor.encode(texts, out_type=int, num_threads=threads)
        ]

    def image(self, text: str) -> str:
        """The text after normalisation by the model's rules."""
        normal: str = self._processor.normalize(text)
        return normal

    @property
    def unknown(self) -> int | None:
        """Id of the unknown piece."""
        number: int = self._processor.unk_id()
        return number if number >= 0 else None

    def bytes_of(self, token: int) -> bytes:
        """Bytes of an id, a space for each `▁`."""
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is not in the tokenizer's vocabulary of {self.vocab_size:,}.")
        if self._silent[token]:
            return b""
        piece = self._processor.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(token) else piece.replace(_SPACE, " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without the space that the library put before the text."""
        text: str = self._processor.decode([int(n) for n in ids if not self._silent[n]])
        return text

    def content(self) -> Any:
        """Pieces, scores, kinds, and the rules of normalisation, but not how the model was trained."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        pieces = hashlib.sha256()
        for piece in model.pieces:
            text = piece.piece.encode()
            pieces.update(
                len(text).to_bytes(4, "little") + text + np.float32(piece.score).tobytes() + bytes([piece.type])
            )
        trained = model.trainer_spec
        return {
            "model": "sentencepiece",
            "kind": int(trained.model_type),
            "byte_fallback": bool(trained.byte_fallback),
            "space_behind": bool(trained.treat_whitespace_as_suffix),
            "normalizer": hashlib.sha256(model.normalizer_spec.SerializeToString(deterministic=True)).hexdigest(),
            "pieces": pieces.hexdigest(),
        }

    def tokenizer_json(self) -> dict[str, Any]:
        """The model as a `tokenizer.json`, in the form of Llama 2's and Gemma's. DataError for models that have no such form."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        trained, rules = model.trainer_spec, model.normalizer_spec
        kinds = model.SentencePiece
        obstacles = {
            f"pieces are chosen by the {trained.ModelType.Name(trained.model_type).lower()} method, not by BPE":
                trained.model_type != trained.BPE,
            f"letters are replaced (normalisation {rules.name!r})": bool(rules.precompiled_charsmap),
            "several spaces become one": rules.remove_extra_whitespaces,
            "spaces belong to the word before": trained.treat_whitespace_as_suffix,
            "spaces are not written as \u2581": not rules.escape_whitespaces,
            "it has user-defined words and puts a space before each text": rules.add_dummy_prefix
            and any(piece.type == kinds.USER_DEFINED for piece in model.pieces),
            "pieces are marked unused": any(piece.type == kinds.UNUSED for piece in model.pieces),
        }  # fmt: skip
        if found := [text for text, applies in obstacles.items() if applies]:
            raise DataError(f"a tokenizer.json cannot represent this SentencePiece model: {'; '.join(found)}.")
        ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
        normal = [piece for piece in model.pieces if piece.type == kinds.NORMAL]
        names = {piece.piece for piece in normal}
        # SentencePiece joins the two neighbours whose union has the best score, so merges are listed in the order of scores.
        merges = [
            [text[:cut], text[cut:]]
            for text in (piece.piece for piece in sorted(normal, key=lambda piece: (-piece.score, ids[piece.piece])))
            for cut in range(1, len(text))
            if text[:cut] in names and text[cut:] in names
        ]
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [
            {"id": ids[piece.piece], "content": piece.piece.replace(_SPACE, " "), **plain, "special": not is_text}
            for piece in model.pieces
            if (is_text := piece.type == kinds.USER_DEFINED) or piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        ]
        space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        before = {"type": "Prepend", "prepend": _SPACE}
        back: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if rules.add_dummy_prefix:
            back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [before, space]} if rules.add_dummy_prefix else space,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": back},
            "model": {
                "type": "BPE",
                "unk_token": self._processor.id_to_piece(self._processor.unk_id()),
                "fuse_unk": True,
                "byte_fallback": trained.byte_fallback,
                "vocab": ids,
                "merges": merges,
            },
        }

    def save(self, path: Path) -> None:
        """Write the file as it was read."""
        path.write_bytes(self._model)
