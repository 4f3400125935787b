"""A small cut of the load: no errors, and nothing that grows. Times are for `make load`."""

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from load_http import Connection
from load_parts import KEPT_FILES, UNLIMITED, crowd, play_round, soak
from load_world import TOKENS, Federation, ask, coordinator, load_config, many_files

pytestmark = [pytest.mark.e2e, pytest.mark.anyio, pytest.mark.timeout(180)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_agents_that_wait_and_sites_that_upload_at_once_are_all_served(tmp_path: Path) -> None:
    many_files(1000)
    found = await crowd(tmp_path, agents=100, uploaders=8, mib=2)
    assert (found["agents"], found["uploads_at_once"], found["errors"]) == (100, 8, 0)
    assert found["files_left"] <= KEPT_FILES < 108


async def test_rounds_leave_no_task_and_no_open_file_behind(tmp_path: Path) -> None:
    found = await soak(tmp_path, rounds=10, warm_up=4, samples=3)
    assert found["files_change"] <= 6  # two connections to the database more
    assert found["tasks_change"] <= 1
    assert 0 < found["database_bytes_per_round"] < 100_000


async def test_a_real_coordinator_tells_prometheus_of_its_rounds(tmp_path: Path) -> None:
    with coordinator(tmp_path / "coordinator", **UNLIMITED) as server:
        await server.started()
        federation = Federation.of(server.url, load_config(["north", "south"]))
        await federation.set_up()
        for _ in range(2):
            await play_round(federation)
        viewer = Connection(server.url, TOKENS["viewer"])
        page = (await ask(viewer, "GET", "/metrics")).body.decode()
        await viewer.close()
        await federation.close()
    found = {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert found["fedmkt_rounds", ("completed",)] == 2
    assert found["fedmkt_round_duration_seconds_count", ("completed",)] == 2
    assert found["fedmkt_uploads_total", ("accepted",)] == 4
    assert found["fedmkt_job_transitions_total", ("distill", "done")] == 2
    assert found["fedmkt_job_queue_depth", ()] == 0
    assert found["fedmkt_keeper_tick_duration_seconds_count", ()] > 0
    assert found["fedmkt_keeper_lag_seconds", ()] < 60
    assert found["process_resident_memory_bytes", ()] > 10_000_000
    lines = [json.loads(line) for line in (tmp_path / "coordinator" / "coordinator.log").read_text().splitlines()]
    secrets = [*TOKENS.values(), *(site.connection.token for site in federation.sites)]
    written = json.dumps(lines)
    assert not [secret for secret in secrets if secret and secret in written]
    assert {"request_id", "trace_id", "route", "status", "seconds"} <= next(
        line for line in lines if line["event"] == "request.answered"
    ).keys()
