"""The store's contract, continued: uploads, parts of a round, jobs, credentials, adapters, reading rights."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from coordinator_world import CARD, Clock, a_report, config
from fedmkt.protocol import LlmProgress, MapJob, MapResult, RoundState
from fedmkt.signing import UploadKind, new_key, sign_manifest
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store import StateChanged, Store, Transaction
from fedmkt_coordinator.store.records import AdapterRow, FederationRow, JobRow, MapRow, RoundRow, SiteRow, UploadRow
from fedmkt_coordinator.store.uploads import UploadUnknown

pytestmark = pytest.mark.anyio

DIGEST, OTHER, THIRD = "ab" * 32, "cd" * 32, "ef" * 32


@pytest.fixture
async def federation(store: Store) -> FederationRow:
    async with store.write() as tx:
        return (await tx.add_federation(config()))[0]


@pytest.fixture
async def sites(store: Store, federation: FederationRow) -> list[SiteRow]:
    async with store.write() as tx:
        made = [await tx.add_site(federation.id, name, DIGEST) for name in ("north", "south")]
        for site in made:
            await tx.set_site_model(site, CARD, 7)
            await tx.set_site_vocabulary(site, OTHER)
        return [await tx.site(site.id) for site in made]


@pytest.fixture
async def collecting(store: Store, federation: FederationRow, sites: list[SiteRow], clock: Clock) -> RoundRow:
    async with store.write() as tx:
        return await tx.begin_round(federation.id, 1, 0, clock.now + timedelta(seconds=9), sites)


async def announced(tx: Transaction, row: RoundRow, site: str = "north", kind: UploadKind = "knowledge") -> UploadRow:
    return await tx.add_upload(row.federation_id, site, sign_manifest(new_key(), kind, row.id, b"bytes"))


# ------------------------------------------------------------------------------------------------ uploads


async def test_chunks_that_come_at_once_are_all_written(
    store: Store, collecting: RoundRow, sites: list[SiteRow]
) -> None:
    north, south = sites
    async with store.write() as tx:
        first, other = await announced(tx, collecting), await announced(tx, collecting, "south")
        await tx.move_upload(other, "abandoned")
    adding = [store.chunks.add(first.id, north.id, number) for number in range(20)]
    seen = await asyncio.gather(*adding, store.chunks.add(other.id, south.id, 0), store.chunks.add("none", north.id, 0))
    assert seen[20:] == [None, None]  # they take no chunks, and are in nobody's way
    assert all(there is not None and number in there for number, there in enumerate(seen[:20]))
    async with store.read() as tx:
        assert await tx.chunks(first.id) == set(range(20))
        assert await tx.chunks(other.id) == set()
    assert await store.chunks.add(first.id, north.id, 7) == set(range(20))  # a second time


async def test_a_chunk_is_written_although_the_request_that_wrote_for_it_was_broken_off(
    store: Store, collecting: RoundRow, sites: list[SiteRow]
) -> None:
    async with store.write() as tx:
        upload = await announced(tx, collecting)
    adding = [asyncio.create_task(store.chunks.add(upload.id, sites[0].id, number)) for number in range(3)]
    await asyncio.sleep(0)  # the first has the turn and takes all three along
    adding[0].cancel()
    await asyncio.wait(adding)
    assert {1, 2} <= (adding[1].result() or set()) | (adding[2].result() or set())
    async with store.read() as tx:
        assert {1, 2} <= await tx.chunks(upload.id)


async def test_one_upload_of_a_kind_is_alive(store: Store, collecting: RoundRow) -> None:
    async with store.write() as tx:
        first = await announced(tx, collecting)
        await announced(tx, collecting, kind="adapter")
        await announced(tx, collecting, "south")
        assert await tx.live_upload(collecting.id, "north", "knowledge") == first
    with pytest.raises(IntegrityError):
        async with store.write() as tx:
            await announced(tx, collecting)
    async with store.write() as tx:
        await tx.move_upload(first, "refused")
        assert await tx.live_upload(collecting.id, "north", "knowledge") is None
        second = await announced(tx, collecting)
    async with store.read() as tx:
        assert await tx.live_upload(collecting.id, "north", "knowledge") == second
        assert await tx.uploading_sites([collecting.id]) == {(collecting.id, "north"), (collecting.id, "south")}
        with pytest.raises(UploadUnknown):
            await tx.upload("upload_of_nobody")


async def test_an_upload_moves_from_the_state_it_was_read_in_only(
    store: Store, collecting: RoundRow, clock: Clock
) -> None:
    async with store.write() as tx:
        stale = await announced(tx, collecting)
    clock.move(1)
    async with store.write() as tx:
        accepted = await tx.move_upload(stale, "accepted")
    assert (accepted.state, accepted.accepted_at) == ("accepted", clock.now)
    with pytest.raises(StateChanged, match="no longer open"):
        async with store.write() as tx:
            await tx.move_upload(stale, "abandoned")


async def test_chunks_are_counted_once_and_forgotten_together(store: Store, collecting: RoundRow) -> None:
    async with store.write() as tx:
        upload, other = await announced(tx, collecting), await announced(tx, collecting, "south")
        for number in (2, 0, 2):
            await tx.add_chunks([(upload.id, number)])
        await tx.add_chunks([(other.id, 1)])
    async with store.write() as tx:
        assert await tx.chunks(upload.id) == {0, 2}
        await tx.forget_chunks(upload.id)
    async with store.read() as tx:
        assert (await tx.chunks(upload.id), await tx.chunks(other.id)) == (set(), {1})


async def test_leftovers_are_settled_uploads_with_chunks_and_open_ones_of_rounds_that_ended(
    store: Store, collecting: RoundRow
) -> None:
    async with store.write() as tx:
        still_open, settled = await announced(tx, collecting), await announced(tx, collecting, "south")
        for upload in (still_open, settled):
            await tx.add_chunks([(upload.id, 0)])
        assert await tx.leftover_uploads(10) == []
        await tx.abandon_uploads(collecting.id, "south")
        assert [row.id for row in await tx.leftover_uploads(10)] == [settled.id]
        await tx.move_round(collecting, "cancelled", reason="no reason")
        assert {row.id for row in await tx.leftover_uploads(10)} == {settled.id, still_open.id}
        assert len(await tx.leftover_uploads(1)) == 1
        await tx.abandon_uploads(collecting.id, "north", only_open=True)
        assert (await tx.upload(still_open.id)).state == "abandoned"


# ------------------------------------------------------------------------------------------------ parts


async def test_a_part_says_what_was_uploaded_and_who_is_awaited(
    store: Store, collecting: RoundRow, sites: list[SiteRow], clock: Clock
) -> None:
    north, south = sites
    clock.move(1)
    async with store.write() as tx:
        assert await tx.awaited_uploads(collecting.id, 10) == ["north", "south"]
        assert await tx.awaited_uploads(collecting.id, 1) == ["north"]
        part = await tx.part(collecting.id, "north")
        assert part is not None
        await tx.set_uploaded(replace(part, knowledge=THIRD, upload_bytes=2**40, uploaded_at=clock.now))
        assert await tx.awaited_uploads(collecting.id, 10) == ["south"]
        assert await tx.awaits_uploader(collecting)
        assert await tx.awaited_reports(collecting, 10) == ["north"]
        await tx.saw_sites([south.id])
        assert await tx.awaited_reports(collecting, 10) == ["north", "south"]
        await tx.set_report(collecting.id, "north", a_report())
        assert not await tx.awaits_uploader(collecting)
        assert await tx.awaited_reports(collecting, 10) == ["south"]
        await tx.revoke_site(north.federation_id, "south")
        assert await tx.awaited_reports(collecting, 10) == []
    async with store.read() as tx:
        found = await tx.part(collecting.id, "north")
        assert found is not None
        assert (found.knowledge, found.upload_bytes, found.uploaded_at) == (THIRD, 2**40, clock.now)
        assert await tx.part(collecting.id, "west") is None


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
async def test_a_round_that_has_ended_says_when_and_lets_another_begin(
    store: Store, collecting: RoundRow, clock: Clock, state: RoundState
) -> None:
    clock.move(3)
    async with store.write() as tx:
        ended = await tx.move_round(collecting, state, reason="it was so")
        assert (ended.finished_at, ended.deadline, ended.reason) == (clock.now, None, "it was so")
        following = await tx.begin_round(collecting.federation_id, 2, 1, clock.now, [])
    async with store.read() as tx:
        assert await tx.active_round(collecting.federation_id) == following
        assert [row.number for row in await tx.rounds_before(collecting.federation_id, None, 10)] == [2, 1]
        assert [row.number for row in await tx.rounds_before(collecting.federation_id, 2, 10)] == [1]


# ------------------------------------------------------------------------------------------------ jobs


async def claimed(store: Store, federation: FederationRow, clock: Clock) -> JobRow:
    payload = MapJob(
        federation_id=federation.id,
        teacher=DIGEST,
        student=OTHER,
        teacher_artifact=DIGEST,
        student_artifact=OTHER,
        method="mined",
    )
    async with store.write() as tx:
        job = await tx.add_job(payload)
        return await tx.claim_job(job, clock.now + timedelta(seconds=30), "a key")


async def test_a_job_is_renewed_and_finished_by_whoever_holds_it(
    store: Store, federation: FederationRow, clock: Clock
) -> None:
    job = await claimed(store, federation, clock)
    progress = LlmProgress(step="training", done=1, total=2)
    async with store.write() as tx:
        renewed = await tx.renew_job(job, clock.now + timedelta(seconds=60), progress)
        assert (await tx.renew_job(renewed, clock.now + timedelta(seconds=90), None)).progress == progress
        again = await tx.requeue_job(renewed, clock.now, "silent")
        await tx.claim_job(again, clock.now + timedelta(seconds=30), "another key")
    with pytest.raises(StateChanged, match="attempt 1"):
        async with store.write() as tx:
            await tx.finish_job(job, MapResult(artifact=THIRD))
    async with store.write() as tx:
        done = await tx.finish_job(await tx.job(job.id), MapResult(artifact=THIRD))
        assert (done.state, done.result, done.lease_expires_at) == ("done", MapResult(artifact=THIRD), None)
        assert (done.attempt, done.finished_at) == (2, clock.now)


async def test_a_job_that_failed_is_queued_no_more_and_keeps_its_reason(
    store: Store, federation: FederationRow, clock: Clock
) -> None:
    job = await claimed(store, federation, clock)
    async with store.write() as tx:
        assert await tx.queued_jobs() == 0
        queued = await tx.requeue_job(job, clock.now, "it stumbled")
        assert await tx.queued_jobs() == 1
        failed = await tx.fail_job(queued, "out of memory: use a smaller batch")
    assert (failed.state, failed.reason) == ("failed", "out of memory: use a smaller batch")
    async with store.read() as tx:
        assert (await tx.queued_jobs(), await tx.due_jobs(clock.now), await tx.expired_jobs(clock.now)) == (0, [], [])
        assert await tx.jobs([job.id, "job_of_nobody"]) == [failed]


# ------------------------------------------------------------------------------------------------ who, what, which


async def test_credentials_are_kept_by_origin(store: Store) -> None:
    async with store.write() as tx:
        for token, role, origin in ((DIGEST, "worker", "here"), (OTHER, "worker", "here"), (THIRD, "worker", "there")):
            assert await tx.set_credential(token, role, origin)
        assert not await tx.set_credential(DIGEST, "operator", "here")
        assert await tx.drop_credentials("worker", "here", keep=OTHER) == 1
    async with store.read() as tx:
        assert await tx.credential(DIGEST) is None
        kept = [await tx.credential(token) for token in (OTHER, THIRD)]
    assert [each and (each.role, each.origin) for each in kept] == [("worker", "here"), ("worker", "there")]


async def test_an_enrolment_token_is_used_once(store: Store, federation: FederationRow, clock: Clock) -> None:
    async with store.write() as tx:
        await tx.issue_enrolment_token(DIGEST, federation.id, "north", clock.now)
        await tx.use_enrolment_token(DIGEST, "site_1")
    with pytest.raises(StateChanged, match="used meanwhile"):
        async with store.write() as tx:
            await tx.use_enrolment_token(DIGEST, "site_2")


async def test_a_federation_keeps_what_was_handed_in(store: Store, federation: FederationRow) -> None:
    async with store.write() as tx:
        await tx.set_public_set(federation, DIGEST, 12)
        await tx.set_llm(federation, CARD, OTHER)
        await tx.add_federation(config("banks"))
    async with store.read() as tx:
        found = await tx.federation(federation.id)
        assert (found.public_set, found.public_samples, found.llm, found.llm_vocabulary) == (DIGEST, 12, CARD, OTHER)
        assert [each.name for each in await tx.federations_after("", 10)] == ["banks", "hospitals"]
        assert [each.name for each in await tx.federations_after("banks", 10)] == ["hospitals"]


async def test_any_version_can_be_promoted_and_only_one_is(
    store: Store, federation: FederationRow, clock: Clock
) -> None:
    async with store.write() as tx:
        for number in (0, 1, 2):
            row = AdapterRow(
                federation.id, number, number - 1 if number else None, None, DIGEST, clock.now, True, {}, {}
            )
            await tx.add_adapter(row)
        await tx.promote_adapter(await tx.adapter(federation.id, 1))
    async with store.read() as tx:
        assert [row.promoted for row in await tx.adapters_before(federation.id, None, 9)] == [False, True, False]
        assert (await tx.promoted_adapter(federation.id)).version == 1


async def test_the_first_artifact_of_a_vocabulary_stays(store: Store) -> None:
    async with store.write() as tx:
        first = await tx.add_vocabulary(DIGEST, OTHER, 400)
        assert await tx.add_vocabulary(DIGEST, THIRD, 400) == first
    async with store.read() as tx:
        assert (await tx.vocabulary(DIGEST)).artifact == OTHER


async def test_a_map_gets_another_job_until_it_is_built(store: Store) -> None:
    row = MapRow(DIGEST, OTHER, "mined", new_id("job"), None)
    async with store.write() as tx:
        await tx.add_map(row)
        await tx.replace_map_job(row, "job_2")
        await tx.set_map("job_2", THIRD)
    with pytest.raises(StateChanged):
        async with store.write() as tx:
            await tx.set_map(row.job_id, THIRD)
    async with store.read() as tx:
        assert [(each.job_id, each.artifact) for each in await tx.maps([(DIGEST, OTHER)])] == [("job_2", THIRD)]


async def test_a_site_reads_what_was_made_for_it(store: Store, federation: FederationRow, sites: list[SiteRow]) -> None:
    llm = "12" * 32
    mine = {name: digest * 32 for name, digest in (("public", "a1"), ("words", "a2"), ("map", "a3"))}
    others_map, nobodys = "b1" * 32, "b2" * 32
    async with store.write() as tx:
        await tx.set_public_set(federation, mine["public"], 1)
        await tx.set_llm(federation, CARD, llm)
        await tx.add_vocabulary(llm, mine["words"], 400)
        for teacher, student, artifact in ((llm, OTHER, mine["map"]), (llm, THIRD, others_map)):
            row = MapRow(teacher, student, "mined", new_id("job"), None)
            await tx.add_map(row)
            await tx.set_map(row.job_id, artifact)
    async with store.read() as tx:
        known = await tx.federation(federation.id)
        assert all([await tx.site_may_read(sites[0], known, digest) for digest in mine.values()])
        assert not any([await tx.site_may_read(sites[0], known, digest) for digest in (others_map, nobodys)])
