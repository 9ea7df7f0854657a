"""Writing metrics.jsonl, the record of a run, a line an event. `recipes.schema.run_folder` says what is in it and reads it."""

import json
import os
from pathlib import Path

from recipes.schema.errors import StratumError
from recipes.schema.run_folder import Line, as_json


class JsonLines:
    """metrics.jsonl: whole lines, handed to the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab+")
            if self._stream.tell() > 0:
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read(1) != b"\n":
                    self._stream.write(b"\n")
        except OSError as error:
            raise self._full(error) from error

    def write(self, lines: list[Line]) -> None:
        text = "".join(json.dumps(as_json(line), allow_nan=False) + "\n" for line in lines)
        try:
            self._stream.write(text.encode())
            self._stream.flush()
        except OSError as error:
            raise self._full(error) from error

    def close(self) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._full(error) from error
        finally:
            self._stream.close()

    def _full(self, error: OSError) -> StratumError:
        return StratumError(
            f"{self._path} cannot be written: {error.strerror or error}. Free space or permit writing there; the same "
            f"command then continues from the newest checkpoint."
        )
