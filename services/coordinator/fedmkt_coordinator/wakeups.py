"""Waking requests that wait for something to happen in a federation, within this process and between replicas."""

import asyncio
import logging

from fedmkt_coordinator.queue import JobQueue, Unavailable
from fedmkt_coordinator.store import Outbox, Store

log = logging.getLogger(__name__)

RECHECK_FACTOR = 5  # with Redis listening, a request looks by itself so many times more rarely
RECONNECT_S = 1.0


class Wakeups:
    """One bell a federation. Take the bell before looking, then wait for it: nothing in between is missed."""

    def __init__(self, recheck_s: float) -> None:
        self.listening = False
        self.stopping = False
        self._recheck_s = recheck_s
        self._bells: dict[str, asyncio.Event] = {}

    def bell(self, federation_id: str) -> asyncio.Event:
        return self._bells.setdefault(federation_id, asyncio.Event())

    def ring(self, federation_id: str) -> None:
        bell = self._bells.pop(federation_id, None)
        if bell is not None:
            bell.set()

    def stop(self) -> None:
        """Every waiting request answers now, and none waits again."""
        self.stopping = True
        for federation_id in list(self._bells):
            self.ring(federation_id)

    async def wait(self, bell: asyncio.Event, longest_s: float) -> None:
        """Until the bell rings, it is time to look again anyway, or `longest_s` seconds have passed."""
        recheck_s = self._recheck_s * (RECHECK_FACTOR if self.listening else 1)
        try:
            async with asyncio.timeout(min(recheck_s, longest_s)):
                await bell.wait()
        except TimeoutError:
            return


class Announcer:
    """Tells Redis after a commit, in the background: no request waits for it or fails with it."""

    def __init__(self, store: Store, queue: JobQueue, wakeups: Wakeups) -> None:
        self._store = store
        self._queue = queue
        self._wakeups = wakeups
        self._pending = Outbox()
        self._something = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """`run` ends once it has told what is pending; nothing is broken off in the middle of a transaction."""
        self._stopping = True
        self._something.set()

    def announce(self, outbox: Outbox) -> None:
        for event in outbox.events:
            about = {"federation_id": event.federation_id, "round_id": event.round_id, "site": event.site}
            log.info(event.kind, extra={**about, "sequence": event.sequence, "data": event.data})
        for federation_id in outbox.federations:
            self._wakeups.ring(federation_id)
        self._pending.federations |= outbox.federations
        self._pending.jobs |= outbox.jobs
        self._something.set()

    async def publish_jobs(self) -> None:
        """Put every job that waits for a worker into Redis, if it is not there. Also the reconcile sweep."""
        async with self._store.read() as tx:
            due = await tx.due_jobs(tx.now)
        if due:
            added = await self._queue.add(due)
            if added:
                log.info("jobs.published", extra={"jobs": added})

    async def run(self) -> None:
        while not self._stopping:
            await self._something.wait()
            self._something.clear()
            pending, self._pending = self._pending, Outbox()
            try:
                if pending.jobs:
                    await self.publish_jobs()
                await self._queue.wake(pending.federations)
            except Unavailable as error:
                # The keeper publishes again; waiting requests look by themselves.
                log.warning("redis.unavailable", extra={"reason": str(error)})

    async def listen(self) -> None:
        """Ring the bells of this process for what other replicas commit."""
        while True:
            try:
                async for federation_id in self._queue.heard():
                    if not self._wakeups.listening:
                        log.info("redis.listening")
                        self._wakeups.listening = True
                    self._wakeups.ring(federation_id)
            except Unavailable as error:
                if self._wakeups.listening:
                    log.warning("redis.lost", extra={"reason": str(error)})
                self._wakeups.listening = False
                await asyncio.sleep(RECONNECT_S)
