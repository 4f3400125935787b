"""The world that the tests with live agents share, one for each file."""

from collections.abc import Iterator
from typing import Any

import pytest

from agent_world import SITES, Recording, World
from fedmkt_llm_server.main import serve as serve_llm
from fedmkt_llm_server.settings import Settings as LlmSettings
from live_coordinator import TOKENS, Background, LiveCoordinator, stories
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "llm", "llama")
    for seed, (site, (architecture, first)) in enumerate(SITES.items()):
        save_tiny(folder / site, architecture, seed=seed)
        (folder / f"{site}.jsonl").write_bytes(stories(first, 30))
    coordinator = LiveCoordinator(folder / "coordinator")
    made = World(coordinator, folder)
    coordinator.middleware = lambda app: app.add_middleware(Recording, bodies=made.bodies)
    coordinator.start()
    options: dict[str, Any] = {
        "coordinator_url": coordinator.url,
        "worker_token": TOKENS["worker"],
        "model": str(folder / "llm"),
        "state_dir": folder / "llm-server",
        "torch_threads": 1,
        "registration_interval_s": 0.1,
    }
    llm = Background(serve_llm, LlmSettings(**options))
    yield made
    assert llm.end() is None
    coordinator.stop()
