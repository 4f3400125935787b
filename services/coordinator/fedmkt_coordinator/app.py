"""Putting the coordinator together. `create_app` opens nothing; the lifespan does, and closes it again."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

from fastapi import FastAPI

from fedmkt import __version__
from fedmkt.protocol import Problem
from fedmkt_coordinator import credentials
from fedmkt_coordinator.arrivals import ReadAhead
from fedmkt_coordinator.artifacts import ArtifactStore
from fedmkt_coordinator.audit import Refusals
from fedmkt_coordinator.context import Context
from fedmkt_coordinator.dependencies import Dependencies
from fedmkt_coordinator.description import describe
from fedmkt_coordinator.embedded_redis import EmbeddedRedis
from fedmkt_coordinator.keeper import Keeper
from fedmkt_coordinator.keys import CoordinatorKey
from fedmkt_coordinator.metrics import Metrics
from fedmkt_coordinator.observed import Observed
from fedmkt_coordinator.outbound import Outbound
from fedmkt_coordinator.problems import install_problems
from fedmkt_coordinator.public_sets import PublicSets
from fedmkt_coordinator.queue import JobQueue, without_password
from fedmkt_coordinator.rate_limits import Rates
from fedmkt_coordinator.readiness import WaitsFor
from fedmkt_coordinator.routes import methods_of, routers
from fedmkt_coordinator.settings import Settings
from fedmkt_coordinator.store import Clock, Outbox, Store, open_engine
from fedmkt_coordinator.store.migrate import migrate
from fedmkt_coordinator.vocabularies import Vocabularies
from fedmkt_coordinator.wakeups import Announcer, Wakeups
from fedmkt_coordinator.webhooks import ATTEMPT_S, Deliverer

log = logging.getLogger(__name__)

Loop = Callable[[], Awaitable[None]]
RESTART_LOOP_S = 1.0
FINISH_S = 10.0
CANCEL_AGAIN_S = 0.5
DESCRIPTION = """
Federated mutual knowledge transfer: one large language model and many small ones teach each other without any private
text or weight leaving a site. Errors are RFC 9457 problems with a stable `code`.
"""


def utc_now() -> datetime:
    return datetime.now(UTC)


def create_app(settings: Settings, *, clock: Clock = utc_now, keep_time: bool = True) -> FastAPI:
    """`keep_time=False` leaves the keeper's loop out: a test moves the clock and calls `app.state.keeper.tick()`.

    The same goes for the webhooks' loop, `app.state.deliverer.look()`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            redis = await _embedded_redis(settings, stack)
            context = await _open(settings, clock, redis, stack)
            announcer = Announcer(context.store, context.queue, context.wakeups)
            context.store.after_commit = _told_to(context.metrics, announcer)
            keeper = Keeper(context, announcer, redis)
            deliverer = _deliverer(context)
            app.state.context, app.state.keeper, app.state.deliverer = context, keeper, deliverer
            await stack.enter_async_context(_running(announcer, keeper, deliverer, keep_time=keep_time))
            log.info(
                "coordinator.started", extra={"version": __version__, "redis": without_password(context.redis_url)}
            )
            yield
            context.wakeups.stop()
        log.info("coordinator.stopped")

    app = FastAPI(
        title="FedMKT coordinator",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `Observed` does that
        generate_unique_id_function=lambda route: f"{route.tags[0]}_{route.name}",
        responses={"default": {"model": Problem, "description": "A problem: what is wrong, and what to do"}},
    )
    install_problems(app)
    for router in routers():
        app.include_router(router)
    app.state.methods_of = methods_of
    describe(app, routers)
    app.add_middleware(Observed, body_grace_s=settings.body_grace_s)
    app.add_middleware(ReadAhead)  # the outermost
    return app


def _told_to(metrics: Metrics, announcer: Announcer) -> Callable[[Outbox], None]:
    """Whoever learns of a commit."""

    def tell(outbox: Outbox) -> None:
        metrics.committed(outbox)
        announcer.announce(outbox)

    return tell


async def _embedded_redis(settings: Settings, stack: AsyncExitStack) -> EmbeddedRedis | None:
    if settings.redis_url is not None:
        return None
    redis = EmbeddedRedis(settings.state_dir / "redis")
    stack.push_async_callback(redis.stop)
    await redis.start()
    return redis


async def _open(settings: Settings, clock: Clock, redis: EmbeddedRedis | None, stack: AsyncExitStack) -> Context:
    """Everything that a request needs, opened in order and closed in reverse."""
    database_url = settings.database_url.get_secret_value() if settings.database_url else None
    engine = open_engine(database_url, settings.state_dir)
    store = Store(engine, clock)
    stack.push_async_callback(store.close)
    await migrate(engine)
    await credentials.install(store, settings)
    redis_url = redis.url if redis is not None else settings.redis_url.get_secret_value() if settings.redis_url else ""
    queue = JobQueue.connect(redis_url)
    stack.push_async_callback(queue.close)
    artifacts = ArtifactStore.open(settings.artifacts_url, settings.state_dir)
    outbound = Outbound(allow_private=settings.webhook_allow_private, timeout_s=ATTEMPT_S)
    stack.push_async_callback(outbound.close)
    return Context(
        settings=settings,
        store=store,
        artifacts=artifacts,
        public_sets=PublicSets(artifacts),
        vocabularies=Vocabularies(store),
        queue=queue,
        redis_url=redis_url,
        wakeups=Wakeups(settings.poll_recheck_s),
        waits_for=WaitsFor(),
        key=await CoordinatorKey.load(store),
        clock=clock,
        checking=asyncio.Semaphore(settings.check_threads),
        outbound=outbound,
        rates=Rates.of(settings),
        refusals=Refusals(time.monotonic),
        metrics=Metrics(),
        dependencies=Dependencies({"database": store.ping, "artifacts": artifacts.ping, "redis": queue.ping}),
    )


def _deliverer(context: Context) -> Deliverer:
    settings = context.settings
    return Deliverer(
        context.store,
        context.outbound,
        interval_s=settings.keeper_interval_s,
        patience_s=settings.webhook_patience_s,
    )


@asynccontextmanager
async def _running(
    announcer: Announcer, keeper: Keeper, deliverer: Deliverer, *, keep_time: bool
) -> AsyncIterator[None]:
    """The background loops, ended with the block: those that write finish what they do, listening is broken off."""
    loops: list[Loop] = [announcer.run, *([keeper.run, deliverer.run] if keep_time else [])]
    writing = [asyncio.create_task(_kept_alive(loop)) for loop in loops]
    listening = asyncio.create_task(_kept_alive(announcer.listen))
    try:
        yield
    finally:
        announcer.stop()
        keeper.stop()
        deliverer.stop()
        await asyncio.wait(writing, timeout=FINISH_S)
        await _cancel([*writing, listening])


async def _cancel(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Until they are gone: a client that is just connecting may take the first time for a failed attempt."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


async def _kept_alive(loop: Loop) -> None:
    while True:
        try:
            return await loop()
        except Exception:  # the top of a loop that the service cannot do without
            log.exception("coordinator.loop_failed")
            await asyncio.sleep(RESTART_LOOP_S)
