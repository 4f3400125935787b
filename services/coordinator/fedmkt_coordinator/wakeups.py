"""Waking requests that wait for something to happen in a federation, within this process and between replicas."""

import asyncio
import logging
from typing import Literal

from fedmkt import fault_points
from fedmkt_coordinator.dependencies import DependencyDown
from fedmkt_coordinator.queue import JobQueue, Unavailable
from fedmkt_coordinator.store import Outbox, Store

log = logging.getLogger(__name__)

RECHECK_FACTOR = 20  # with Redis listening, a request looks by itself so many times more rarely
RECONNECT_S = 1.0


Hears = Literal["events", "tasks"]  # whoever follows what happens, or whoever only waits for something to do
# What happens once a site and round and gives nobody a new task: a thousand sites that wait need not look each time.
NO_NEW_TASK = frozenset(
    {"upload.announced", "upload.abandoned", "upload.refused", "knowledge.accepted", "adapter.accepted", "site.applied"}
    | {"llm.progress", "site.invited", "site.enrolled", "site.vocabulary", "site.model"}
)


def heard_by(outbox: Outbox) -> dict[str, Hears]:
    """Federation ids of what was committed, and who has to hear of it: 'tasks' is heard by all."""
    moved = {event.federation_id for event in outbox.events if event.kind not in NO_NEW_TASK}
    return {each: "tasks" if each in moved else "events" for each in outbox.federations}


class Wakeups:
    """Two bells a federation. Take the bell before looking, then wait for it: nothing in between is missed."""

    def __init__(self, recheck_s: float) -> None:
        self.listening = False
        self.stopping = False
        self._recheck_s = recheck_s
        self._bells: dict[tuple[str, Hears], asyncio.Event] = {}

    def bell(self, federation_id: str, hears: Hears = "events") -> asyncio.Event:
        return self._bells.setdefault((federation_id, hears), asyncio.Event())

    def ring(self, federation_id: str, hears: Hears = "tasks") -> None:
        """'tasks' rings both bells."""
        for each in ("events", "tasks") if hears == "tasks" else ("events",):
            bell = self._bells.pop((federation_id, each), None)
            if bell is not None:
                bell.set()

    def stop(self) -> None:
        """Every waiting request answers now, and none waits again."""
        self.stopping = True
        for federation_id, _ in list(self._bells):
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
        self._to_tell: dict[str, Hears] = {}
        self._new_jobs = False
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
        for federation_id, hears in heard_by(outbox).items():
            self._wakeups.ring(federation_id, hears)
            if self._to_tell.get(federation_id) != "tasks":
                self._to_tell[federation_id] = hears
        self._new_jobs |= outbox.jobs
        self._something.set()

    async def publish_jobs(self) -> None:
        """Put every job that waits for a worker into Redis, if it is not there. Also the reconcile sweep."""
        async with self._store.read() as tx:
            due = await tx.due_jobs(tx.now)
        if due:
            added = await self._queue.add(due)
            if added:
                fault_points.reach("jobs.published")
                log.info("jobs.published", extra={"jobs": added})

    async def run(self) -> None:
        while not self._stopping:
            await self._something.wait()
            self._something.clear()
            to_tell, self._to_tell = self._to_tell, {}
            new_jobs, self._new_jobs = self._new_jobs, False
            try:
                if new_jobs:
                    await self._publish_new()
                for federation_id, hears in to_tell.items():
                    await self._queue.wake(federation_id, hears)
                fault_points.reach("federations.woken")
            except Unavailable as error:
                # The keeper publishes again; waiting requests look by themselves.
                log.warning("redis.unavailable", extra={"reason": str(error)})

    async def _publish_new(self) -> None:
        try:
            await self.publish_jobs()
        except DependencyDown as error:  # the keeper publishes when the database is back; others are woken all the same
            log.warning("jobs.not_published", extra={"reason": str(error)})

    async def listen(self) -> None:
        """Ring the bells of this process for what other replicas commit."""
        while True:
            try:
                async for federation_id, hears in self._queue.heard():
                    if not self._wakeups.listening:
                        log.info("redis.listening")
                        self._wakeups.listening = True
                    self._wakeups.ring(federation_id, "events" if hears == "events" else "tasks")
            except Unavailable as error:
                if self._wakeups.listening:
                    log.warning("redis.lost", extra={"reason": str(error)})
                self._wakeups.listening = False
                await asyncio.sleep(RECONNECT_S)
