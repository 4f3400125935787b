"""HTTP manners: problems, limits, conditional and partial answers, pages, long polls, event streams."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from coordinator_servers import RedisProcess, Worlds, settings_for
from coordinator_world import TOKENS, World, config, served
from fedmkt import __version__
from fedmkt.protocol import (
    EventPage,
    FederationPage,
    FederationView,
    Health,
    RoundPage,
    Version,
)
from fedmkt_coordinator.limits import limit_bytes

pytestmark = [pytest.mark.anyio, pytest.mark.services]


# ------------------------------------------------------------------------------------------------ problems, limits


async def test_what_the_framework_refuses_is_a_problem_too(world: World) -> None:
    await world.refused("http.not_found", "GET", "/v1/nothing")
    await world.refused("http.method_not_allowed", "PATCH", "/v1/federations")
    typed = {"headers": {"Content-Type": "application/json"}}
    detail = await world.refused("request.malformed", "POST", "/v1/federations", "operator", b"{not json", **typed)
    assert "JSON" in detail
    small = b'{"name": "UPPER"}'
    detail = await world.refused("request.malformed", "POST", "/v1/federations", "operator", small, **typed)
    assert "body.name" in detail
    assert "body.sites" in detail


async def test_a_federation_that_cannot_work_is_refused_as_a_whole(world: World) -> None:
    body = config().model_dump() | {"schedule": {"quorum": 3}}
    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    answer = await world.http.post("/v1/federations", json=body, headers=headers)
    assert answer.status_code == 422
    assert "quorum is 3 but only 2 sites are named" in answer.json()["detail"]


async def test_the_same_federation_twice_is_one_and_another_of_its_name_is_refused(world: World) -> None:
    first = await world.send("POST", "/v1/federations", "operator", config())
    again = await world.send("POST", "/v1/federations", "operator", config())
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["federation_id"] == again.json()["federation_id"]
    detail = await world.refused("federation.exists", "POST", "/v1/federations", "operator", config(seed=1))
    assert first.json()["federation_id"] in detail


async def test_a_failure_of_ours_is_a_problem_without_its_inside(world: World) -> None:
    await world.create()
    engine = world.context.store.engine
    async with engine.connect() as connection:
        await connection.exec_driver_sql("DROP TABLE events")
        await connection.exec_driver_sql("COMMIT")
    path = f"/v1/federations/{world.federation_id}/events"
    detail = await world.refused("internal", "GET", path, "viewer")
    assert "events" not in detail


def test_bodies_have_limits_by_route() -> None:
    assert limit_bytes("POST", "/v1/federations") == 1 << 20
    assert limit_bytes("PUT", "/v1/uploads/upload_1/chunks/7") == (1 << 20) + 4096
    assert limit_bytes("PUT", "/v1/me/vocabulary") == 64 << 20
    assert limit_bytes("PUT", "/v1/federations/fed_1/public-set") == 256 << 20
    assert limit_bytes("PUT", "/v1/artifacts/ab") == 4 << 30


async def test_a_declared_length_is_refused_before_a_byte_is_read(world: World) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"Content-Length": str((1 << 20) + 1), "Authorization": f"Bearer {TOKENS['operator']}"}
    answer = await world.http.post("/v1/federations", content=never(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body.too_large")
    assert "1048577 bytes, at most 1048576" in answer.json()["detail"]


async def test_an_undeclared_length_is_refused_as_soon_as_it_is_too_long(world: World) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    answer = await world.http.post("/v1/federations", content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body.too_large")
    assert sent <= (1 << 20) + (1 << 17)


# ------------------------------------------------------------------------------------------------ operations


async def test_ready_names_what_answers_and_what_does_not(world: World) -> None:
    assert await world.ask(Health, "GET", "/healthz", None) == Health(status="ok")
    ready = await world.ask(Health, "GET", "/readyz", None)
    assert ready == Health(status="ok", checks={"database": "ok", "artifacts": "ok", "redis": "ok"})
    assert await world.ask(Version, "GET", "/version", None) == Version(version=__version__, protocol_version=1)


async def test_without_its_database_it_is_not_ready(world: World) -> None:
    await world.context.store.close()
    folder = world.context.settings.state_dir
    (folder / "fedmkt.sqlite").rename(folder / "gone")
    (folder / "fedmkt.sqlite").mkdir()
    answer = await world.send("GET", "/readyz", None)
    assert answer.status_code == 503
    assert answer.json()["status"] == "unavailable"
    assert "unable to open database" in answer.json()["checks"]["database"]


async def test_the_api_describes_itself(world: World) -> None:
    api = (await world.send("GET", "/openapi.json", None)).json()
    assert api["openapi"].startswith("3.1")
    assert "HTTPBearer" in api["components"]["securitySchemes"]
    calls = [call for path in api["paths"].values() for call in path.values()]
    assert all(call.get("summary") and "default" in call["responses"] for call in calls)
    assert set(api["components"]["schemas"]["Problem"]["required"]) == {"type", "title", "status", "code", "detail"}
    upload = api["paths"]["/v1/uploads/{upload_id}/chunks/{index}"]["put"]
    assert list(upload["requestBody"]["content"]) == ["application/octet-stream"]


# ------------------------------------------------------------------------------------------------ conditional, pages


async def test_what_dashboards_poll_is_not_sent_twice(collecting: World) -> None:
    world = collecting
    federation = f"/v1/federations/{world.federation_id}"
    polled = ["/v1/federations", federation, *(f"{federation}/{part}" for part in ("rounds", "events", "adapters"))]
    polled.append(f"/v1/rounds/{(await world.round()).round_id}")
    world.clock.move(1)
    for path in polled:
        first = await world.send("GET", path, "viewer")
        etag = first.headers["etag"]
        again = await world.send("GET", path, "viewer", headers={"If-None-Match": f'"other", W/{etag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    etag = (await world.send("GET", federation, "viewer")).headers["etag"]
    await world.upload(world.sites["north"], await world.round())
    changed = await world.send("GET", federation, "viewer", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


async def test_lists_come_in_pages_to_their_end(world: World) -> None:
    names = [f"federation-{number}" for number in range(5)]
    for name in names:
        await world.create(config(name))
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await world.ask(FederationPage, "GET", f"/v1/federations?limit=2&cursor={cursor}", "viewer")
        found += [each.config.name for each in page.items]
        assert len(page.items) <= 2
        cursor = page.next_cursor
    assert found == names
    await world.refused("cursor.invalid", "GET", f"/v1/federations/{world.federation_id}/rounds?cursor=x", "viewer")
    await world.refused("request.malformed", "GET", "/v1/federations?limit=0", "viewer")


async def test_rounds_are_listed_newest_first_and_events_oldest_first(ready: World) -> None:
    world = ready
    for _ in range(3):
        await world.request_rounds()
        await world.send("POST", f"/v1/rounds/{(await world.view()).current_round.round_id}/cancel")  # type: ignore[union-attr] # a round runs
    base = f"/v1/federations/{world.federation_id}"
    page = await world.ask(RoundPage, "GET", f"{base}/rounds?limit=2", "viewer")
    assert ([each.number for each in page.items], page.next_cursor) == ([3, 2], "2")
    page = await world.ask(RoundPage, "GET", f"{base}/rounds?limit=2&cursor=2", "viewer")
    assert ([each.number for each in page.items], page.next_cursor) == ([1], None)
    events = await world.ask(EventPage, "GET", f"{base}/events?limit=2", "viewer")
    assert ([each.sequence for each in events.items], events.next_cursor) == ([1, 2], "2")
    events = await world.ask(EventPage, "GET", f"{base}/events?limit=200&cursor=2", "viewer")
    assert events.items[0].sequence == 3
    assert events.next_cursor is None
    last = events.items[-1].sequence
    assert (await world.ask(EventPage, "GET", f"{base}/events?cursor={last}", "viewer")).items == ()


# ------------------------------------------------------------------------------------------------ waiting


async def test_a_long_poll_answers_as_soon_as_there_is_work(ready: World) -> None:
    world = ready
    north = world.sites["north"]
    waiting = asyncio.create_task(world.task(north, wait_s=30))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await world.request_rounds()
    async with asyncio.timeout(3):
        assert (await waiting)["kind"] == "train_and_upload"


async def test_a_long_poll_without_news_ends_in_time(ready: World) -> None:
    world = ready
    began = asyncio.get_running_loop().time()
    task = await world.task(world.sites["north"], wait_s=0.3)
    assert task["kind"] == "wait"
    assert 0.3 <= asyncio.get_running_loop().time() - began < 3


async def test_a_long_poll_of_a_site_that_is_revoked_meanwhile_ends_with_that(ready: World) -> None:
    world = ready
    north = world.sites["north"]
    waiting = asyncio.create_task(world.send("GET", "/v1/me/task?wait_s=30", north))
    await asyncio.sleep(0.1)
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    async with asyncio.timeout(3):
        assert (await waiting).json()["code"] == "site.revoked"


async def test_a_service_that_stops_lets_long_polls_answer(ready: World) -> None:
    world = ready
    waiting = asyncio.create_task(world.task(world.sites["north"], wait_s=30))
    await asyncio.sleep(0.1)
    world.context.wakeups.stop()
    async with asyncio.timeout(3):
        assert (await waiting)["kind"] == "wait"


def viewer(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {TOKENS['viewer']}"})


async def events_of(lines: AsyncIterator[str], count: int) -> list[tuple[str, str, str]]:
    """(id, event, kind in the data) of the next events of a stream."""
    found: list[tuple[str, str, str]] = []
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])["kind"]))
            fields = {}
            if len(found) == count:
                break
    return found


async def test_events_are_followed_live_and_taken_up_again(world: World) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}/events/stream"
    async with served(world) as url, viewer(url) as client, asyncio.timeout(20):
        async with client.stream("GET", path) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.aiter_lines()
            assert await events_of(lines, 1) == [("1", "federation.created", "federation.created")]
            await world.put_public_set()
            assert await events_of(lines, 1) == [("2", "public_set.stored", "public_set.stored")]
        await world.request_rounds()
        async with client.stream("GET", path, headers={"Last-Event-ID": "1"}) as response:
            found = await events_of(response.aiter_lines(), 2)
        assert [each[0] for each in found] == ["2", "3"]
        unknown = await client.get("/v1/federations/fed_00000000000000000000/events/stream")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "federation.unknown")


async def test_a_stream_ends_when_the_service_stops(world: World) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}/events/stream"
    async with served(world) as url, viewer(url) as client, asyncio.timeout(20), client.stream("GET", path) as response:
        lines = response.aiter_lines()
        await events_of(lines, 1)
        world.context.wakeups.stop()
        assert [line async for line in lines if line and not line.startswith(":")] == []


async def test_what_one_replica_commits_wakes_another(ready: World, worlds: Worlds, redis_server: RedisProcess) -> None:
    world = ready
    other = await worlds.open(settings_for(world.context.settings.state_dir, redis_server.url, poll_recheck_s=30))
    other.federation_id = world.federation_id
    for _ in range(100):
        if other.context.wakeups.listening:
            break
        await asyncio.sleep(0.02)
    waiting = asyncio.create_task(other.task(world.sites["north"], wait_s=30))
    await asyncio.sleep(0.1)
    await world.request_rounds()
    async with asyncio.timeout(3):
        assert (await waiting)["kind"] == "train_and_upload"
    view = await other.ask(FederationView, "GET", f"/v1/federations/{world.federation_id}", "viewer")
    assert view.current_round is not None
