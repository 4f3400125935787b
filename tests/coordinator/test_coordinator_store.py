"""The contract of the store, over SQLite and a real PostgreSQL."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, func, select

from coordinator_world import CARD, Clock, a_report, config
from fedmkt.protocol import MapJob
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store import Outbox, StateChanged, Store, open_engine
from fedmkt_coordinator.store.migrate import migrate
from fedmkt_coordinator.store.records import AdapterRow, FederationRow, MapRow
from fedmkt_coordinator.store.tables import metadata

pytestmark = pytest.mark.anyio

DIGEST = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
async def federation(store: Store) -> FederationRow:
    async with store.write() as tx:
        made, new = await tx.add_federation(config())
    assert new
    return made


def map_job(federation: FederationRow) -> MapJob:
    return MapJob(
        federation_id=federation.id,
        teacher=DIGEST,
        student=OTHER,
        teacher_artifact=DIGEST,
        student_artifact=OTHER,
        method="mined",
    )


def differences(connection: Connection) -> list[Any]:
    # Server defaults and the like are compared; JSON and time types are TypeDecorators, so types are compared by name.
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


async def test_migrations_make_exactly_the_tables_that_the_code_uses(store: Store) -> None:
    async with store.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrating_again_and_at_the_same_time_changes_nothing(store: Store, federation: FederationRow) -> None:
    await asyncio.gather(migrate(store.engine), migrate(store.engine))
    async with store.read() as tx:
        assert await tx.federation(federation.id) == federation


async def test_rows_come_back_as_they_were_written(store: Store, federation: FederationRow, clock: Clock) -> None:
    async with store.write() as tx:
        site = await tx.add_site(federation.id, "north", DIGEST)
        await tx.set_site_model(site, CARD, 2**40)
        await tx.saw_sites({site.id})
    async with store.read() as tx:
        found = await tx.site(site.id)
    assert found.enrolled_at == found.last_seen_at == clock.now
    assert found.enrolled_at.tzinfo is UTC
    assert (found.model, found.private_samples, federation.config) == (CARD, 2**40, config())


async def test_microseconds_and_other_time_zones_survive(store: Store, federation: FederationRow) -> None:
    there = datetime.fromisoformat("2031-05-04T12:00:00.123456+09:00")
    async with store.write() as tx:
        await tx.issue_enrolment_token(DIGEST, federation.id, "north", there)
    async with store.read() as tx:
        token = await tx.enrolment_token(DIGEST)
    assert token is not None
    assert token.expires_at == datetime(2031, 5, 4, 3, 0, 0, 123456, tzinfo=UTC)


async def test_what_fails_leaves_nothing_and_tells_nobody(store: Store, federation: FederationRow) -> None:
    told: list[Outbox] = []
    store.after_commit = told.append

    async def fail_half_way() -> None:
        async with store.write() as tx:
            await tx.append(federation.id, "half.done")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_half_way()
    async with store.read() as tx:
        assert await tx.events_after(federation.id, 0, 10) == []
    assert told == []
    async with store.write() as tx:
        await tx.append(federation.id, "done")
    assert [outbox.federations for outbox in told] == [{federation.id}]


async def test_reading_a_transaction_tells_nobody(store: Store) -> None:
    told: list[Outbox] = []
    store.after_commit = told.append
    async with store.write() as tx:
        await tx.forget_expired()
    assert told == []


async def test_events_are_numbered_by_commit_without_gaps(store: Store, federation: FederationRow) -> None:
    seen: list[int] = []

    async def write(number: int) -> None:
        async with store.write() as tx:
            await tx.append(federation.id, "counted", number=number)
            await asyncio.sleep(0.002 * (number % 3))  # commits in another order than they began

    async def watch() -> None:
        while len(seen) < 20:
            async with store.read() as tx:
                seen.extend(row.sequence for row in await tx.events_after(federation.id, len(seen), 100))
            await asyncio.sleep(0.001)

    await asyncio.gather(watch(), *(write(number) for number in range(20)))
    assert seen == list(range(1, 21))


async def test_a_federation_of_the_same_name_is_the_same(store: Store, federation: FederationRow) -> None:
    async with store.write() as tx:
        again, new = await tx.add_federation(config(seed=7))
    assert (again, new) == (federation, False)


async def test_only_one_round_of_a_federation_is_active(store: Store, federation: FederationRow, clock: Clock) -> None:
    async def begin(number: int) -> bool:
        async with store.write() as tx:
            await tx.federation(federation.id, lock=True)
            if await tx.active_round(federation.id) is not None:
                return False
            await tx.begin_round(federation.id, number, 0, clock.now, [])
            return True

    assert sorted(await asyncio.gather(*(begin(number) for number in range(1, 6)))) == [False] * 4 + [True]
    async with store.read() as tx:
        assert await tx.rounds_begun(federation.id) == 1


async def test_a_round_moves_from_the_state_it_was_read_in_only(
    store: Store, federation: FederationRow, clock: Clock
) -> None:
    async with store.write() as tx:
        stale = await tx.begin_round(federation.id, 1, 0, clock.now + timedelta(seconds=5), [])
    clock.move(2.5)
    async with store.write() as tx:
        moved = await tx.move_round(stale, "distilling")
    assert (moved.state, moved.seconds, moved.deadline) == ("distilling", {"collecting": 2.5}, None)
    with pytest.raises(StateChanged, match="no longer collecting"):
        async with store.write() as tx:
            await tx.move_round(stale, "failed", reason="too late")
    async with store.read() as tx:
        events = await tx.events_after(federation.id, 0, 10)
    assert [each.data["state"] for each in events] == ["collecting", "distilling"]


async def test_a_job_is_claimed_by_one_of_many(store: Store, federation: FederationRow, clock: Clock) -> None:
    async with store.write() as tx:
        job = await tx.add_job(map_job(federation))

    async def claim(worker: int) -> bool:
        try:
            async with store.write() as tx:
                await tx.claim_job(job, clock.now + timedelta(seconds=30), f"worker {worker}")
        except StateChanged:
            return False
        return True

    assert sorted(await asyncio.gather(*(claim(worker) for worker in range(5)))) == [False] * 4 + [True]
    async with store.read() as tx:
        found = await tx.job(job.id)
    assert (found.state, found.attempt, found.payload) == ("running", 1, map_job(federation))


async def test_jobs_are_due_in_their_order_and_at_their_time(
    store: Store, federation: FederationRow, clock: Clock
) -> None:
    async with store.write() as tx:
        first = await tx.add_job(map_job(federation))
    clock.move(1)
    async with store.write() as tx:
        second = await tx.add_job(map_job(federation))
        claimed = await tx.claim_job(first, clock.now + timedelta(seconds=30), None)
        await tx.requeue_job(claimed, clock.now + timedelta(seconds=10), "it stumbled")
    async with store.read() as tx:
        assert await tx.due_jobs(clock.now) == [(second.id, 0)]
        assert await tx.due_jobs(clock.now + timedelta(seconds=10)) == [(first.id, 1), (second.id, 0)]


async def test_leases_expire_after_their_time(store: Store, federation: FederationRow, clock: Clock) -> None:
    async with store.write() as tx:
        job = await tx.claim_job(await tx.add_job(map_job(federation)), clock.now + timedelta(seconds=30), None)
    async with store.read() as tx:
        assert await tx.expired_jobs(clock.now + timedelta(seconds=30)) == []
        assert await tx.expired_jobs(clock.now + timedelta(seconds=30, microseconds=1)) == [job]


async def test_secrets_assertions_and_keys_are_taken_once(store: Store, clock: Clock) -> None:
    async def propose(value: str) -> str:
        async with store.write() as tx:
            return await tx.shared_secret("signing_key", value)

    assert len(set(await asyncio.gather(*(propose(value) for value in "abcd")))) == 1

    async def use(jti: str) -> bool:
        async with store.write() as tx:
            return await tx.use_assertion("site_1", jti, clock.now)

    assert sorted(await asyncio.gather(*(use("one") for _ in range(4)))) == [False] * 3 + [True]
    async with store.write() as tx:
        assert await tx.idempotent("rounds", "key", "1") is None
        assert await tx.idempotent("rounds", "key", "2") == "1"
        assert await tx.idempotent("others", "key", "2") is None


async def test_expired_assertions_are_forgotten_and_others_kept(store: Store, clock: Clock) -> None:
    async with store.write() as tx:
        await tx.use_assertion("site_1", "old", clock.now - timedelta(seconds=1))
        await tx.use_assertion("site_1", "new", clock.now + timedelta(seconds=1))
        await tx.forget_expired()
        assert await tx.use_assertion("site_1", "old", clock.now)
        assert not await tx.use_assertion("site_1", "new", clock.now)


async def test_a_name_is_enrolled_once_until_it_is_revoked(store: Store, federation: FederationRow) -> None:
    async with store.write() as tx:
        first = await tx.add_site(federation.id, "north", DIGEST)
        assert await tx.revoke_site(federation.id, "north")
        assert not await tx.revoke_site(federation.id, "north")
        second = await tx.add_site(federation.id, "north", OTHER)
        assert await tx.active_site(federation.id, "north") == second
    with pytest.raises(Exception, match=r"(?i)unique"):
        async with store.write() as tx:
            await tx.add_site(federation.id, "north", DIGEST)
    async with store.read() as tx:
        assert {row.id for row in await tx.sites(federation.id)} == {first.id, second.id}


async def test_a_report_is_written_once(store: Store, federation: FederationRow, clock: Clock) -> None:
    async with store.write() as tx:
        row = await tx.begin_round(federation.id, 1, 0, clock.now, [])
        await tx.join_round(row.id, "north")
        await tx.join_round(row.id, "north")
        await tx.set_report(row.id, "north", a_report())
    with pytest.raises(StateChanged):
        async with store.write() as tx:
            await tx.set_report(row.id, "north", a_report(bytes_up=5))
    async with store.read() as tx:
        (part,) = await tx.parts([row.id])
    assert (part.report, part.expected) == (a_report(), False)


async def test_a_map_is_asked_for_once_by_whichever_federation_comes_first(store: Store) -> None:
    row = MapRow(DIGEST, OTHER, "mined", new_id("job"), None)
    async with store.write() as tx:
        assert await tx.add_map(row)
        assert not await tx.add_map(MapRow(DIGEST, OTHER, "mined", new_id("job"), None))
        assert await tx.add_map(MapRow(DIGEST, OTHER, "retokenized", new_id("job"), None))
        await tx.set_map(row.job_id, OTHER)
    async with store.read() as tx:
        maps = await tx.maps([(DIGEST, OTHER), (OTHER, DIGEST)])
        assert [(each.method, each.artifact) for each in maps] == [("mined", OTHER), ("retokenized", None)]
        assert await tx.maps([]) == []


async def test_one_adapter_is_promoted_and_versions_stay(store: Store, federation: FederationRow, clock: Clock) -> None:
    def version(number: int, promoted: bool) -> AdapterRow:
        return AdapterRow(federation.id, number, None, None, DIGEST, clock.now, promoted, {}, {"north": DIGEST})

    async with store.write() as tx:
        for number, promoted in ((0, True), (1, True), (2, False), (0, True)):
            await tx.add_adapter(version(number, promoted))
        assert (await tx.promoted_adapter(federation.id)).version == 1
        assert await tx.last_adapter_version(federation.id) == 2
    async with store.read() as tx:
        assert [row.version for row in await tx.adapters_before(federation.id, None, 2)] == [2, 1]
        assert [row.version for row in await tx.adapters_before(federation.id, 1, 2)] == [0]


async def test_time_is_due_where_a_deadline_passed_or_a_round_may_begin(
    store: Store, federation: FederationRow, clock: Clock
) -> None:
    async with store.write() as tx:
        assert await tx.federations_due(clock.now) == []
        await tx.set_rounds_requested(federation, 1)
        assert await tx.federations_due(clock.now) == [federation.id]
        row = await tx.begin_round(federation.id, 1, 0, clock.now + timedelta(seconds=9), [])
        assert await tx.federations_due(clock.now + timedelta(seconds=8)) == []
        assert await tx.federations_due(clock.now + timedelta(seconds=9)) == [federation.id]
        await tx.move_round(row, "failed", reason="no reason")
        assert await tx.federations_due(clock.now + timedelta(seconds=9)) == []


async def test_requests_for_rounds_do_not_get_lost(store: Store, federation: FederationRow) -> None:
    async def request() -> None:
        async with store.write() as tx:
            now = await tx.federation(federation.id, lock=True)
            await tx.set_rounds_requested(now, now.rounds_requested + 1)

    await asyncio.gather(*(request() for _ in range(10)))
    async with store.read() as tx:
        assert (await tx.federation(federation.id)).rounds_requested == 10


def test_what_operators_paste_is_understood(tmp_path: Any) -> None:
    engine = open_engine("postgres://fedmkt:secret@db/fedmkt?sslmode=require", tmp_path)
    assert engine.url.drivername == "postgresql+asyncpg"
    assert dict(engine.url.query) == {"ssl": "require"}
    assert "secret" not in str(engine.url)


@pytest.mark.services
async def test_of_two_transactions_that_wait_for_each_other_one_is_to_come_again(
    postgres_url: str, state_dir: Path, clock: Clock
) -> None:
    """As two replicas may: PostgreSQL gives one up, and that is no mistake of ours but a reason to ask again."""
    engine = open_engine(postgres_url, state_dir)
    store, both_hold_one = Store(engine, clock), asyncio.Barrier(2)

    async def hold(first: int, second: int) -> str:
        async with store.write() as tx:
            await tx._connection.execute(select(func.pg_advisory_xact_lock(first)))
            await both_hold_one.wait()
            await tx._connection.execute(select(func.pg_advisory_xact_lock(second)))
        return "committed"

    ended = await asyncio.gather(hold(1, 2), hold(2, 1), return_exceptions=True)
    await engine.dispose()
    assert sorted(type(each).__name__ for each in ended) == ["DependencyDown", "str"]
