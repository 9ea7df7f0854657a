"""One disk with prepared data and checkpoints for all tests of rules."""

import pytest
from recipes_drawn import Place, place_in


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place_in(tmp_path_factory.mktemp("drawn"))
