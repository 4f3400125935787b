"""The audit log: every act is in it, writers of all replicas make one chain, and no tampering goes unseen."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from coordinator_servers import Worlds, settings_for
from coordinator_world import TOKENS, Clock, World, config, served
from fedmkt.audit_chain import AuditBroken, AuditUnreadable, HeadUntrusted, check_chain, check_head
from fedmkt.cli import app as command
from fedmkt.protocol import FIRST_DIGEST, AuditEntry, AuditHead, AuditPage, EnrolmentTokenRequest, audit_digest
from fedmkt.signing import new_key, public_hex, sign_head
from fedmkt_coordinator.audit import Refusals
from fedmkt_coordinator.ids import secret_hash
from fedmkt_coordinator.store import Store, open_engine
from fedmkt_coordinator.store.audit import Actor, acting
from real_servers import RedisProcess

pytestmark = pytest.mark.anyio
services = pytest.mark.services

AT = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)


# ------------------------------------------------------------------------------------------------ the chain itself


def an_entry(**changes: Any) -> AuditEntry:
    values: dict[str, Any] = {
        "sequence": 1,
        "at": AT,
        "federation_id": None,
        "role": "operator",
        "actor": "ab12",
        "action": "site.revoked",
        "target": "north",
        "data": {"b": 2.5, "a": "ä", "c": None, "d": True},
        "previous": FIRST_DIGEST,
        "digest": FIRST_DIGEST,
    }
    return AuditEntry(**{**values, **changes})


def test_a_row_is_hashed_as_sorted_json_without_spaces() -> None:
    expected = (
        '{"action":"site.revoked","actor":"ab12","at":"2031-05-04T03:02:01.000000+00:00",'
        '"data":{"a":"\\u00e4","b":2.5,"c":null,"d":true},"federation_id":null,"previous":"' + "0" * 64 + '",'
        '"role":"operator","sequence":1,"target":"north"}'
    )
    assert an_entry().chained_bytes().decode() == expected
    assert audit_digest(an_entry()) == hashlib.sha256(expected.encode()).hexdigest()


def test_a_row_has_the_same_digest_after_a_trip_over_the_wire() -> None:
    row = an_entry(data={"x": 0.1, "y": 1.0, "z": 10**15, "e": 1e22, "text": 'a "quoted" line\n\u2028 and 😀'})
    assert audit_digest(AuditEntry.model_validate_json(row.model_dump_json())) == audit_digest(row)


def chain(count: int) -> list[AuditEntry]:
    rows: list[AuditEntry] = []
    for sequence in range(1, count + 1):
        row = an_entry(sequence=sequence, previous=rows[-1].digest if rows else FIRST_DIGEST, target=f"site{sequence}")
        rows.append(row.model_copy(update={"digest": audit_digest(row)}))
    return rows


def test_a_whole_chain_ends_with_its_last_row_and_an_empty_one_with_zeros() -> None:
    rows = chain(4)
    assert check_chain(rows) == (4, rows[-1].digest)
    assert check_chain([]) == (0, FIRST_DIGEST)


def test_heads_are_signed_by_a_key_that_the_coordinator_names() -> None:
    key = new_key()
    head = sign_head(key, 4, "ab" * 32, AT)
    check_head(head, ["0" * 64, public_hex(key)])
    with pytest.raises(HeadUntrusted, match="was its signing key changed"):
        check_head(head, ["0" * 64])
    with pytest.raises(HeadUntrusted, match="the head of row 5"):
        check_head(head.model_copy(update={"sequence": 5}), [public_hex(key)])


# ------------------------------------------------------------------------------------------------ tampering


async def rows_of(store: Store) -> list[AuditEntry]:
    async with store.read() as tx:
        return await tx.audit_entries(0, None, 10_000)


async def head_of(store: Store) -> AuditHead:
    async with store.read() as tx:
        return sign_head(new_key(), *await tx.audit_end(), at=AT)


async def filled(store: Store, count: int = 8) -> None:
    for number in range(count):
        async with store.write() as tx:
            tx.audit("test.act", f"thing {number}", {"number": number})


async def execute(store: Store, *statements: str) -> None:
    """As somebody with the database's password would."""
    async with store.engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))
        await connection.commit()


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        (["UPDATE audit_log SET actor = 'somebody else' WHERE sequence = 5"], "row 5 .* was changed"),
        (["UPDATE audit_log SET data = '{\"number\": 99}' WHERE sequence = 3"], "row 3 .* was changed"),
        (["UPDATE audit_log SET at = '2020-01-01 00:00:00' WHERE sequence = 1"], "row 1 .* was changed"),
        (["DELETE FROM audit_log WHERE sequence = 4"], "row 4 is missing or displaced"),
        (["DELETE FROM audit_log WHERE sequence = 1"], "row 1 is missing or displaced"),
        (["DELETE FROM audit_log WHERE sequence >= 7"], "the log ends with row 6, the head .* knows 8 rows: row 7"),
        (["DELETE FROM audit_log"], "the log ends with row 0, the head .* knows 8 rows: row 1"),
        (
            [  # two rows change places
                "UPDATE audit_log SET sequence = 100 WHERE sequence = 2",
                "UPDATE audit_log SET sequence = 2 WHERE sequence = 3",
                "UPDATE audit_log SET sequence = 3 WHERE sequence = 100",
            ],
            "row 2 .* was changed",
        ),
        (
            [  # a row is put in, and those behind it move up
                *(f"UPDATE audit_log SET sequence = {n + 1} WHERE sequence = {n}" for n in (8, 7, 6, 5)),
                "INSERT INTO audit_log SELECT 5, at, federation_id, role, actor, action, target, data, previous, "
                "digest FROM audit_log WHERE sequence = 4",
            ],
            "row 5 .* was changed",
        ),
        (
            ["INSERT INTO audit_log SELECT 9, at, federation_id, role, actor, action, target, data, digest, "
             "previous FROM audit_log WHERE sequence = 8"],
            "row 9 .* was changed",
        ),
    ],
)  # fmt: skip
async def test_tampering_with_the_database_is_found_and_the_row_named(
    store: Store, statements: list[str], says: str
) -> None:
    await filled(store)
    head = await head_of(store)
    assert check_chain(await rows_of(store), [head]) == (8, head.digest)
    await execute(store, *statements)
    with pytest.raises(AuditBroken, match=says):
        check_chain(await rows_of(store), [head])


async def test_a_row_whose_digest_was_made_to_fit_breaks_the_next_one(store: Store) -> None:
    await filled(store)
    row = (await rows_of(store))[2]
    forged = row.model_copy(update={"target": "another thing"})
    await execute(
        store,
        f"UPDATE audit_log SET target = 'another thing', digest = '{audit_digest(forged)}' WHERE sequence = 3",
    )
    with pytest.raises(AuditBroken, match="row 4 follows a row with digest"):
        check_chain(await rows_of(store))


async def test_a_tail_cut_off_with_its_head_shows_only_against_a_kept_head(store: Store) -> None:
    await filled(store)
    kept = await head_of(store)
    last = (await rows_of(store))[4]
    await execute(
        store,
        "DELETE FROM audit_log WHERE sequence > 5",
        f"UPDATE audit_head SET sequence = 5, digest = '{last.digest}'",
    )
    await filled(store, 2)
    present = await head_of(store)
    assert check_chain(await rows_of(store), [present]) == (7, present.digest)
    with pytest.raises(AuditBroken, match=r"the log ends with row 7, the head .* knows 8 rows: row 8"):
        check_chain(await rows_of(store), [present, kept])
    await filled(store, 3)
    with pytest.raises(AuditBroken, match=r"row 8 has digest .* was written anew"):
        check_chain(await rows_of(store), [kept])


# ------------------------------------------------------------------------------------------------ writing


async def test_writers_of_several_replicas_make_one_chain(
    store: Store, database_url: str | None, state_dir: Path, clock: Clock
) -> None:
    others = [Store(open_engine(database_url, state_dir), clock) for _ in range(2)]

    async def act(writer: Store, number: int) -> None:
        async with writer.write() as tx:
            tx.audit("test.act", f"{number}.a", {})
            await asyncio.sleep(0)  # others come in between
            tx.audit("test.act", f"{number}.b", {})

    await asyncio.gather(*(act((store, *others)[number % 3], number) for number in range(30)))
    rows = await rows_of(store)
    assert check_chain(rows, [await head_of(store)])[0] == 60
    pairs = [tuple(row.target for row in rows[start : start + 2]) for start in range(0, 60, 2)]
    assert sorted(pairs) == sorted((f"{number}.a", f"{number}.b") for number in range(30))
    for each in others:
        await each.close()


async def test_what_is_not_committed_is_not_in_the_log(store: Store) -> None:
    await filled(store, 1)

    async def undone() -> None:
        async with store.write() as tx:
            tx.audit("test.act", "undone", {})
            raise RuntimeError("on second thoughts")

    with pytest.raises(RuntimeError, match="on second thoughts"):
        await undone()
    await filled(store, 1)
    assert [row.target for row in await rows_of(store)] == ["thing 0", "thing 0"]


async def test_rows_say_who_acts(store: Store) -> None:
    before = acting.set(Actor("operator", "0123456789abcdef"))
    await filled(store, 1)
    acting.reset(before)
    await filled(store, 1)
    assert [(row.role, row.actor) for row in await rows_of(store)] == [
        ("operator", "0123456789abcdef"),
        ("system", "coordinator"),
    ]


async def test_a_million_refused_attempts_are_one_row_a_minute(store: Store) -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    for number in range(1000):
        refusals.note("token.invalid", Actor("anyone", "10.0.0.7"), f"/v1/{number}")
    refusals.note("round.closed", Actor("site", "site_1"), "/v1/uploads")
    await refusals.write(store)
    refusals.note("token.invalid", Actor("anyone", "10.0.0.8"), "/v1/me")
    await refusals.write(store)
    assert [(row.target, row.actor, row.data["attempts"]) for row in await rows_of(store)] == [
        ("token.invalid", "10.0.0.7", 1000)
    ]
    now = 61.0
    await refusals.write(store)
    assert [row.data for row in await rows_of(store)] == [
        {"attempts": 1000, "latest_path": "/v1/999"},
        {"attempts": 1, "latest_path": "/v1/me"},
    ]


async def test_refused_attempts_are_counted_on_while_the_database_is_away(store: Store) -> None:
    def away() -> datetime:
        raise ConnectionError("the database is away")

    refusals = Refusals(lambda: 0.0)
    refusals.note("token.invalid", Actor("anyone", "10.0.0.7"), "/v1/me")
    with pytest.raises(ConnectionError):
        await refusals.write(Store(store.engine, away))
    refusals.note("token.invalid", Actor("anyone", "10.0.0.7"), "/v1/me")
    await refusals.write(store)
    assert [row.data["attempts"] for row in await rows_of(store)] == [2]


# ------------------------------------------------------------------------------------------------ over HTTP


async def log_of(world: World, query: str = "") -> list[AuditEntry]:
    return list((await world.ask(AuditPage, "GET", f"/v1/audit?limit=1000{query}")).items)


@services
async def test_every_act_of_a_round_is_in_the_log_with_who_did_it(ready: World) -> None:
    world = ready
    await world.request_rounds()
    await world.play_round()
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    rows = await log_of(world)
    check_chain(rows)
    acts = [(row.action, row.role, row.data.get("site")) for row in rows]
    for expected in (
        ("federation.created", "operator", None),
        ("public_set.stored", "operator", None),
        ("llm.registered", "worker", None),
        ("site.invited", "operator", "north"),
        ("site.enrolled", "anyone", "north"),
        ("site.vocabulary", "site", "north"),
        ("rounds.requested", "operator", None),
        ("knowledge.accepted", "site", "south"),
        ("job.state", "worker", None),
        ("adapter.promoted", "worker", None),
        ("site.applied", "site", "south"),
        ("site.revoked", "operator", "north"),
    ):
        assert acts.count(expected) >= 1, expected
    assert [row.target for row in rows[:3]] == [
        "operator",
        "viewer",
        "worker",
    ]
    operator = secret_hash(TOKENS["operator"])[:16]
    assert {row.actor for row in rows if row.role == "operator"} == {operator}
    assert {row.actor for row in rows if row.action == "knowledge.accepted"} == {
        site.site_id for site in world.sites.values()
    }
    assert "llm.progress" not in {row.action for row in rows}


@services
async def test_the_log_comes_in_pages_and_by_federation(world: World) -> None:
    await world.create()
    first = world.federation_id
    await world.create(config("banks"))
    paged: list[AuditEntry] = []
    cursor = ""
    while True:
        page = await world.ask(AuditPage, "GET", f"/v1/audit?limit=2{cursor}")
        paged += page.items
        if page.next_cursor is None:
            break
        cursor = f"&cursor={page.next_cursor}"
    assert paged == await log_of(world)
    assert [row.action for row in await log_of(world, f"&federation_id={first}")] == ["federation.created"]
    answer = await world.send("GET", "/v1/audit")
    again = await world.send("GET", "/v1/audit", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


@services
async def test_refused_attempts_are_told_by_the_keeper(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    for _ in range(3):
        await world.refused("token.invalid", "GET", "/v1/me", "0" * 64)
    await world.refused("role.forbidden", "GET", "/v1/federations", site)
    await world.tick()
    refused = [row for row in await log_of(world) if row.action == "access.refused"]
    assert [(row.target, row.role, row.actor, row.data) for row in refused] == [
        ("role.forbidden", "site", site.site_id, {"attempts": 1, "latest_path": "/v1/federations"}),
        ("token.invalid", "anyone", "127.0.0.1", {"attempts": 3, "latest_path": "/v1/me"}),
    ]


@services
async def test_a_token_that_is_replaced_leaves_a_row(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    await worlds.open(settings_for(state_dir, redis_server.url))
    world = await worlds.open(settings_for(state_dir, redis_server.url, viewer_token="v" * 64))
    changed = [row for row in await log_of(world) if row.action == "credentials.changed"]
    assert [(row.target, row.role, row.data["added"], row.data["dropped"]) for row in changed] == [
        ("operator", "system", 1, 0),
        ("viewer", "system", 1, 0),
        ("worker", "system", 1, 0),
        ("viewer", "system", 1, 1),
    ]


@services
async def test_the_log_holds_no_secret(ready: World) -> None:
    world = ready
    issued = await world.send(
        "POST",
        f"/v1/federations/{world.federation_id}/enrolment-tokens",
        "operator",
        EnrolmentTokenRequest(site="north"),
    )
    assert issued.status_code == 409
    content = "".join(row.model_dump_json() for row in await log_of(world))
    for secret in (*TOKENS.values(), *(site.token for site in world.sites.values()), "secret-of-tests"):
        assert secret not in content


# ------------------------------------------------------------------------------------------------ by the command


@pytest.fixture
def run() -> Callable[..., Awaitable[str]]:
    """`fedmkt audit ...`; returns what it prints, raises what it raises."""

    async def invoke(*arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, command, ["audit", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return invoke


@services
async def test_the_command_verifies_exports_and_keeps_heads(
    collecting: World, run: Callable[..., Awaitable[str]], tmp_path: Path
) -> None:
    world, store = collecting, collecting.context.store
    kept, log = tmp_path / "head.json", tmp_path / "log.jsonl"
    async with served(world) as url:
        known = ["--coordinator", url, "--token", TOKENS["operator"]]
        rows = len(await rows_of(store))
        assert f"{rows} rows, each follows the one before" in await run("verify", "--save-head", str(kept), *known)
        await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
        held = await run("verify", "--head", str(kept), *known)
        assert f"the kept head of row {rows} is in it" in held
        assert f"{len(await rows_of(store))} rows" in await run("export", str(log), *known)
        assert "each follows the one before" in await run("verify", str(log), "--head", str(kept))
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join([*lines[:4], *lines[5:]]))
        with pytest.raises(AuditBroken, match="row 5 is missing"):
            await run("verify", str(log))
        log.write_text("".join(lines[: rows - 1]))
        await run("verify", str(log))
        with pytest.raises(AuditBroken, match="was cut off"):
            await run("verify", str(log), "--head", str(kept))
        log.write_text("".join([*lines[:4], "{}\n"]))
        with pytest.raises(AuditUnreadable, match="line 5"):
            await run("verify", str(log))
        await execute(store, "UPDATE audit_log SET actor = 'nobody' WHERE sequence = 2")
        with pytest.raises(AuditBroken, match=r"row 2 .* was changed"):
            await run("verify", *known)
        foreign = sign_head(new_key(), 1, FIRST_DIGEST, AT)
        kept.write_text(foreign.model_dump_json())
        with pytest.raises(HeadUntrusted, match="was its signing key changed"):
            await run("verify", "--head", str(kept), *known)


@services
async def test_only_operators_read_the_log(world: World) -> None:
    for who in ("viewer", "worker"):
        await world.refused("role.forbidden", "GET", "/v1/audit", who)
    answer: httpx.Response = await world.send("GET", "/v1/audit/head", "operator")
    head = AuditHead.model_validate_json(answer.content)
    check_head(head, (await world.send("GET", "/v1/keys", None)).json()["public_keys"])
