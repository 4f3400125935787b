"""HTTP manners: problems, limits, conditional and partial answers, pages, long polls, event streams."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy import event

from coordinator_servers import Worlds, settings_for
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
from fedmkt_coordinator.ids import secret_hash
from fedmkt_coordinator.limits import limit_bytes
from fedmkt_coordinator.routes.conditional import FRESH_S
from fedmkt_coordinator.routes.paging import cursor_after
from fedmkt_coordinator.store import Store
from fedmkt_coordinator.store.versions import Seen
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


# ------------------------------------------------------------------------------------------------ problems, limits


async def test_what_the_framework_refuses_is_a_problem_too(world: World) -> None:
    await world.refused("http.not_found", "GET", "/v1/nothing")
    await world.refused("http.method_not_allowed", "PATCH", "/v1/federations")
    answer = await world.send("OPTIONS", f"/v1/artifacts/{'0' * 64}", None)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, PUT")
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
    assert "OperationalError: see that PostgreSQL runs" in answer.json()["checks"]["database"]


async def test_the_api_describes_itself(world: World) -> None:
    api = (await world.send("GET", "/openapi.json", None)).json()
    assert api["openapi"].startswith("3.1")
    assert "/v1/federations" in api["paths"]
    page = await world.send("GET", "/docs", None)
    assert (page.status_code, "/openapi.json" in page.text) == (200, True)


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
        again = await world.send("GET", path, "viewer", headers={"If-None-Match": f'"other", {etag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        other = await world.send("GET", f"{path}?limit=7", "viewer", headers={"If-None-Match": etag})
        assert other.status_code == 200
    etag = (await world.send("GET", federation, "viewer")).headers["etag"]
    await world.upload(world.sites["north"], await world.round())
    changed = await world.send("GET", federation, "viewer", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


async def test_a_poll_without_news_never_reaches_the_route(collecting: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = collecting
    path = f"/v1/rounds/{(await world.round()).round_id}"
    etag = (await world.send("GET", path, "viewer")).headers["etag"]

    def fails(*_: object) -> None:
        raise AssertionError("a transaction was opened")

    with monkeypatch.context() as patched:
        patched.setattr(type(world.context.store), "read", fails)
        again = await world.send("GET", path, "viewer", headers={"If-None-Match": etag})
    assert (again.status_code, again.headers["fedmkt-protocol"]) == (304, "1")


async def test_a_poll_is_answered_only_to_whom_may_read(collecting: World) -> None:
    world = collecting
    path = f"/v1/federations/{world.federation_id}"
    known = {"headers": {"If-None-Match": (await world.send("GET", path, "viewer")).headers["etag"]}}
    for who in ("operator", "viewer", "worker"):
        assert (await world.send("GET", path, who, **known)).status_code == 304
    await world.refused("token.missing", "GET", path, None, **known)
    await world.refused("token.invalid", "GET", path, "0" * 64, **known)
    await world.refused("role.forbidden", "GET", path, world.sites["north"], **known)
    await world.refused("federation.unknown", "GET", "/v1/federations/fed_0", "viewer", **known)


async def test_what_no_event_tells_is_told_all_the_same_after_a_while(ready: World) -> None:
    world = ready
    path = f"/v1/federations/{world.federation_id}"
    before = await world.send("GET", path, "viewer")
    world.clock.move(FRESH_S)
    await world.task(world.sites["north"])
    after = await world.send("GET", path, "viewer", headers={"If-None-Match": before.headers["etag"]})
    seen = {site["name"]: site["last_seen_at"] for site in after.json()["sites"]}
    assert seen["north"] == world.clock.now.isoformat().replace("+00:00", "Z")


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_both_databases_give_the_same_short_answer(store: Store) -> None:
    token = secret_hash("a viewer's token")
    async with store.write() as tx:
        federation, _ = await tx.add_federation(config())
        await tx.set_credential(token, "viewer", "tests")
        await tx.append(federation.id, "test.event")
    assert await store.glance.look(token, "federation", federation.id) == Seen("viewer", "1")
    assert await store.glance.look("0" * 64, "federation", "fed_0") == Seen(None, None)
    assert await store.glance.look(token, "federations", "") == Seen("viewer", "1.1")
    async with store.write() as tx:
        await tx.append(federation.id, "test.event")
        row = await tx.begin_round(federation.id, 1, 0, tx.now, [])
    assert await store.glance.look(token, "round", row.id) == Seen("viewer", "3")
    async with store.read() as tx:
        assert await tx.version("round", row.id) == await tx.version("federation", federation.id) == "3"
        assert await tx.version("federations") == "1.3"


async def test_lists_come_in_pages_to_their_end(world: World) -> None:
    names = [f"federation-{number}" for number in range(5)]
    for name in names:
        await world.create(config(name))
    found: list[str] = []
    page = await world.ask(FederationPage, "GET", "/v1/federations?limit=2", "viewer")
    found += [each.config.name for each in page.items]
    await world.create(config("federation-0a"))  # before what was read: the pages that follow do not shift
    while page.next_cursor is not None:
        page = await world.ask(FederationPage, "GET", f"/v1/federations?limit=2&cursor={page.next_cursor}", "viewer")
        assert len(page.items) <= 2
        found += [each.config.name for each in page.items]
    assert found == names
    await world.refused("request.malformed", "GET", "/v1/federations?limit=0", "viewer")


@pytest.mark.parametrize(
    "bad", ["x", "MQ", "cm91bmRzOg", "cm91bmRzOi0x", "cm91bmRzOjk5OTk5OTk5OTk5OTk5OTk5", "%00", "é"]
)
async def test_a_cursor_that_is_none_of_the_lists_is_refused(world: World, bad: str) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}/rounds"
    answer = await world.send("GET", path, "viewer", params={"cursor": bad})
    assert (answer.status_code, answer.json()["code"]) in [(422, "cursor.invalid"), (422, "request.malformed")]


async def test_a_cursor_of_another_list_is_refused(world: World) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}"
    detail = await world.refused("cursor.invalid", "GET", f"{path}/rounds?cursor={cursor_after('events', 3)}", "viewer")
    assert detail.endswith("is no next_cursor of the list of rounds; begin again without a cursor")


async def test_rounds_are_listed_newest_first_and_events_oldest_first(ready: World) -> None:
    world = ready
    for _ in range(3):
        await world.request_rounds()
        await world.send("POST", f"/v1/rounds/{(await world.view()).current_round.round_id}/cancel")  # type: ignore[union-attr] # a round runs
    base = f"/v1/federations/{world.federation_id}"
    page = await world.ask(RoundPage, "GET", f"{base}/rounds?limit=2", "viewer")
    assert ([each.number for each in page.items], page.next_cursor) == ([3, 2], cursor_after("rounds", 2))
    page = await world.ask(RoundPage, "GET", f"{base}/rounds?limit=2&cursor={page.next_cursor}", "viewer")
    assert ([each.number for each in page.items], page.next_cursor) == ([1], None)
    events = await world.ask(EventPage, "GET", f"{base}/events?limit=2", "viewer")
    assert ([each.sequence for each in events.items], events.next_cursor) == ([1, 2], cursor_after("events", 2))
    events = await world.ask(EventPage, "GET", f"{base}/events?limit=200&cursor={events.next_cursor}", "viewer")
    assert events.items[0].sequence == 3
    assert events.next_cursor is None
    last = events.items[-1].sequence
    assert (await world.ask(EventPage, "GET", f"{base}/events?after={last}", "viewer")).items == ()


# ------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("spoken", "remedy"),
    [("0", "0; update the client"), ("2", "2; update the coordinator"), ("new", "new; send FedMKT-Protocol: 1")],
)
async def test_a_program_of_another_protocol_learns_both_versions_and_the_remedy(
    world: World, spoken: str, remedy: str
) -> None:
    other = {"FedMKT-Protocol": spoken}
    for who, path in (("worker", "/v1/jobs/queue"), (None, "/v1/me"), ("operator", "/v1/federations")):
        answer = await world.send("GET", path, who, headers=other)
        assert (answer.status_code, answer.json()["code"]) == (426, "protocol.mismatch")
        assert answer.json()["detail"] == f"the coordinator speaks protocol 1, the client {remedy}"
        assert (answer.headers["upgrade"], answer.headers["fedmkt-protocol"]) == ("fedmkt/1", "1")
    for path in ("/version", "/healthz", "/readyz"):
        assert (await world.send("GET", path, None, headers=other)).status_code == 200


async def test_the_own_version_and_none_pass_and_every_answer_names_it(world: World) -> None:
    for headers in ({"FedMKT-Protocol": "1"}, {}):
        answer = await world.send("GET", "/v1/federations", "viewer", headers=headers)
        assert (answer.status_code, answer.headers["fedmkt-protocol"]) == (200, "1")


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
        async with client.stream("GET", f"{path}?after=2") as response:
            assert [each[0] for each in await events_of(response.aiter_lines(), 1)] == ["3"]
        odd = await client.get(path, headers={"Last-Event-ID": "x"})
        assert (odd.status_code, odd.json()["code"]) == (422, "request.malformed")
        unknown = await client.get("/v1/federations/fed_00000000000000000000/events/stream")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "federation.unknown")


async def test_a_stream_that_breaks_again_and_again_loses_and_repeats_nothing(
    world: World, worlds: Worlds, redis_server: RedisProcess
) -> None:
    """Two replicas write at the same time and answer in turns; the line breaks after every few events."""
    await world.create()
    other = await worlds.open(settings_for(world.context.settings.state_dir, redis_server.url))
    path = f"/v1/federations/{world.federation_id}/events/stream"
    writers = [asyncio.create_task(write_events(each, world.federation_id, 30)) for each in (world, other)]
    seen: list[int] = []
    async with served(world) as first, served(other) as second, asyncio.timeout(60):
        for turn in range(100):
            async with viewer((first, second)[turn % 2]) as client:
                resume = {"Last-Event-ID": str(seen[-1])} if seen else {}
                async with client.stream("GET", path, headers=resume) as response:
                    wanted = min(1 + turn % 7, 61 - len(seen))
                    seen += [int(each[0]) for each in await events_of(response.aiter_lines(), wanted)]
            if len(seen) == 61:
                break
    await asyncio.gather(*writers)
    assert seen == list(range(1, 62))


async def write_events(world: World, federation_id: str, count: int) -> None:
    for number in range(count):
        async with world.context.store.write() as tx:
            await tx.append(federation_id, "test.event", number=number)
        await asyncio.sleep(0)


async def test_an_idle_stream_is_kept_open_by_comments(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.05)  # 15 s
    await world.create()
    path = f"/v1/federations/{world.federation_id}/events/stream"
    async with served(world) as url, viewer(url) as client, asyncio.timeout(20), client.stream("GET", path) as response:
        lines = response.aiter_lines()
        await events_of(lines, 1)
        comments = 0
        async for line in lines:
            comments += line.startswith(":")
            if comments == 3:
                break
        await world.put_public_set()
        assert await events_of(lines, 1) == [("2", "public_set.stored", "public_set.stored")]


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


async def test_a_list_of_federations_asks_the_database_no_more_often_for_more_of_them(world: World) -> None:
    """Each reads as it does by itself: sites, round and its progress among them."""
    asked: list[str] = []
    engine = world.context.store.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *about: asked.append(about[2]))
    counts = []
    for names in (["one", "two"], ["three", "four", "five", "six"]):
        for name in names:
            await world.ready(config(name))
            await world.request_rounds()
        asked.clear()
        page = await world.ask(FederationPage, "GET", "/v1/federations", "viewer")
        counts.append(len(asked))
    assert len(page.items) == 6
    assert counts[0] == counts[1]
    for each in page.items:
        alone = await world.ask(FederationView, "GET", f"/v1/federations/{each.federation_id}", "viewer")
        assert alone == each
        assert each.current_round is not None
        assert each.current_round.federation_id == each.federation_id
        assert [site.site for site in each.current_round.sites] == ["north", "south"]
