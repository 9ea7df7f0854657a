"""Checkpoints for several test files."""

from pathlib import Path

import pytest
from crashes import train_on
from ranks import run_ranks


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, of two ranks. Not to be modified."""
    folder = tmp_path_factory.mktemp("pair")
    run_ranks(2, train_on, 2, folder, 4)
    return folder
