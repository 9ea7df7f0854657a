"""The smoke recipe made tiny, with the test's own data, as command-line arguments."""

from pathlib import Path

import pytest
from processes import RUN, SHAPE
from texts import overrides_of, prepared_in, write_texts

from recipes.schema.data import DataConfig


@pytest.fixture
def words(prepared: DataConfig, tmp_path: Path) -> list[str]:
    """Overrides that make the smoke recipe tiny, over this test's own data."""
    return ["-cn", "smoke", *SHAPE, *RUN, *overrides_of(prepared), f"run.folder={tmp_path}"]


@pytest.fixture
def prepared(texts: Path) -> DataConfig:
    return prepared_in(texts)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")
