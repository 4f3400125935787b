"""What the coordinator is made of, built once by `app.lifespan` and handed to whoever needs it."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from fedmkt_coordinator.artifacts import ArtifactStore
from fedmkt_coordinator.audit import Refusals
from fedmkt_coordinator.dependencies import Dependencies
from fedmkt_coordinator.jobs import Patience
from fedmkt_coordinator.keys import CoordinatorKey
from fedmkt_coordinator.metrics import Metrics
from fedmkt_coordinator.outbound import Outbound
from fedmkt_coordinator.public_sets import PublicSets
from fedmkt_coordinator.queue import JobQueue
from fedmkt_coordinator.rate_limits import Rates
from fedmkt_coordinator.readiness import WaitsFor
from fedmkt_coordinator.settings import Settings
from fedmkt_coordinator.store import Clock, Store
from fedmkt_coordinator.uploads import Desk
from fedmkt_coordinator.vocabularies import Vocabularies
from fedmkt_coordinator.wakeups import Wakeups


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    store: Store
    artifacts: ArtifactStore
    public_sets: PublicSets
    vocabularies: Vocabularies
    queue: JobQueue
    redis_url: str
    wakeups: Wakeups
    waits_for: WaitsFor
    key: CoordinatorKey
    clock: Clock
    checking: asyncio.Semaphore
    outbound: Outbound
    rates: Rates
    refusals: Refusals
    metrics: Metrics
    dependencies: Dependencies

    @property
    def patience(self) -> Patience:
        return Patience(self.settings.lease_s, self.settings.max_attempts, self.settings.retry_delay_s)

    @property
    def desk(self) -> Desk:
        return Desk(
            self.store, self.artifacts, self.public_sets, self.key, self.checking, self.settings.max_upload_bytes
        )


def context_of(request: Request) -> Context:
    found = request.app.state.context
    assert isinstance(found, Context), "the application runs inside its lifespan"
    return found


async def _handed_out(request: Request) -> Context:  # the framework calls what is no coroutine in a thread
    return context_of(request)


Ctx = Annotated[Context, Depends(_handed_out)]
