"""The rules of a round: when it begins, what moves it on, how it ends. No HTTP, no SQL.

`advance` is called inside every transaction that writes a fact a round may have waited for, and by the keeper when time
has passed. It locks the federation first, so what it decides on cannot change under it, and it is safe to repeat.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from fedmkt.errors import Refusal
from fedmkt.protocol import ApplyReport, DistillJob, RoundRequest, RoundState, UploadedKnowledge
from fedmkt_coordinator.readiness import Readiness, named, order_maps, readiness
from fedmkt_coordinator.schedule import asked_before, end_schedule, set_schedule, take_tick
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import FederationRow, RoundRow, RoundSiteRow, SiteRow


class RoundOver(Refusal):
    status = 409
    code = "round.over"
    title = "The round has ended"
    remedy = "Nothing: the round has ended by itself."


class ReportDiffers(Refusal):
    status = 409
    code = "report.differs"
    title = "The site has reported something else on this round"
    remedy = "Two agents run for one site, or a state folder was restored from a backup: keep one."


class RoundNotApplying(Refusal):
    status = 409
    code = "round.not_applying"
    title = "The round takes no reports now"


# ------------------------------------------------------------------------------------------------ moving on


async def advance(tx: Transaction, federation_id: str) -> None:
    """Take every step that the committed facts and the time allow."""
    federation = await tx.federation(federation_id, lock=True)
    while await _step(tx, federation):
        pass


async def _step(tx: Transaction, federation: FederationRow) -> bool:
    """One transition; False when there is none to take."""
    active = await tx.active_round(federation.id)
    if active is None:
        return await _begin(tx, federation)
    match active.state:
        case "collecting":
            return await _end_collecting(tx, federation, active)
        case "distilling":
            return await _end_distilling(tx, federation, active)
        case _:
            return await _end_applying(tx, federation, active)


async def _begin(tx: Transaction, federation: FederationRow) -> bool:
    begun = await tx.rounds_begun(federation.id)
    if federation.paused_at is not None:
        return False
    if federation.rounds_requested <= begun and not await take_tick(tx, federation):
        return False
    if await _surely_waits(tx, federation):
        return False
    await order_maps(tx, federation)
    now_ready = await readiness(tx, federation)
    if now_ready.waits_for:
        return False
    config = federation.config
    deadline = tx.now + timedelta(seconds=config.schedule.collect_timeout_s)
    await tx.begin_round(federation.id, begun + 1, begun % config.public_set.slices, deadline, now_ready.ready)
    return True


async def _surely_waits(tx: Transaction, federation: FederationRow) -> bool:
    """What `readiness` would find, without its look at each of ten thousand sites whenever one of them says something.

    Sites that have described themselves are all that can be ready: with fewer than a quorum, or some missing and the
    time for them not over since the quorum's last one enrolled, no round begins.
    """
    schedule, described = federation.config.schedule, await tx.described_sites(federation.id)
    if described < schedule.quorum:
        return True
    if described == len(federation.config.sites):
        return False
    began = await tx.described_since(federation.id, schedule.quorum)
    return tx.now < began + timedelta(seconds=schedule.gather_timeout_s)


async def _end_collecting(tx: Transaction, federation: FederationRow, row: RoundRow) -> bool:
    late = row.deadline is not None and row.deadline <= tx.now
    if not late and await tx.awaited_uploads(row.id, 1):
        return False
    parts = [part for part in await tx.parts([row.id]) if part.expected]
    uploaded = [part for part in parts if part.uploaded_at is not None]
    awaited = [part.site for part in parts if part.uploaded_at is None]
    quorum = federation.config.schedule.quorum
    if len(uploaded) >= quorum:
        await _distill(tx, federation, row, uploaded)
    else:
        await tx.move_round(row, "failed", reason=await _under_quorum(tx, row, len(uploaded), quorum, awaited))
    return True


async def _under_quorum(tx: Transaction, row: RoundRow, uploaded: int, quorum: int, awaited: Sequence[str]) -> str:
    revoked = [
        site.name
        for site in await tx.sites(row.federation_id)
        if site.revoked_at is not None and site.revoked_at >= row.started_at
    ]
    why = [f"missing at the deadline: {named(awaited)}"] if awaited else []
    why += [f"revoked meanwhile: {named(sorted(set(revoked)))}"] if revoked else []
    return "; ".join([f"{uploaded} sites uploaded, quorum is {quorum}", *why])


async def drop_site(tx: Transaction, federation_id: str, site: str) -> None:
    """A revoked site's knowledge counts no longer, unless the LLM server has it already."""
    active = await tx.active_round(federation_id)
    if active is None or active.state != "collecting":
        return
    part = await tx.part(active.id, site)
    if part is not None:
        await tx.abandon_uploads(active.id, site)
        await tx.set_uploaded(replace(part, expected=False, knowledge=None, adapter=None, uploaded_at=None))


async def _distill(tx: Transaction, federation: FederationRow, row: RoundRow, uploaded: Sequence[RoundSiteRow]) -> None:
    now_ready = await readiness(tx, federation)
    adapter = await tx.promoted_adapter(federation.id)
    assert federation.public_set is not None, "a round begins with a public set"
    job = DistillJob(
        federation_id=federation.id,
        round_id=row.id,
        round_number=row.number,
        slice_index=row.slice_index,
        config=federation.config,
        public_set=federation.public_set,
        adapter=adapter.artifact,
        uploads=tuple([await _uploaded(tx, part, now_ready) for part in uploaded]),
    )
    deadline = tx.now + timedelta(seconds=federation.config.schedule.distill_timeout_s)
    job_row = await tx.add_job(job)
    await tx.move_round(row, "distilling", deadline=deadline, job_id=job_row.id)


async def _uploaded(tx: Transaction, part: RoundSiteRow, now_ready: Readiness) -> UploadedKnowledge:
    assert part.knowledge is not None
    assert part.vocabulary is not None
    return UploadedKnowledge(
        site=part.site,
        knowledge=part.knowledge,
        vocabulary=part.vocabulary,
        vocabulary_artifact=(await tx.vocabulary(part.vocabulary)).artifact,
        vocabulary_maps=now_ready.maps[part.site].to_llm,
        adapter=part.adapter,
        private_samples=part.private_samples,
    )


async def _end_distilling(tx: Transaction, federation: FederationRow, row: RoundRow) -> bool:
    """The job's own end moves the round (`jobs.complete`, `jobs.fail`); here only patience ends."""
    if row.deadline is None or row.deadline > tx.now:
        return False
    timeout_s = federation.config.schedule.distill_timeout_s
    await end_round(tx, row, "failed", f"the LLM server did not finish within {timeout_s:g} s (distill_timeout_s)")
    return True


async def _end_applying(tx: Transaction, federation: FederationRow, row: RoundRow) -> bool:
    late = row.deadline is not None and row.deadline <= tx.now
    if not late and await tx.awaits_uploader(row):
        return False
    awaited = await awaited_appliers(tx, federation, row)
    if awaited and not late:
        return False
    reason = f"{named(awaited)} did not report before the deadline" if awaited else None
    await tx.move_round(row, "completed", reason=reason)
    return True


async def end_round(tx: Transaction, row: RoundRow, state: RoundState, reason: str) -> RoundRow:
    """Fail or cancel a round, and the job that works for it."""
    if row.job_id is not None:
        job = await tx.job(row.job_id, lock=True)
        if job.state in ("queued", "running"):
            await tx.fail_job(job, f"round {row.number} was ended: {reason}")
    return await tx.move_round(row, state, reason=reason)


# ------------------------------------------------------------------------------------------------ who is awaited


def may_apply(row: RoundRow, site: SiteRow, part: RoundSiteRow | None) -> bool:
    """A ready site that uploaded, or that has asked for a task since the round began, is expected to apply."""
    if not site.ready:
        return False
    seen = site.last_seen_at is not None and site.last_seen_at >= row.started_at
    return seen or (part is not None and part.uploaded_at is not None)


async def awaited_appliers(tx: Transaction, federation: FederationRow, row: RoundRow) -> list[str]:
    """Sites that are expected to apply, could, and have not reported."""
    parts = {part.site: part for part in await tx.parts([row.id])}
    now_ready = await readiness(tx, federation)
    return sorted(
        site.name
        for site in now_ready.ready
        if may_apply(row, site, parts.get(site.name)) and not _reported(parts.get(site.name))
    )


def _reported(part: RoundSiteRow | None) -> bool:
    return part is not None and part.applied_at is not None


# ------------------------------------------------------------------------------------------------ what people ask for


async def request_rounds(store: Store, federation_id: str, wanted: RoundRequest, key: str | None) -> None:
    """Ask for more rounds, or for a schedule; the same Idempotency-Key asks once."""
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        if await asked_before(tx, federation, wanted, key):
            return
        if wanted.every_s is None:
            count = wanted.count or 1
            total = federation.rounds_requested + count
            await tx.set_rounds_requested(federation, total)
            await tx.append(federation_id, "rounds.requested", count=count, total=total)
        else:
            await set_schedule(tx, federation, wanted.every_s, wanted.count)
        await advance(tx, federation_id)


async def pause(store: Store, federation_id: str) -> None:
    """Begin no more rounds until `resume`; the running one ends as it would. Paused again, nothing changes."""
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        if federation.paused_at is None:
            await tx.set_paused(federation, tx.now)
            await tx.append(federation_id, "rounds.paused")


async def resume(store: Store, federation_id: str) -> None:
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        if federation.paused_at is not None:
            await tx.set_paused(federation, None)
            await tx.append(federation_id, "rounds.resumed", paused_s=(tx.now - federation.paused_at).total_seconds())
            await advance(tx, federation_id)


async def cancel(store: Store, round_id: str) -> None:
    """End the round now, withdraw those that were to follow it, and end the schedule; once cancelled, it stays."""
    async with store.write() as tx:
        federation = await tx.federation((await tx.round(round_id)).federation_id, lock=True)
        row = await tx.round(round_id)
        if row.state == "cancelled":
            return
        if not row.active:
            raise RoundOver(f"round {row.number} is {row.state} since {row.state_since.isoformat()}: nothing to cancel")
        await _withdraw(tx, federation, row)


async def cancel_all(store: Store, federation_id: str) -> None:
    """As `cancel`, of whichever round runs, if any does."""
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        await _withdraw(tx, federation, await tx.active_round(federation_id))


async def _withdraw(tx: Transaction, federation: FederationRow, active: RoundRow | None) -> None:
    begun = await tx.rounds_begun(federation.id)
    withdrawn = federation.rounds_requested - begun
    await end_schedule(tx, federation, "an operator cancelled it")
    if withdrawn:
        await tx.set_rounds_requested(federation, begun)
    if active is not None:
        await end_round(tx, active, "cancelled", "an operator cancelled it")
    if withdrawn or active is not None:
        round_id = active.id if active is not None else None
        await tx.append(federation.id, "rounds.withdrawn", round_id=round_id, count=withdrawn, total=begun)


async def report(store: Store, site: SiteRow, round_id: str, given: ApplyReport) -> RoundSiteRow:
    """A site's account of the round; the same report again changes nothing."""
    async with store.write() as tx:
        federation = await tx.federation(site.federation_id, lock=True)
        row = await tx.round(round_id, of=federation.id)
        part = await tx.part(round_id, site.name)
        if part is not None and part.report is not None:
            if part.report != given:
                raise ReportDiffers(f"site {site.name} reported on round {row.number} before, and differently")
            return part
        if row.state != "applying":
            raise RoundNotApplying(
                f"round {row.number} is {row.state} since {row.state_since.isoformat()}, reports are taken while it "
                "is applying; ask for the next task: GET /v1/me/task"
            )
        await tx.join_round(round_id, site.name)
        await tx.set_report(round_id, site.name, given)
        await tx.append(federation.id, "site.applied", round_id=round_id, site=site.name, decision=given.gate.decision)
        await advance(tx, federation.id)
        written = await tx.part(round_id, site.name)
        assert written is not None
        return written
