"""Fixtures that more than one test file uses: where the real data lies, and small real tokenizers."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real tokenizers, models and data sets (FEDMKT_DATA_DIR, else ../shared/data); skips where absent."""
    named = os.environ.get("FEDMKT_DATA_DIR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "tokenizers").is_dir():
        pytest.skip("no real data here: set FEDMKT_DATA_DIR to run this test")
    return folder
