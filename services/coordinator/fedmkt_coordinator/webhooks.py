"""Webhooks: a federation's committed events sent to an address, in order, each at least once, signed.

Form: Standard Webhooks (webhook-id, webhook-timestamp, webhook-signature `v1,` and a base64 HMAC-SHA256 of
`id.timestamp.body`). What was delivered and which replica is sending just now are rows of the database, so a restart or
another replica goes on where the last one stopped, and no two send at once.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import httpx

from fedmkt.errors import Refusal
from fedmkt.protocol import Event, WebhookCreated, WebhookMessage, WebhookRequest, WebhookTrial
from fedmkt_coordinator.dependencies import DependencyDown
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.outbound import AddressRefused, Outbound
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import EventRow, WebhookRow
from fedmkt_coordinator.views import event_view, webhook_view

log = logging.getLogger(__name__)

MAX_WEBHOOKS = 20  # of one federation
SECRET_BYTES = 32
ATTEMPT_S = 10.0  # for one message, from resolving the name to the answer's status
CLAIM_S = 60.0  # a replica that is silent for longer has died: longer than any attempt
BATCH = 50  # events sent under one claim
AT_ONCE = 16  # webhooks that one replica serves at the same time
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 3600.0
GONE = 410  # the receiver says that it does not want any more, ever
MAX_REASON = 300


class WebhookExists(Refusal):
    status = 409
    code = "webhook.exists"
    title = "A webhook goes to this address"


class TooManyWebhooks(Refusal):
    status = 409
    code = "webhook.too_many"
    title = "The federation has all the webhooks it may have"


async def create(
    store: Store, outbound: Outbound, federation_id: str, wanted: WebhookRequest
) -> tuple[WebhookCreated, bool]:
    """The webhook with its secret, and whether it is new; the same request again is the same webhook."""
    async with store.read() as tx:
        await tx.federation(federation_id)
    await outbound.resolve(wanted.url)
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        there = await tx.webhooks_after(federation_id, "", MAX_WEBHOOKS + 1)
        known = next((each for each in there if each.url == wanted.url), None)
        if known is not None:
            if known.kinds != wanted.kinds:
                raise WebhookExists(f"webhook {known.id} goes to this address with other kinds; delete it first")
            return WebhookCreated(webhook=webhook_view(known), secret=known.secret), False
        if len(there) >= MAX_WEBHOOKS:
            raise TooManyWebhooks(f"{len(there)} webhooks are there, at most {MAX_WEBHOOKS} may be; delete one first")
        webhook_id = new_id("webhook")
        await tx.append(federation_id, "webhook.created", webhook_id=webhook_id)
        row = _new_row(tx, webhook_id, federation_id, wanted, federation.events + 1)
        await tx.add_webhook(row)
    return WebhookCreated(webhook=webhook_view(row), secret=row.secret), True


def _new_row(
    tx: Transaction, webhook_id: str, federation_id: str, wanted: WebhookRequest, delivered: int
) -> WebhookRow:
    """It begins with what happens after it was made."""
    return WebhookRow(
        id=webhook_id,
        federation_id=federation_id,
        url=wanted.url,
        kinds=wanted.kinds,
        secret="whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode(),
        state="active",
        reason=None,
        created_at=tx.now,
        delivered=delivered,
        delivered_at=None,
        failures=0,
        failing_since=None,
        due_at=tx.now,
        claim=None,
        claimed_until=None,
    )


async def delete(store: Store, federation_id: str, webhook_id: str) -> None:
    async with store.write() as tx:
        await tx.federation(federation_id, lock=True)
        row = await tx.webhook(federation_id, webhook_id)
        await tx.drop_webhook(row.id)
        await tx.append(federation_id, "webhook.deleted", webhook_id=row.id)


async def send_test(store: Store, outbound: Outbound, federation_id: str, webhook_id: str) -> WebhookTrial:
    """One message of type webhook.test, now and once; what comes of it changes nothing."""
    async with store.read() as tx:
        row = await tx.webhook(federation_id, webhook_id)
        event = Event(sequence=0, at=tx.now, kind="webhook.test", federation_id=federation_id)
    began = time.monotonic()
    outcome = await send(outbound, row, f"test_{secrets.token_hex(10)}", event)
    seconds = round(time.monotonic() - began, 3)
    return WebhookTrial(
        delivered=outcome.failure is None, status=outcome.status, reason=outcome.failure, seconds=seconds
    )


# ------------------------------------------------------------------------------------------------ one message


@dataclass(frozen=True, slots=True)
class Outcome:
    """`failure` says why a message counts as not delivered, None if it was."""

    status: int | None
    failure: str | None


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


async def send(outbound: Outbound, row: WebhookRow, message_id: str, event: Event) -> Outcome:
    body = WebhookMessage(type=event.kind, timestamp=event.at, data=event).model_dump_json().encode()
    timestamp = int(time.time())  # of the attempt; receivers refuse old ones
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "fedmkt-coordinator",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(row.secret, message_id, timestamp, body),
    }
    try:
        status = await outbound.post(row.url, body, headers)
    except AddressRefused as refusal:
        return Outcome(None, refusal.detail[:MAX_REASON])
    except TimeoutError:
        return Outcome(None, f"no answer within {ATTEMPT_S:g} s")
    except httpx.HTTPError as error:
        return Outcome(None, f"{type(error).__name__}: {error}"[:MAX_REASON])
    return Outcome(status, None if 200 <= status < 300 else f"answered {status}, 200 to 299 means delivered")


def message_id_of(row: EventRow) -> str:
    """The same for every attempt, so that a receiver knows what it has seen."""
    return f"{row.federation_id}_{row.sequence}"


def pause(failures: int) -> timedelta:
    """After so many failed attempts in a row: 5 s, 10 s, 20 s, ... an hour."""
    return timedelta(seconds=min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 20)))


# ------------------------------------------------------------------------------------------------ delivery


class Deliverer:
    """The loop that sends what has been committed. Every replica runs one."""

    def __init__(self, store: Store, outbound: Outbound, *, interval_s: float, patience_s: float) -> None:
        self._store = store
        self._outbound = outbound
        self._interval_s = interval_s
        self._patience = timedelta(seconds=patience_s)
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """`run` ends after the messages that are on their way."""
        self._stopping.set()

    async def run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    await self.look()
                except DependencyDown as error:
                    log.warning("webhooks.postponed", extra={"reason": str(error)})
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._stopping.wait()
            await self.settle()
        finally:
            for task in self._sending.values():
                task.cancel()

    async def look(self) -> None:
        """Begin to send wherever something is due; a slow receiver keeps nobody else waiting."""
        free = AT_ONCE - len(self._sending)
        if free <= 0:
            return
        async with self._store.read() as tx:
            due = await tx.webhooks_due(AT_ONCE * 2)
        for row in [each for each in due if each.id not in self._sending][:free]:
            task = asyncio.create_task(self._serve(row))
            self._sending[row.id] = task

    async def settle(self) -> None:
        """Until nothing is being sent."""
        while self._sending:
            await asyncio.wait(self._sending.values())

    async def _serve(self, row: WebhookRow) -> None:
        try:
            await self._deliver(row)
        except DependencyDown as error:  # as below: what was sent and could not be written down is sent again
            log.warning("webhooks.postponed", extra={"webhook_id": row.id, "reason": str(error)})
        except Exception:  # the top of a loop: the claim ends by itself, and the next look tries again
            log.exception("webhook.failed", extra={"webhook_id": row.id, "federation_id": row.federation_id})
        finally:
            del self._sending[row.id]

    async def _deliver(self, stale: WebhookRow) -> None:
        """Send what is due under one claim, in order, up to the first failure."""
        claim = secrets.token_hex(16)
        async with self._store.write() as tx:
            row = await tx.claim_webhook(stale, claim, _claim_end(tx.now))
        if row is None:
            return
        async with self._store.read() as tx:
            events, passed_over = await tx.events_to_send(row, BATCH)
        for event in events:
            if self._stopping.is_set() or not await self._deliver_one(row, claim, event):
                passed_over = row.delivered
                break
            row = replace(
                row, delivered=event.sequence, failures=0, failing_since=None
            )  # whatever failed before is over
        async with self._store.write() as tx:
            await tx.release_webhook(row.id, claim, passed_over if passed_over > row.delivered else None)

    async def _deliver_one(self, row: WebhookRow, claim: str, event: EventRow) -> bool:
        outcome = await send(self._outbound, row, message_id_of(event), event_view(event))
        if outcome.failure is None:
            async with self._store.write() as tx:
                return await tx.webhook_delivered(row.id, claim, event.sequence, _claim_end(tx.now))
        await self._failed(row, claim, outcome)
        return False

    async def _failed(self, row: WebhookRow, claim: str, outcome: Outcome) -> None:
        assert outcome.failure is not None
        async with self._store.write() as tx:
            await tx.federation(row.federation_id, lock=True)
            since = row.failing_since or tx.now
            if outcome.status == GONE or tx.now - since >= self._patience:
                if await tx.webhook_disabled(row.id, claim, outcome.failure):
                    await tx.append(row.federation_id, "webhook.disabled", webhook_id=row.id, reason=outcome.failure)
                return
            await tx.webhook_failed(row.id, claim, outcome.failure, tx.now + pause(row.failures + 1))


def _claim_end(now: datetime) -> datetime:
    return now + timedelta(seconds=CLAIM_S)
