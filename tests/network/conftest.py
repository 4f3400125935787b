"""One coordinator for all the tests of a file; each has a federation of its own."""

from collections.abc import Iterator

import pytest

from live_coordinator import LiveCoordinator
from network_world import UploadingSite, uploading_site


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCoordinator]:
    live = LiveCoordinator(tmp_path_factory.mktemp("coordinator"))
    live.start()
    yield live
    live.stop()


@pytest.fixture
def site(coordinator: LiveCoordinator, request: pytest.FixtureRequest) -> UploadingSite:
    name = "".join(each if each.isalnum() else "-" for each in request.node.name.lower())[-60:].strip("-")
    return uploading_site(coordinator, name)
