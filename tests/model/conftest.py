"""Banks for tests of reading and writing them, in both versions of the format."""

from functools import partial
from pathlib import Path

import pytest
from bank_files import Maker, make_bank


@pytest.fixture(scope="module", params=[False, True], ids=["version 1", "version 2"])
def numbered(request: pytest.FixtureRequest) -> bool:
    """The format's version: documents with ids are saved in version 2."""
    return request.param


@pytest.fixture
def make(numbered: bool) -> Maker:
    return partial(make_bank, numbered=numbered)


@pytest.fixture
def saved(tmp_path: Path, make: Maker) -> Path:
    make([1, 9, 4, 6]).save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"
