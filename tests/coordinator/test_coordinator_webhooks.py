"""Webhooks: signed, in order, at least once, by one replica at a time, and nowhere that they should not go."""

import asyncio
import ipaddress
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from coordinator_servers import Worlds, settings_for
from coordinator_world import World
from fedmkt.protocol import WebhookCreated, WebhookMessage, WebhookPage, WebhookRequest, WebhookTrial, WebhookView
from fedmkt_coordinator.outbound import AddressRefused, Outbound, is_public
from fedmkt_coordinator.store import Store
from fedmkt_coordinator.store.records import WebhookRow
from fedmkt_coordinator.webhooks import ATTEMPT_S, CLAIM_S, MAX_WEBHOOKS, Deliverer, pause, signature
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


class Receiver:
    """A web server that keeps what it is sent. `answers` are given one after the other, then 204 for ever."""

    def __init__(self) -> None:
        receiver = self
        self.answers: list[int] = []
        self.messages: list[tuple[dict[str, str], bytes]] = []
        self.held: threading.Event | None = None  # requests wait for it
        self.arrived = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.messages.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.arrived.set()
                if receiver.held is not None:
                    receiver.held.wait(30)
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("Location", receiver.url + "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - the base class's names

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def sequences(self) -> list[int]:
        return [json.loads(body)["data"]["sequence"] for _, body in self.messages]

    @property
    def types(self) -> list[str]:
        return [json.loads(body)["type"] for _, body in self.messages]


@contextmanager
def running(receiver: Receiver) -> Iterator[Receiver]:
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.held is not None:
            receiver.held.set()
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running(Receiver()) as started:
        yield started


@pytest.fixture
async def hooked(worlds: Worlds, state_dir: Any, redis_server: RedisProcess) -> World:
    """A coordinator whose webhooks may go to loopback, with a federation."""
    world = await worlds.open(settings_for(state_dir, redis_server.url, webhook_allow_private=True))
    await world.create()
    return world


async def make(world: World, url: str, *kinds: str) -> WebhookCreated:
    answer = await world.send("POST", path(world), "operator", body_of(url, *kinds))
    assert answer.status_code == 201, answer.text
    return WebhookCreated.model_validate_json(answer.content)


def body_of(url: str, *kinds: str) -> WebhookRequest:
    """Unchecked: that is the coordinator's part."""
    return WebhookRequest.model_construct(url=url, kinds=kinds)


def path(world: World) -> str:
    return f"/v1/federations/{world.federation_id}/webhooks"


async def look(world: World) -> None:
    """What the loop does at every turn, and until all of it is done."""
    deliverer = world.app.state.deliverer
    assert isinstance(deliverer, Deliverer)
    await deliverer.look()
    await deliverer.settle()


async def shown(world: World) -> WebhookView:
    page = await world.ask(WebhookPage, "GET", path(world), "operator")
    return page.items[0]


async def happen(world: World, count: int, kind: str = "test.event") -> None:
    for _ in range(count):
        async with world.context.store.write() as tx:
            await tx.append(world.federation_id, kind)


# ------------------------------------------------------------------------------------------------ form


def test_the_signature_is_the_published_example() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    made = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_message_is_signed_as_standard_webhooks_asks(hooked: World, receiver: Receiver) -> None:
    created = await make(hooked, receiver.url + "/hook?x=1")
    assert created.secret.startswith("whsec_")
    await hooked.put_public_set()
    await look(hooked)
    ((headers, body),) = receiver.messages
    message = WebhookMessage.model_validate(Webhook(created.secret).verify(body, headers))
    assert (message.type, message.data.kind, message.data.sequence) == ("public_set.stored", "public_set.stored", 3)
    assert (message.timestamp, message.data.federation_id) == (message.data.at, hooked.federation_id)
    assert headers["webhook-id"] == f"{hooked.federation_id}_3"
    assert (headers["content-type"], headers["host"]) == ("application/json", receiver.url.removeprefix("http://"))
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 44).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(created.secret).verify(body.replace(b"12", b"13"), headers)


# ------------------------------------------------------------------------------------------------ making, listing


async def test_the_same_webhook_twice_is_one_and_other_kinds_are_refused(hooked: World, receiver: Receiver) -> None:
    made = await make(hooked, receiver.url, "round.state")
    again = await hooked.send("POST", path(hooked), "operator", body_of(receiver.url, "round.state"))
    assert (again.status_code, again.json()["secret"]) == (200, made.secret)
    assert again.headers["cache-control"] == "no-store"
    detail = await hooked.refused("webhook.exists", "POST", path(hooked), "operator", body_of(receiver.url))
    assert made.webhook.webhook_id in detail
    assert made.secret not in (await hooked.send("GET", path(hooked), "operator")).text


async def test_webhooks_are_listed_in_pages_and_deleted(hooked: World) -> None:
    made = sorted([(await make(hooked, f"http://127.0.0.1/{n}")).webhook.webhook_id for n in range(MAX_WEBHOOKS)])
    one_more = body_of("http://127.0.0.1/more")
    detail = await hooked.refused("webhook.too_many", "POST", path(hooked), "operator", one_more)
    assert detail.startswith("20 webhooks are there, at most 20")
    first = await hooked.ask(WebhookPage, "GET", f"{path(hooked)}?limit=15", "operator")
    rest = await hooked.ask(WebhookPage, "GET", f"{path(hooked)}?limit=15&cursor={first.next_cursor}", "operator")
    assert [each.webhook_id for each in (*first.items, *rest.items)] == made
    assert rest.next_cursor is None
    gone = f"{path(hooked)}/{made[0]}"
    assert (await hooked.send("DELETE", gone, "operator")).status_code == 204
    await hooked.refused("webhook.unknown", "DELETE", gone, "operator")
    await hooked.refused("webhook.unknown", "POST", f"{gone}/test", "operator")
    assert "webhook.deleted" in await hooked.event_kinds()


async def test_another_federations_webhook_does_not_exist_here(hooked: World, receiver: Receiver) -> None:
    made = await make(hooked, receiver.url)
    other = hooked.config.model_copy(update={"name": "others"})
    elsewhere = (await hooked.send("POST", "/v1/federations", "operator", other)).json()["federation_id"]
    wrong = f"/v1/federations/{elsewhere}/webhooks/{made.webhook.webhook_id}"
    await hooked.refused("webhook.unknown", "DELETE", wrong, "operator")
    await hooked.refused("webhook.unknown", "POST", f"{wrong}/test", "operator")


async def test_a_test_message_tells_what_came_of_it(hooked: World, receiver: Receiver) -> None:
    made = await make(hooked, receiver.url)
    trial_path = f"{path(hooked)}/{made.webhook.webhook_id}/test"
    good = await hooked.ask(WebhookTrial, "POST", trial_path, "operator")
    assert (good.delivered, good.status, good.reason) == (True, 204, None)
    ((headers, body),) = receiver.messages
    assert Webhook(made.secret).verify(body, headers)["type"] == "webhook.test"
    receiver.answers = [500]
    bad = await hooked.ask(WebhookTrial, "POST", trial_path, "operator")
    assert (bad.delivered, bad.status) == (False, 500)
    assert bad.reason == "answered 500, 200 to 299 means delivered"
    assert (await shown(hooked)).failures == 0


# ------------------------------------------------------------------------------------------------ delivery


async def test_events_come_in_order_and_only_those_after_it_was_made(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url)
    await happen(hooked, 120)
    while (await shown(hooked)).delivered < 122:
        await look(hooked)
    assert receiver.sequences == list(range(3, 123))
    await look(hooked)
    assert len(receiver.messages) == 120


async def test_only_the_wanted_kinds_are_sent(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url, "test.two", "test.three")
    for kind in ("test.one", "test.two", "test.one", "test.three", "test.one"):
        await happen(hooked, 1, kind)
    await look(hooked)
    assert receiver.types == ["test.two", "test.three"]
    assert (await shown(hooked)).delivered == 7
    await happen(hooked, 1, "test.one")
    await look(hooked)
    assert ((await shown(hooked)).delivered, len(receiver.messages)) == (8, 2)


def test_pauses_double_up_to_an_hour() -> None:
    assert [pause(n).total_seconds() for n in (1, 2, 3, 4)] == [5, 10, 20, 40]
    assert pause(11).total_seconds() == pause(10_000).total_seconds() == 3600


async def test_a_failed_delivery_is_repeated_later_and_nothing_overtakes_it(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url)
    receiver.answers = [204, 500, 302]
    await happen(hooked, 3)
    await look(hooked)
    view = await shown(hooked)
    assert (receiver.sequences, view.delivered, view.failures) == ([3, 4], 3, 1)
    assert view.reason == "answered 500, 200 to 299 means delivered"
    assert view.failing_since == hooked.clock.now
    hooked.clock.move(4)
    await look(hooked)
    assert receiver.sequences == [3, 4]
    hooked.clock.move(1)
    await look(hooked)  # a redirect is no delivery, and is not followed
    assert (receiver.sequences, (await shown(hooked)).failures) == ([3, 4, 4], 2)
    hooked.clock.move(9)
    await look(hooked)
    assert len(receiver.messages) == 3
    hooked.clock.move(1)
    await look(hooked)
    assert receiver.sequences == [3, 4, 4, 4, 5]
    assert len({headers["webhook-id"] for headers, _ in receiver.messages}) == 3
    view = await shown(hooked)
    assert (view.failures, view.failing_since, view.reason, view.next_attempt_at) == (0, None, None, None)


async def test_who_does_not_answer_at_all_is_tried_again(hooked: World) -> None:
    with running(Receiver()) as gone:
        url = gone.url
    await make(hooked, url)
    await happen(hooked, 1)
    await look(hooked)
    view = await shown(hooked)
    assert (view.state, view.failures, view.next_attempt_at) == ("active", 1, view.failing_since + pause(1))  # type: ignore[operator] # it fails
    assert "ConnectError" in (view.reason or "")


async def test_days_of_failure_disable_a_webhook_with_an_event(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url)
    receiver.answers = [503] * 200
    await happen(hooked, 1)
    for _ in range(140):
        await look(hooked)
        hooked.clock.move(3600)
        if (await shown(hooked)).state == "disabled":
            break
    tries = len(receiver.messages)
    assert 120 <= tries <= 131  # ten in the first hour, then one an hour for five days
    assert (await hooked.event_kinds())[-1] == "webhook.disabled"
    assert (await shown(hooked)).reason == "answered 503, 200 to 299 means delivered"
    await look(hooked)
    assert len(receiver.messages) == tries


async def test_a_delivery_ends_the_failing_that_patience_counts(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url)
    receiver.answers = [503, 204, 503]
    await happen(hooked, 2)
    await look(hooked)
    hooked.clock.move(6 * 86400)  # longer than patience, and nobody tried meanwhile
    await look(hooked)
    view = await shown(hooked)
    assert receiver.sequences == [3, 3, 4]
    assert (view.state, view.failures, view.failing_since) == ("active", 1, hooked.clock.now)


async def test_gone_disables_at_once(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url)
    receiver.answers = [410]
    await happen(hooked, 1)
    await look(hooked)
    assert (await shown(hooked)).state == "disabled"


async def test_a_slow_receiver_keeps_nobody_else_waiting(hooked: World, receiver: Receiver) -> None:
    receiver.held = threading.Event()
    with running(Receiver()) as quick:
        await make(hooked, receiver.url)
        await make(hooked, quick.url)
        await happen(hooked, 2)
        deliverer: Deliverer = hooked.app.state.deliverer
        await deliverer.look()
        await until(lambda: len(quick.messages) == 2)
        assert len(receiver.messages) == 1
        receiver.held.set()
        await deliverer.settle()
    assert len(receiver.messages) == 3  # and that the second webhook was made


async def until(holds: Any) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - what happens in the receiver's thread sets no event of this loop
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------ replicas, restarts


async def test_two_replicas_never_send_for_one_webhook_at_once(
    hooked: World, worlds: Worlds, redis_server: RedisProcess, receiver: Receiver
) -> None:
    await make(hooked, receiver.url)
    await happen(hooked, 10)
    other = await worlds.open(settings_for(hooked.context.settings.state_dir, redis_server.url))
    receiver.held = threading.Event()
    first: Deliverer = hooked.app.state.deliverer
    await first.look()
    await until(lambda: receiver.messages)
    hooked.clock.move(CLAIM_S - 1)
    await look(other)
    assert len(receiver.messages) == 1
    receiver.held.set()
    await asyncio.gather(first.settle(), look(other))
    assert receiver.sequences == list(range(3, 13))


async def test_what_a_replica_died_over_is_sent_by_another_when_its_claim_ends(
    hooked: World, worlds: Worlds, redis_server: RedisProcess, receiver: Receiver
) -> None:
    await make(hooked, receiver.url)
    await happen(hooked, 2)
    async with hooked.context.store.write() as tx:  # as one that died after this
        (row,) = await tx.webhooks_due(10)
        assert await tx.claim_webhook(row, "of the dead", tx.now + pause(4)) is not None
    changed = {"webhook_allow_private": True}
    other = await worlds.open(settings_for(hooked.context.settings.state_dir, redis_server.url, **changed))
    await look(other)
    assert receiver.messages == []
    hooked.clock.move(40)
    await look(other)
    assert receiver.sequences == [3, 4]
    async with hooked.context.store.write() as tx:  # the dead one comes back: its claim is no longer good
        assert not await tx.webhook_delivered(row.id, "of the dead", 3, tx.now)
    assert (await shown(hooked)).delivered == 4


async def test_a_webhook_that_is_deleted_while_it_is_served_ends(hooked: World, receiver: Receiver) -> None:
    made = await make(hooked, receiver.url)
    await happen(hooked, 3)
    receiver.held = threading.Event()
    deliverer: Deliverer = hooked.app.state.deliverer
    await deliverer.look()
    await until(lambda: receiver.messages)
    await hooked.send("DELETE", f"{path(hooked)}/{made.webhook.webhook_id}", "operator")
    receiver.held.set()
    await deliverer.settle()
    assert len(receiver.messages) == 1


async def test_the_loop_delivers_by_itself_and_ends_when_told(hooked: World, receiver: Receiver) -> None:
    await make(hooked, receiver.url)
    store, outbound = hooked.context.store, hooked.context.outbound
    loop = Deliverer(store, outbound, interval_s=0.02, patience_s=60)
    running_loop = asyncio.create_task(loop.run())
    await happen(hooked, 3)
    await until(lambda: len(receiver.messages) == 3)
    loop.stop()
    async with asyncio.timeout(10):
        await running_loop


async def test_both_databases_claim_once_and_count_failures(store: Store) -> None:
    """On SQLite and PostgreSQL: ten at once for one claim, one gets it."""
    async with store.write() as tx:
        federation, _ = await tx.add_federation(_config())
        await tx.append(federation.id, "test.event")
        row = WebhookRow(
            "webhook_1", federation.id, "http://x", ("a.b",), "s", "active", None, tx.now, 0, None, 0, None, tx.now,
            None, None,
        )  # fmt: skip
        await tx.add_webhook(row)

    async def claim(name: str) -> WebhookRow | None:
        async with store.write() as tx:
            return await tx.claim_webhook(row, name, tx.now + pause(3))

    got = [each for each in await asyncio.gather(*(claim(f"claim{n}") for n in range(10))) if each is not None]
    assert len(got) == 1
    mine = got[0]
    assert mine.claim is not None
    assert mine.kinds == ("a.b",)
    async with store.write() as tx:
        assert await tx.webhook_failed(row.id, mine.claim, "why", tx.now + pause(1))
        assert await tx.webhook_failed(row.id, mine.claim, "why", tx.now + pause(2))
        after = await tx.webhook(federation.id, row.id)
        assert (after.failures, after.failing_since, after.reason) == (2, tx.now, "why")
        await tx.release_webhook(row.id, mine.claim, None)
        assert not await tx.webhook_disabled(row.id, mine.claim, "late")


def _config() -> Any:
    from coordinator_world import config

    return config()


# ------------------------------------------------------------------------------------------------ where they may go


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # clouds give credentials away there
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:53aa:64c:0:ffff:a9fe:a9fe", False),
    ],
)
def test_only_addresses_out_in_the_internet_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1/", "127.0.0.1, which is private, local or reserved"),
        ("http://localhost:8700/v1/federations", "private, local or reserved"),
        ("http://2130706433/", "127.0.0.1, which is private"),
        ("http://[::ffff:10.0.0.1]/", "::ffff:a00:1, which is private"),
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254, which is private"),
        ("http://user:word@93.184.216.34/", "holds a user name or password"),
        ("https://no-such-name.invalid/", "host no-such-name.invalid has no address"),
    ],
)
async def test_addresses_that_are_not_public_are_refused(world: World, url: str, why: str) -> None:
    await world.create()
    detail = await world.refused("webhook.address", "POST", path(world), "operator", body_of(url))
    assert why in detail
    assert "webhook.created" not in await world.event_kinds()


@pytest.mark.parametrize("url", ["ftp://93.184.216.34/", "file:///etc/passwd", "//x", "http://", "gopher://x/", ""])
async def test_only_http_goes_out(world: World, url: str) -> None:
    await world.create()
    await world.refused("request.malformed", "POST", path(world), "operator", body_of(url))


async def test_a_name_that_points_inside_later_is_refused_when_sending(hooked: World, receiver: Receiver) -> None:
    """The address is looked at again for every message, and the connection goes to the one that was looked at."""
    await make(hooked, receiver.url)
    await happen(hooked, 1)
    strict = Outbound(allow_private=False, timeout_s=ATTEMPT_S)
    loop = Deliverer(hooked.context.store, strict, interval_s=1, patience_s=60)
    await loop.look()
    await loop.settle()
    assert receiver.messages == []
    assert "127.0.0.1, which is private" in ((await shown(hooked)).reason or "")
    with pytest.raises(AddressRefused):
        await strict.post(receiver.url, b"{}", {})
    await strict.close()


async def test_a_receiver_that_hangs_costs_no_more_than_the_time_allowed(receiver: Receiver) -> None:
    receiver.held = threading.Event()
    outbound = Outbound(allow_private=True, timeout_s=0.2)
    with pytest.raises((TimeoutError, httpx.TimeoutException)):
        await outbound.post(receiver.url, b"{}", {})
    await outbound.close()
