"""Writes metrics.jsonl, the record of a run, one line per event. `recipes.schema.run_folder` defines and reads it."""

import json
import os
from pathlib import Path

from recipes.schema.errors import StratumError
from recipes.schema.run_folder import Line, as_json


class JsonLines:
    """metrics.jsonl: each line is passed to the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path, *, waits_for_space: bool = False) -> None:
        """waits_for_space: lines that cannot be written, e.g. because the disk is full, stay in memory until a later write
        succeeds, with one warning; otherwise they are an error."""
        self._path = path
        self._waits_for_space = waits_for_space
        self._unwritten = b""
        self._is_waiting = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab+", buffering=0)
            if self._stream.tell() > 0:
                # A kill may have cut the last line short: end it, so that the next line is readable.
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read(1) != b"\n":
                    self._stream.write(b"\n")
        except OSError as error:
            raise self._full(error) from error

    def write(self, lines: list[Line]) -> str | None:
        """-> a warning, when lines begin to wait in memory."""
        text = "".join(json.dumps(as_json(line), allow_nan=False) + "\n" for line in lines)
        self._unwritten += text.encode()
        try:
            self._write_out()
        except OSError as error:
            if not self._waits_for_space:
                raise self._full(error) from error
            if self._is_waiting:
                return None
            self._is_waiting = True
            reason = error.strerror or error
            return f"{self._path} cannot be written: {reason}. Its lines wait in memory until it can."
        self._is_waiting = False
        return None

    def _write_out(self) -> None:
        while self._unwritten:  # a disk that fills up may take a part
            self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]

    def close(self) -> None:
        try:
            self._write_out()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._full(error) from error
        finally:
            self._stream.close()

    def _full(self, error: OSError) -> StratumError:
        return StratumError(
            f"{self._path} cannot be written: {error.strerror or error}. Free some space or make it writable; the same "
            f"command then continues from the newest checkpoint."
        )
