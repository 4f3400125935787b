"""What one client may ask for: requests a second, slow bodies, slow heads, long answers after a revocation."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn

from coordinator_servers import Worlds, settings_for
from coordinator_world import TOKENS, World, served
from fedmkt.client import CoordinatorClient, CoordinatorProblem, RetryPolicy, StaticToken
from fedmkt.protocol import EnrolmentTokenRequest, TokenRequest
from fedmkt_coordinator.connections import MAX_HEAD_BYTES, with_bounded_heads
from fedmkt_coordinator.rate_limits import MAX_KEYS, Buckets, TooManyRequests, network
from fedmkt_coordinator.store import Store
from real_servers import RedisProcess

pytestmark = pytest.mark.anyio
services = pytest.mark.services


# ------------------------------------------------------------------------------------------------ buckets


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def granted(buckets: Buckets, key: str, tries: int) -> int:
    count = 0
    for _ in range(tries):
        with suppress(TooManyRequests):
            buckets.spend(key, "it")
            count += 1
    return count


def test_a_bucket_gives_ten_seconds_worth_at_once_and_then_its_rate() -> None:
    clock = Seconds()
    buckets = Buckets(2.0, clock)
    assert granted(buckets, "a", 50) == 20
    clock.now = 3.0
    assert granted(buckets, "a", 50) == 6
    clock.now = 1000.0
    assert granted(buckets, "a", 50) == 20


def test_keys_have_buckets_of_their_own() -> None:
    buckets = Buckets(0.3, Seconds())
    assert [granted(buckets, key, 5) for key in ("a", "b", "a")] == [3, 3, 0]


def test_a_rate_below_one_in_ten_seconds_gives_one() -> None:
    clock = Seconds()
    buckets = Buckets(0.01, clock)
    assert granted(buckets, "a", 5) == 1
    clock.now = 99.0
    assert granted(buckets, "a", 5) == 0
    clock.now = 100.0
    assert granted(buckets, "a", 5) == 1


def test_the_refusal_says_both_numbers_and_when_to_come_again() -> None:
    buckets = Buckets(0.5, Seconds())
    assert granted(buckets, "a", 5) == 5
    with pytest.raises(TooManyRequests) as refused:
        buckets.spend("a", "site north")
    assert refused.value.detail == (
        "site north has sent 5 requests more than it was due, 5 are allowed at once and 0.5 a second after that; "
        "ask again in 2 s"
    )
    assert refused.value.headers == {"Retry-After": "2"}


def test_a_flood_of_addresses_does_not_fill_the_memory() -> None:
    buckets = Buckets(1.0, Seconds())
    for number in range(3 * MAX_KEYS):
        buckets.spend(str(number), "it")
    assert len(buckets) <= MAX_KEYS


def test_a_host_with_many_addresses_of_version_6_is_one() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff:1") == "2001:db8::/64"
    assert network("2001:db8:0:1::1") != network("2001:db8::1")
    assert (network("10.0.0.1"), network("testclient")) == ("10.0.0.1", "testclient")


def test_a_decision_costs_a_few_microseconds() -> None:
    buckets = Buckets(1e9)
    best_s = float("inf")
    for _ in range(5):
        begun = time.thread_time()
        for number in range(2000):
            buckets.spend(str(number % 100), "it")
        best_s = min(best_s, (time.thread_time() - begun) / 2000)
    assert best_s < 50e-6  # measured: about 1 us


# ------------------------------------------------------------------------------------------------ over HTTP


async def opened(worlds: Worlds, state_dir: Path, redis: RedisProcess, **changes: float) -> World:
    return await worlds.open(settings_for(state_dir, redis.url, **changes))


@services
async def test_a_site_is_limited_by_itself_whatever_token_it_brings(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await opened(worlds, state_dir, redis_server, site_rate_per_s=0.01)
    await world.create()
    north, south = await world.enrol("north"), await world.enrol("south")
    assert (await world.send("GET", "/v1/me", north)).status_code == 200
    world.clock.move(1)
    await world.renew(north)
    answer = await world.send("GET", "/v1/me", north)
    assert (answer.status_code, answer.json()["code"]) == (429, "rate.limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 100
    assert "site north has sent 1 requests more than it was due, 1 are allowed" in answer.json()["detail"]
    assert (await world.send("GET", "/v1/me", south)).status_code == 200
    assert (await world.send("GET", "/v1/federations", "viewer")).status_code == 200


@services
async def test_whoever_has_no_token_yet_is_limited_by_address(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await opened(worlds, state_dir, redis_server, address_rate_per_s=0.3)
    await world.create()
    site = await world.enrol("north")  # enrolment and token: two of the three
    body = TokenRequest(assertion="not.a.jwt")
    await world.refused("assertion.refused", "POST", "/v1/token", None, body)
    await world.refused("rate.limited", "POST", "/v1/token", None, body)
    await world.refused("rate.limited", "GET", "/v1/me", "0" * 64)  # so is guessing
    assert (await world.send("GET", "/v1/me", site)).status_code == 200  # the address's sites go on
    assert (await world.send("GET", "/healthz", None)).status_code == 200


@services
async def test_the_client_waits_as_long_as_it_is_told(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await opened(worlds, state_dir, redis_server, staff_rate_per_s=0.1)
    waited: list[float] = []

    class Enough(Exception):
        pass

    def wait(seconds: float) -> None:
        waited.append(seconds)
        raise Enough

    def ask(url: str) -> None:
        policy = RetryPolicy(first_wait_s=0.01, max_wait_s=0.02, patience_s=100)
        with CoordinatorClient(url, StaticToken(TOKENS["viewer"]), retry=policy, wait=wait) as client:
            list(client.federations())
            list(client.federations())

    async with served(world) as url:
        with pytest.raises(Enough):
            await asyncio.to_thread(ask, url)
        impatient = RetryPolicy(first_wait_s=0.01, max_wait_s=0.02, patience_s=1)
        with (
            CoordinatorClient(url, StaticToken(TOKENS["viewer"]), retry=impatient) as client,
            pytest.raises(CoordinatorProblem) as refused,
        ):
            await asyncio.to_thread(lambda: list(client.federations()))
    assert refused.value.code == "rate.limited"
    assert len(waited) == 1
    assert 5 <= waited[0] <= 10


# ------------------------------------------------------------------------------------------------ slow senders


@asynccontextmanager
async def listening(world: World, header_timeout_s: float) -> AsyncIterator[int]:
    """The port of a server with bounded heads, as `fedmkt coordinator run` has it."""
    protocol = with_bounded_heads(header_timeout_s)
    config = uvicorn.Config(world.app, port=0, http=protocol, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    for _ in range(2000):
        if server.started:
            break
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def until_cut(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side ends the connection."""
    with suppress(ConnectionError):
        async with asyncio.timeout(30):
            return await reader.read()
    return b""


HEAD = b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@services
async def test_a_body_that_dribbles_is_cut(worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> None:
    world = await opened(worlds, state_dir, redis_server, body_grace_s=0.5)
    async with listening(world, 60) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD)
        ended = asyncio.create_task(until_cut(reader))
        sent = 0
        while not ended.done() and sent < 1000:
            with suppress(ConnectionError):
                writer.write(b" ")
                await writer.drain()
            sent += 1
            await asyncio.wait([ended], timeout=0.05)
        answer = await ended
        writer.close()
    assert sent < 1000
    assert answer[:12] in (b"", b"HTTP/1.1 408")  # a byte that crosses the answer may cost it


@services
async def test_a_body_that_stalls_is_answered(worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> None:
    world = await opened(worlds, state_dir, redis_server, body_grace_s=0.3)

    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"name": '
        await asyncio.Event().wait()

    headers = {"Authorization": f"Bearer {TOKENS['operator']}", "Content-Type": "application/json"}
    async with asyncio.timeout(30):
        answer = await world.http.post("/v1/federations", content=stalling(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (408, "body.too_slow")
    assert "9 bytes of the body came, then it stalled for 0.3 s" in answer.json()["detail"]
    assert answer.headers["connection"] == "close"


@services
async def test_a_body_that_stalls_for_less_than_the_grace_arrives(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await opened(worlds, state_dir, redis_server, body_grace_s=20)
    token = EnrolmentTokenRequest(site="north").model_dump_json().encode()

    async def halting() -> AsyncIterator[bytes]:
        for start in range(0, len(token), 5):
            yield token[start : start + 5]
            await asyncio.sleep(0.02)

    await world.create()
    async with served(world) as url, httpx.AsyncClient() as http:
        headers = {"Authorization": f"Bearer {TOKENS['operator']}", "Content-Type": "application/json"}
        path = f"{url}/v1/federations/{world.federation_id}/enrolment-tokens"
        assert (await http.post(path, content=halting(), headers=headers)).status_code == 201


@services
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_head_that_does_not_come_to_its_end_is_cut(world: World, sent: bytes) -> None:
    async with listening(world, 0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert await until_cut(reader) == b""
        writer.close()


@services
async def test_a_head_that_grows_for_ever_is_cut(world: World) -> None:
    async with listening(world, 60) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        ended, sent = asyncio.create_task(until_cut(reader)), 0
        with suppress(ConnectionError):
            while not ended.done() and sent < 100 * MAX_HEAD_BYTES:
                writer.write(b"X-Long: " + b"a" * 1000 + b"\r\n")
                sent += 1010
                await writer.drain()
                await asyncio.sleep(0)
        assert b"HTTP/1.1 200" not in await ended
        assert sent < 50 * MAX_HEAD_BYTES
        writer.close()


@services
async def test_a_long_poll_outlives_the_time_for_heads_and_bodies(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await opened(worlds, state_dir, redis_server, body_grace_s=0.2)
    await world.create()
    site = await world.enrol("north")
    async with listening(world, 0.2) as port, httpx.AsyncClient() as http:
        headers = {"Authorization": f"Bearer {site.token}"}
        for _ in range(2):
            answer = await http.get(f"http://127.0.0.1:{port}/v1/me/task?wait_s=1", headers=headers)
            assert answer.json()["task"]["kind"] == "wait"


# ------------------------------------------------------------------------------------------------ revoked meanwhile


@services
async def test_a_stream_ends_when_its_token_is_replaced(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await opened(worlds, state_dir, redis_server)
    await world.create()
    async with served(world) as url, httpx.AsyncClient() as http:
        headers = {"Authorization": f"Bearer {TOKENS['viewer']}"}
        path = f"{url}/v1/federations/{world.federation_id}/events/stream"
        async with asyncio.timeout(30), http.stream("GET", path, headers=headers) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith(("event:", "id:", "data:", ":"))
            await opened(worlds, state_dir, redis_server, viewer_token="v" * 64)  # another replica, with a new token
            rest = [line async for line in lines]
        assert stream.status_code == 200
        assert not any("site.invited" in line for line in rest)
        assert (await http.get(path, headers=headers)).status_code == 401


@services
async def test_a_chunk_that_arrives_after_the_revocation_is_refused(collecting: World) -> None:
    world, north = collecting, collecting.sites["north"]
    view = await world.round()
    blob = world.blob(north, view)
    state = (await world.send("POST", "/v1/uploads", north, world.manifest(north, view, blob))).json()
    half_sent, revoked = asyncio.Event(), asyncio.Event()

    async def chunk() -> AsyncIterator[bytes]:
        yield blob[: len(blob) // 2]
        half_sent.set()
        await revoked.wait()
        yield blob[len(blob) // 2 :]

    path = f"/v1/uploads/{state['upload_id']}/chunks/0"
    headers = {"Authorization": f"Bearer {north.token}"}
    async with served(world) as url, httpx.AsyncClient() as http:
        sending = asyncio.create_task(http.put(f"{url}{path}", content=chunk(), headers=headers))
        await half_sent.wait()
        # the body's beginning has been let in before the site is revoked
        gone = await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
        assert gone.status_code == 204
        revoked.set()
        answer = await sending
    assert (answer.status_code, answer.json()["code"]) == (403, "site.revoked")
    store: Store = world.context.store
    async with store.read() as tx:
        assert await tx.chunks(state["upload_id"]) == set()


@services
async def test_an_upload_that_is_complete_does_not_count_once_the_site_is_revoked(collecting: World) -> None:
    world, north = collecting, collecting.sites["north"]
    view = await world.round()
    blob = world.blob(north, view)
    state = await world.send_chunks(north, world.manifest(north, view, blob), blob)
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    await world.refused("site.revoked", "POST", f"/v1/uploads/{state.upload_id}/complete", north)
    assert [part.state for part in (await world.round()).sites if part.site == "north"] == ["missed"]
