"""The loop that moves time: leases, deadlines, the next round, jobs that Redis has lost, things to throw away.

Every replica runs one. All it does is conditional and may be done twice.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

from fedmkt import fault_points
from fedmkt.tracing import traced
from fedmkt_coordinator import jobs, rounds, uploads
from fedmkt_coordinator.context import Context
from fedmkt_coordinator.dependencies import DependencyDown
from fedmkt_coordinator.embedded_redis import EmbeddedRedis
from fedmkt_coordinator.queue import Unavailable
from fedmkt_coordinator.wakeups import Announcer

log = logging.getLogger(__name__)

TIDY_EVERY_S = 60.0
BROKEN_STREAMS_KEPT = timedelta(days=1)


class Keeper:
    def __init__(self, context: Context, announcer: Announcer, redis: EmbeddedRedis | None) -> None:
        self._context = context
        self._announcer = announcer
        self._redis = redis
        self._tidied_at = float("-inf")
        self._redis_failing = False
        self._looked_at = float("-inf")
        self._listening_since = float("-inf")
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """`run` ends after the look that it is taking."""
        self._stopping.set()

    async def run(self) -> None:
        while not self._stopping.is_set():
            self._notice_absence()
            await self.tick()
            self._looked_at = asyncio.get_running_loop().time()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._context.settings.keeper_interval_s):
                    await self._stopping.wait()

    async def tick(self) -> None:
        """One look at everything. A step that fails is logged, and the others are taken all the same."""
        began = time.perf_counter()
        with traced("keeper.tick"):
            await self._look()
        self._context.metrics.ticked(time.perf_counter() - began)

    async def _look(self) -> None:
        await self._step("leases", self._expire_leases)
        await self._step("rounds", self._advance_rounds)
        await self._step("redis", self._revive_redis)
        await self._step("queue", self._reconcile_queue)
        await self._step("audit", self._write_refusals)
        fault_points.reach("keeper.looked")
        now = asyncio.get_running_loop().time()
        if now - self._tidied_at >= TIDY_EVERY_S:
            self._tidied_at = now
            await self._step("tidy", self._tidy)

    async def _step(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except DependencyDown as error:
            log.warning("keeper.step_postponed", extra={"step": name, "reason": str(error)})
            self._listening_since = asyncio.get_running_loop().time()  # no heartbeat is heard either
        except Exception:  # the top of the loop: logged with its traceback, tried again at the next tick
            log.exception("keeper.step_failed", extra={"step": name})
            self._context.metrics.step_failures.labels(name.split(" ")[0]).inc()

    def _notice_absence(self) -> None:
        """A coordinator that was down or halted heard no heartbeats: it may not call its workers silent for that."""
        now, settings = asyncio.get_running_loop().time(), self._context.settings
        if now - self._looked_at > settings.keeper_interval_s + settings.lease_s / 2:
            self._listening_since = now

    async def _expire_leases(self) -> None:
        if asyncio.get_running_loop().time() - self._listening_since < self._context.settings.lease_s:
            return
        expired = await jobs.expire_leases(self._context.store, self._context.patience)
        if expired:
            log.warning("jobs.leases_expired", extra={"jobs": expired})

    async def _advance_rounds(self) -> None:
        async with self._context.store.read() as tx:
            due = await tx.federations_due(tx.now)
        for federation_id in due:

            async def advance(federation_id: str = federation_id) -> None:
                async with self._context.store.write() as tx:
                    await rounds.advance(tx, federation_id)

            await self._step(f"rounds of {federation_id}", advance)

    async def _revive_redis(self) -> None:
        if self._redis is not None:
            await self._redis.revive()

    async def _reconcile_queue(self) -> None:
        """Redis may have been flushed, restarted or replaced: whatever waits is put there again."""
        try:
            await self._announcer.publish_jobs()
        except Unavailable as error:
            if not self._redis_failing:
                log.warning("redis.unavailable", extra={"reason": str(error)})
            self._redis_failing = True
            return
        self._redis_failing = False

    async def _write_refusals(self) -> None:
        await self._context.refusals.write(self._context.store)

    async def _tidy(self) -> None:
        async with self._context.store.write() as tx:
            await tx.forget_expired()
        await uploads.clear_leftovers(self._context.desk)
        await self._context.artifacts.sweep_incoming(self._context.clock() - BROKEN_STREAMS_KEPT)
