"""Rows put together as the wire shows them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fedmkt.protocol import (
    AdapterView,
    Event,
    FederationView,
    JobView,
    LlmProgress,
    RoundView,
    ScheduleView,
    SiteProgress,
    SiteRoundState,
    SiteSelf,
    SiteView,
    WebhookView,
)
from fedmkt_coordinator.readiness import readiness
from fedmkt_coordinator.rounds import awaited_appliers
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import (
    AdapterRow,
    EventRow,
    FederationRow,
    JobRow,
    RoundRow,
    RoundSiteRow,
    SiteRow,
    WebhookRow,
)


async def present_federation(store: Store, federation_id: str) -> FederationView:
    """As it is now, for the answer to a request that has changed it."""
    async with store.read() as tx:
        return await federation_view(tx, await tx.federation(federation_id))


async def federation_view(tx: Transaction, federation: FederationRow) -> FederationView:
    return (await federation_views(tx, [federation]))[0]


async def federation_views(tx: Transaction, rows: Sequence[FederationRow]) -> list[FederationView]:
    """Many federations with as many queries as for one, but for those whose next round waits, and those applying."""
    ids = [row.id for row in rows]
    sites: dict[str, list[SiteRow]] = defaultdict(list)
    for site in await tx.sites_of(ids):
        sites[site.federation_id].append(site)
    active = {each.federation_id: each for each in await tx.active_rounds(ids)}
    begun = await tx.rounds_begun_of(ids)
    running = await round_views(tx, {row.id: row for row in rows}, list(active.values()))
    current = {each.federation_id: each for each in running}
    return [
        await _federation_view(tx, row, sites[row.id], active.get(row.id), current.get(row.id), begun.get(row.id, 0))
        for row in rows
    ]


async def _federation_view(
    tx: Transaction,
    federation: FederationRow,
    sites: Sequence[SiteRow],
    active: RoundRow | None,
    current: RoundView | None,
    begun: int,
) -> FederationView:
    due = active is None and federation.paused_at is None and federation.rounds_requested > begun
    return FederationView(
        federation_id=federation.id,
        config=federation.config,
        created_at=federation.created_at,
        public_set=federation.public_set,
        public_samples=federation.public_samples,
        llm=federation.llm,
        llm_vocabulary=federation.llm_vocabulary,
        sites=tuple(_site_views(federation.config.sites, sites)),
        rounds_requested=federation.rounds_requested,
        rounds_finished=begun - (active is not None),
        current_round=current,
        waits_for=(await readiness(tx, federation)).waits_for if due else _paused(federation, active),
        schedule=_schedule(federation),
        paused_at=federation.paused_at,
    )


def _paused(federation: FederationRow, active: RoundRow | None) -> tuple[str, ...]:
    if federation.paused_at is None or active is not None:
        return ()
    return (f"the operator to resume: rounds are paused since {federation.paused_at.isoformat(timespec='seconds')}",)


def _schedule(federation: FederationRow) -> ScheduleView | None:
    if federation.every_s is None or federation.next_round_at is None:
        return None
    return ScheduleView(
        every_s=federation.every_s, next_round_at=federation.next_round_at, rounds_left=federation.rounds_left
    )


def _site_views(names: Iterable[str], rows: Sequence[SiteRow]) -> Iterable[SiteView]:
    latest = {row.name: row for row in rows}  # oldest first, so the present key's row stays
    active = {row.name: row for row in rows if row.revoked_at is None}
    for name in names:
        row = active.get(name) or latest.get(name)
        yield SiteView(site_id=None, name=name, state="awaited") if row is None else site_view(row)


def site_view(row: SiteRow) -> SiteView:
    return SiteView(
        site_id=row.id,
        name=row.name,
        state="revoked" if row.revoked_at else "ready" if row.ready else "enrolled",
        model=row.model,
        vocabulary=row.vocabulary,
        private_samples=row.private_samples,
        last_seen_at=row.last_seen_at,
    )


async def site_self(tx: Transaction, site: SiteRow) -> SiteSelf:
    federation = await tx.federation(site.federation_id)
    return SiteSelf(
        federation_id=federation.id,
        site=site_view(site),
        config=federation.config,
        public_set=federation.public_set,
        public_samples=federation.public_samples,
    )


async def round_views(
    tx: Transaction, federations: Mapping[str, FederationRow], rows: Sequence[RoundRow]
) -> list[RoundView]:
    """Many rounds with as many queries as for one, but for those applying; `federations` by id, theirs among them."""
    ids = [row.id for row in rows]
    parts: dict[str, list[RoundSiteRow]] = defaultdict(list)
    for part in await tx.parts(ids):
        parts[part.round_id].append(part)
    uploading = await tx.uploading_sites(ids)
    jobs = {job.id: job for job in await tx.jobs([row.job_id for row in rows if row.job_id])}
    appliers = {
        row.id: await awaited_appliers(tx, federations[row.federation_id], row)
        for row in rows
        if row.state == "applying"
    }
    return [
        _round_view(
            row,
            [_progress(row, part, uploading) for part in parts[row.id]],
            appliers.get(row.id, []),
            jobs[row.job_id].progress if row.job_id and row.state == "distilling" else None,
        )
        for row in rows
    ]


def _round_view(
    row: RoundRow, sites: Sequence[SiteProgress], appliers: Sequence[str], progress: LlmProgress | None
) -> RoundView:
    collecting = [each.site for each in sites if each.state in ("expected", "uploading")]
    return RoundView(
        round_id=row.id,
        federation_id=row.federation_id,
        number=row.number,
        slice_index=row.slice_index,
        state=row.state,
        reason=row.reason,
        started_at=row.started_at,
        finished_at=row.finished_at,
        deadline=row.deadline,
        missing=tuple(collecting if row.state == "collecting" else appliers),
        sites=tuple(sites),
        llm_progress=progress,
        llm_result=row.result,
        state_seconds=row.seconds,
    )


def _progress(row: RoundRow, part: RoundSiteRow, uploading: set[tuple[str, str]]) -> SiteProgress:
    return SiteProgress(
        site=part.site,
        state=_part_state(row, part, (row.id, part.site) in uploading),
        upload_bytes=part.upload_bytes,
        uploaded_at=part.uploaded_at,
        applied_at=part.applied_at,
        report=part.report,
    )


def _part_state(row: RoundRow, part: RoundSiteRow, uploading: bool) -> SiteRoundState:
    if part.applied_at is not None:
        return "applied"
    if part.uploaded_at is not None:
        return "uploaded"
    if row.state != "collecting" or not part.expected:
        return "missed"
    return "uploading" if uploading else "expected"


def site_progress(row: RoundRow, part: RoundSiteRow) -> SiteProgress:
    """A site's view of its own part."""
    return _progress(row, part, set())


def event_view(row: EventRow) -> Event:
    return Event(
        sequence=row.sequence,
        at=row.at,
        kind=row.kind,
        federation_id=row.federation_id,
        round_id=row.round_id,
        site=row.site,
        data=row.data,
    )


def webhook_view(row: WebhookRow) -> WebhookView:
    return WebhookView(
        webhook_id=row.id,
        federation_id=row.federation_id,
        url=row.url,
        kinds=row.kinds,
        state=row.state,
        reason=row.reason,
        created_at=row.created_at,
        delivered=row.delivered,
        delivered_at=row.delivered_at,
        failures=row.failures,
        failing_since=row.failing_since,
        next_attempt_at=row.due_at if row.failures and row.state == "active" else None,
    )


def adapter_view(row: AdapterRow) -> AdapterView:
    return AdapterView(
        version=row.version,
        parent=row.parent,
        round_id=row.round_id,
        artifact=row.artifact,
        created_at=row.created_at,
        promoted=row.promoted,
        evaluations=row.evaluations,
        knowledge=row.knowledge,
    )


def job_view(row: JobRow, lease_s: float) -> JobView:
    return JobView(
        job_id=row.id,
        state=row.state,
        attempt=row.attempt,
        payload=row.payload,
        lease_expires_at=row.lease_expires_at,
        lease_s=lease_s,
        progress=row.progress,
        reason=row.reason,
    )
