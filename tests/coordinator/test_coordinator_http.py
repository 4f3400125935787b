"""HTTP manners: problems, limits, conditional and partial answers, pages, long polls, event streams."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from conftest import RedisProcess, Worlds, settings_for
from coordinator_world import PUBLIC_SET, TOKENS, World, config
from fedmkt import __version__
from fedmkt.protocol import (
    EventPage,
    FederationPage,
    FederationView,
    Health,
    ModelCard,
    PublicSetReceipt,
    RoundPage,
    SiteModel,
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


# ------------------------------------------------------------------------------------------------ artifacts


DATA = bytes(range(256)) * 5000


async def test_an_artifact_comes_whole_in_parts_or_not_again(world: World) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    whole = await world.send("GET", path, "worker")
    assert (whole.status_code, whole.content) == (200, DATA)
    assert whole.headers["etag"] == f'"{path.rsplit("/", 1)[1]}"'
    again = await world.send("GET", path, "worker", headers={"If-None-Match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=1279000-", 1279000, 1280000),
        ("bytes=1279999-9999999", 1279999, 1280000),
        ("bytes=-10", 1279990, 1280000),
        ("bytes=-9999999", 0, 1280000),
    ],
)
async def test_a_range_is_answered_with_its_bytes(world: World, asked: str, start: int, stop: int) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    part = await world.send("GET", path, "worker", headers={"Range": asked})
    assert (part.status_code, part.content) == (206, DATA[start:stop])
    assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/1280000"


@pytest.mark.parametrize("asked", ["bytes=1280000-", "bytes=-0", "bytes=5000000-6000000"])
async def test_a_range_outside_is_refused_with_the_length(world: World, asked: str) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    answer = await world.send("GET", path, "worker", headers={"Range": asked})
    assert (answer.status_code, answer.json()["code"]) == (416, "artifact.range")
    assert answer.headers["content-range"] == "bytes */1280000"


@pytest.mark.parametrize("asked", ["bytes=5-3", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "bytes=a-b"])
async def test_ranges_that_are_none_give_the_whole(world: World, asked: str) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    answer = await world.send("GET", path, "worker", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, DATA)


async def test_bytes_under_a_wrong_address_are_not_kept(world: World) -> None:
    wrong = "0" * 64
    detail = await world.refused("artifact.digest", "PUT", f"/v1/artifacts/{wrong}", "worker", b"data")
    assert "4 bytes came with SHA-256" in detail
    await world.refused("artifact.unknown", "GET", f"/v1/artifacts/{wrong}", "worker")
    await world.refused("request.malformed", "GET", "/v1/artifacts/not-a-digest", "worker")
    kept = (world.context.settings.state_dir / "objects").rglob("*")
    assert [path for path in kept if path.is_file()] == []


# ------------------------------------------------------------------------------------------------ what is handed in


async def test_the_public_set_is_stored_in_its_canonical_form(world: World) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}/public-set"
    loose = b"\n".join(json.dumps(json.loads(line), indent=None).encode() for line in PUBLIC_SET.splitlines()) + b"\n\n"
    first = await world.ask(PublicSetReceipt, "PUT", path, "operator", PUBLIC_SET)
    assert (first.digest, first.samples) == (world.public_set.digest, 12)
    assert await world.ask(PublicSetReceipt, "PUT", path, "operator", loose) == first
    assert (await world.event_kinds()).count("public_set.stored") == 1
    await world.refused("public_set.malformed", "PUT", path, "operator", b"{}\n")
    await world.refused("public_set.empty", "PUT", path, "operator", b"")
    await world.refused("public_set.too_few_samples", "PUT", path, "operator", b'{"text": "one"}\n')


async def test_a_vocabulary_that_is_none_is_refused(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    answer = await world.send("PUT", "/v1/me/vocabulary", site, b"{}")
    assert answer.status_code == 422
    assert answer.json()["code"].startswith("vocabulary.")
    assert (await world.view()).sites[0].vocabulary is None


async def test_a_model_may_be_described_anew(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    for samples in (10, 10, 20):
        card = ModelCard(model_id="tiny", architecture="gpt2", parameters=samples)
        sent = await world.send("PUT", "/v1/me/model", site, SiteModel(model=card, private_samples=samples))
        assert sent.status_code == 204
    assert (await world.view()).sites[0].private_samples == 20
    assert (await world.event_kinds()).count("site.model") == 2


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


@asynccontextmanager
async def served(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """The same application behind a real socket: in process, an answer that does not end never arrives."""
    config = uvicorn.Config(world.app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": f"Bearer {TOKENS['viewer']}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
        yield client
    server.should_exit = True
    await serving


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
    async with served(world) as client, asyncio.timeout(20):
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
    async with served(world) as client, asyncio.timeout(20), client.stream("GET", path) as response:
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
