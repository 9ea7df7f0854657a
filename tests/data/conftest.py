"""Small texts and a prepared folder shared by the data tests."""

from pathlib import Path

import pytest
from texts import prepared_in, write_texts

from recipes.schema.data import DataConfig


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


@pytest.fixture
def prepared(texts: Path) -> DataConfig:
    return prepared_in(texts)
