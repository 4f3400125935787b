"""The one thing a site should do now, computed from what is committed; nothing is remembered beside it."""

import asyncio
from datetime import datetime, timedelta

from fedmkt.protocol import Apply, Task, TrainAndUpload, Wait
from fedmkt_coordinator.enrolment import check_active
from fedmkt_coordinator.readiness import MAX_NAMED, WaitsFor, maps_of, named
from fedmkt_coordinator.rounds import may_apply
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import FederationRow, RoundRow, RoundSiteRow, SiteRow
from fedmkt_coordinator.wakeups import Wakeups

# How long a site that cannot hold a long poll should wait before it asks again.
ASK_AGAIN_S = 2.0
MAX_REASON = 500


async def next_task(store: Store, wakeups: Wakeups, waits_for: WaitsFor, site: SiteRow, wait_s: float) -> Task:
    """The site's task; an answer 'wait' is held back until it changes or `wait_s` have passed."""
    clock = asyncio.get_running_loop().time
    ends = clock() + wait_s
    await store.saw_site(site.id)
    while True:
        bell = wakeups.bell(site.federation_id, "tasks")
        async with store.read() as tx:
            task = await current_task(tx, waits_for, check_active(await tx.site(site.id)))
        left_s = ends - clock()
        if not isinstance(task, Wait) or left_s <= 0 or wakeups.stopping:
            return task
        await wakeups.wait(bell, left_s)


async def current_task(tx: Transaction, waits_for: WaitsFor, site: SiteRow) -> Task:
    federation = await tx.federation(site.federation_id)
    row = await tx.active_round(federation.id)
    if row is None:
        return await _between_rounds(tx, waits_for, federation, site)
    part = await tx.part(row.id, site.name)
    match row.state:
        case "collecting":
            return await _while_collecting(tx, federation, row, part)
        case "distilling":
            return _wait(tx.now, row.deadline, f"round {row.number} is distilling: the LLM learns from the sites")
        case _:
            return await _while_applying(tx, federation, row, site, part)


async def _between_rounds(tx: Transaction, waits_for: WaitsFor, federation: FederationRow, site: SiteRow) -> Task:
    begun = await tx.rounds_begun(federation.id)
    if site.vocabulary is None or site.model is None:
        lacking = (
            "its vocabulary (PUT /v1/me/vocabulary)" if site.vocabulary is None else "its model (PUT /v1/me/model)"
        )
        return _wait(tx.now, None, f"the coordinator waits for this site to send {lacking}")
    if federation.paused_at is not None:
        since = federation.paused_at.isoformat(timespec="seconds")
        return _wait(tx.now, None, f"rounds are paused since {since}, until the operator resumes them")
    if federation.rounds_requested <= begun:
        due = f"no round is due: {begun} of {federation.rounds_requested} have begun"
        return _until_scheduled(tx.now, federation, begun) or _wait(tx.now, None, due)
    missing = "; ".join(await waits_for.of(tx, federation))
    return _wait(tx.now, None, f"round {begun + 1} waits for {missing or 'its turn'}")


async def _while_collecting(
    tx: Transaction, federation: FederationRow, row: RoundRow, part: RoundSiteRow | None
) -> Task:
    assert row.deadline is not None
    if part is not None and part.expected and part.uploaded_at is None:
        return TrainAndUpload(
            round_id=row.id,
            round_number=row.number,
            slice_index=row.slice_index,
            upload_adapter=federation.config.average_adapters,
            deadline=row.deadline,
        )
    if part is None or not part.expected:
        return _wait(tx.now, row.deadline, f"round {row.number} began without this site; it can learn from it later")
    missing = await tx.awaited_uploads(row.id, MAX_NAMED + 1)
    return _wait(tx.now, row.deadline, f"round {row.number} is collecting and waits for {named(missing)}")


async def _while_applying(
    tx: Transaction, federation: FederationRow, row: RoundRow, site: SiteRow, part: RoundSiteRow | None
) -> Task:
    if part is not None and part.applied_at is not None:
        missing = named(await tx.awaited_reports(row, MAX_NAMED + 1))
        return _wait(tx.now, row.deadline, f"round {row.number} is applying and waits for {missing}")
    maps = await maps_of(tx, federation, site)
    if not may_apply(row, site, part) or maps is None or maps.pending or maps.failed:
        return _wait(tx.now, row.deadline, f"round {row.number} is applying; this site joins the next one")
    assert row.knowledge is not None, "applying begins with the LLM's knowledge"
    assert row.deadline is not None
    assert federation.llm_vocabulary is not None
    return Apply(
        round_id=row.id,
        round_number=row.number,
        slice_index=row.slice_index,
        knowledge=row.knowledge,
        llm_vocabulary=federation.llm_vocabulary,
        llm_vocabulary_artifact=(await tx.vocabulary(federation.llm_vocabulary)).artifact,
        vocabulary_maps=maps.from_llm,
        averaged_adapter=row.averaged_adapter,
        deadline=row.deadline,
    )


def _until_scheduled(now: datetime, federation: FederationRow, begun: int) -> Wait | None:
    """`until` is the scheduled time: a site that cannot hold a long poll may sleep that long."""
    at = federation.next_round_at
    if at is None or at <= now:
        return None
    return Wait(until=at, reason=f"round {begun + 1} is scheduled for {at.isoformat(timespec='seconds')}")


def _wait(now: datetime, deadline: datetime | None, reason: str) -> Wait:
    until = now + timedelta(seconds=ASK_AGAIN_S)
    ends = f", at the latest until {deadline.isoformat(timespec='seconds')}" if deadline else ""
    return Wait(until=until, reason=f"{reason[: MAX_REASON - len(ends)]}{ends}")
