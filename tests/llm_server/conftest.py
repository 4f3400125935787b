"""A real redis-server for the queue's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from redis_process import RedisServer


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis.sock")
    server.start()
    yield server
    server.stop()
