"""A real redis-server for the queue's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from real_servers import RedisProcess


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path, tmp_path / "redis.sock")
    server.start()
    yield server
    server.stop()
