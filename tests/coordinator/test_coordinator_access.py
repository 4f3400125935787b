"""Who gets in: enrolment, assertions, access tokens, revocation."""

import secrets
from datetime import timedelta
from typing import Any

import jwt
import pytest

from coordinator_world import World, a_report, config
from fedmkt.protocol import Enrolled, Enrolment, EnrolmentToken, EnrolmentTokenRequest, TokenRequest
from fedmkt.signing import new_key, public_hex, site_assertion

pytestmark = [pytest.mark.anyio]
services = pytest.mark.services


# ------------------------------------------------------------------------------------------------ enrolment


async def issue(world: World, site: str = "north") -> EnrolmentToken:
    path = f"/v1/federations/{world.federation_id}/enrolment-tokens"
    return await world.ask(EnrolmentToken, "POST", path, "operator", EnrolmentTokenRequest(site=site))


def enrolment(token: str, key: Any = None, **changes: Any) -> Enrolment:
    return Enrolment(token=token, public_key=public_hex(key or new_key()), **changes)


@services
async def test_an_enrolment_token_works_once_and_again_only_for_the_same_key(world: World) -> None:
    await world.create()
    token = (await issue(world)).token
    key = new_key()
    first = await world.ask(Enrolled, "POST", "/v1/enrol", None, enrolment(token, key))
    assert (first.site, first.federation_id) == ("north", world.federation_id)
    assert await world.ask(Enrolled, "POST", "/v1/enrol", None, enrolment(token, key)) == first
    detail = await world.refused("enrolment.refused", "POST", "/v1/enrol", None, enrolment(token))
    assert "was used with another key" in detail
    assert (await world.event_kinds()).count("site.enrolled") == 1


@services
async def test_tokens_expire_are_replaced_and_belong_to_named_sites(world: World) -> None:
    await world.create()
    old, new = (await issue(world)).token, (await issue(world)).token
    await world.refused("enrolment.refused", "POST", "/v1/enrol", None, enrolment(old))
    await world.refused("enrolment.refused", "POST", "/v1/enrol", None, enrolment("made up"))
    world.clock.move(7 * 86400)
    detail = await world.refused("enrolment.refused", "POST", "/v1/enrol", None, enrolment(new))
    assert "expired at 2031-05-11" in detail
    path = f"/v1/federations/{world.federation_id}/enrolment-tokens"
    detail = await world.refused("site.not_named", "POST", path, "operator", EnrolmentTokenRequest(site="west"))
    assert "names 2 sites and 'west' is none of them: north, south" in detail


@services
async def test_an_enrolled_site_gets_a_new_token_only_after_it_was_revoked(world: World) -> None:
    await world.create()
    await world.enrol("north")
    path = f"/v1/federations/{world.federation_id}"
    wanted = EnrolmentTokenRequest(site="north")
    await world.refused("site.already_enrolled", "POST", f"{path}/enrolment-tokens", "operator", wanted)
    assert (await world.send("POST", f"{path}/sites/north/revoke")).status_code == 204
    assert (await world.send("POST", f"{path}/sites/north/revoke")).status_code == 204
    await world.enrol("north")
    assert [each.state for each in (await world.view()).sites] == ["enrolled", "awaited"]


@services
async def test_a_site_of_another_protocol_learns_both_versions_and_the_remedy(world: World) -> None:
    wanted = enrolment("any", protocol_version=2)
    detail = await world.refused("protocol.mismatch", "POST", "/v1/enrol", None, wanted)
    assert detail == "the coordinator speaks protocol 1, the client 2; update the coordinator"


# ------------------------------------------------------------------------------------------------ assertions, tokens


def claims(world: World, site_id: str, **changes: Any) -> dict[str, Any]:
    now = world.clock.now
    made = {"iss": site_id, "sub": site_id, "aud": "fedmkt", "jti": secrets.token_hex(8)}
    return {**made, "iat": now, "exp": now + timedelta(seconds=60), **changes}


@services
async def test_an_assertion_works_once(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    body = TokenRequest(assertion=site_assertion(site.key, site.site_id, world.clock()))
    assert (await world.send("POST", "/v1/token", None, body)).status_code == 200
    await world.refused("assertion.used", "POST", "/v1/token", None, body)


@services
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"aud": "somebody else"}, "assertion.refused"),
        ({"sub": "site_00000000000000000000"}, "assertion.refused"),
        ({"iss": "site_00000000000000000000"}, "assertion.refused"),
        ({"jti": ""}, "assertion.refused"),
        ({"jti": None}, "assertion.refused"),
        ({"exp": 10**18}, "assertion.refused"),
        ({"iat": "yesterday"}, "assertion.refused"),
    ],
)
async def test_assertions_that_do_not_hold_are_refused(world: World, changes: dict[str, Any], code: str) -> None:
    await world.create()
    site = await world.enrol("north")
    made = {name: value for name, value in claims(world, site.site_id, **changes).items() if value is not None}
    assertion = jwt.encode(made, site.key, algorithm="EdDSA")
    await world.refused(code, "POST", "/v1/token", None, TokenRequest(assertion=assertion))


@services
async def test_an_assertion_of_another_key_or_of_none_is_refused(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    forged = jwt.encode(claims(world, site.site_id), new_key(), algorithm="EdDSA")
    unsigned = jwt.encode(claims(world, site.site_id), "", algorithm="none")
    shared = jwt.encode(claims(world, site.site_id), public_hex(site.key), algorithm="HS256")
    for assertion in (forged, unsigned, shared, "no.jwt.atall", "nonsense"):
        await world.refused("assertion.refused", "POST", "/v1/token", None, TokenRequest(assertion=assertion))


@services
@pytest.mark.parametrize(("off_s", "words"), [(61, "61 s ahead of"), (-121, "121 s behind"), (86400, "86400 s ahead")])
async def test_a_wrong_clock_is_told_by_how_much(world: World, off_s: int, words: str) -> None:
    await world.create()
    site = await world.enrol("north")
    now = world.clock.now + timedelta(seconds=off_s)
    assertion = jwt.encode(
        claims(world, site.site_id, iat=now, exp=now + timedelta(seconds=60)), site.key, algorithm="EdDSA"
    )
    detail = await world.refused("assertion.clock", "POST", "/v1/token", None, TokenRequest(assertion=assertion))
    assert f"the assertion was made {words}" in detail
    assert "at most 60 s are tolerated" in detail


@services
@pytest.mark.parametrize("off_s", [59, -119])
async def test_a_slightly_wrong_clock_is_tolerated(world: World, off_s: int) -> None:
    await world.create()
    site = await world.enrol("north")
    assertion = site_assertion(site.key, site.site_id, world.clock.now + timedelta(seconds=off_s))
    assert (await world.send("POST", "/v1/token", None, TokenRequest(assertion=assertion))).status_code == 200


@services
async def test_access_tokens_expire_and_foreign_ones_are_refused(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    world.clock.move(599)
    assert (await world.send("GET", "/v1/me", site)).status_code == 200
    world.clock.move(1)
    detail = await world.refused("token.expired", "GET", "/v1/me", site)
    assert "POST /v1/token" in detail
    self_made = jwt.encode(
        {"iss": "fedmkt-coordinator", "aud": "fedmkt-api", "sub": site.site_id, "exp": 10**10},
        site.key,
        algorithm="EdDSA",
    )
    await world.refused("token.invalid", "GET", "/v1/me", self_made)


@services
async def test_revocation_bites_at_once(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    assertion = site_assertion(site.key, site.site_id, world.clock())
    assert (await world.send("GET", "/v1/me", site)).status_code == 200
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    await world.refused("site.revoked", "GET", "/v1/me", site)
    await world.refused("site.revoked", "POST", "/v1/token", None, TokenRequest(assertion=assertion))


# ------------------------------------------------------------------------------------------------ what a site sees


@services
async def test_a_site_sees_itself_and_its_federation_only(collecting: World) -> None:
    world = collecting
    north = world.sites["north"]
    me = (await world.send("GET", "/v1/me", north)).json()
    assert (me["federation_id"], me["site"]["name"], me["site"]["state"]) == (world.federation_id, "north", "ready")
    assert me["public_set"] == world.public_set.digest
    public = await world.send("GET", f"/v1/artifacts/{me['public_set']}", north)
    assert public.content == world.public_set.to_jsonl()
    await world.create(config("banks"))
    stranger = await world.enrol("north")
    await world.refused("artifact.unknown", "GET", f"/v1/artifacts/{me['public_set']}", stranger)
    view = await world.send("GET", "/v1/federations", "viewer")
    current = next(each["current_round"] for each in view.json()["items"] if each["current_round"])
    there, nowhere = current["round_id"], "round_00000000000000000000"
    said = [
        await world.refused("round.unknown", "POST", f"/v1/rounds/{each}/report", stranger, a_report())
        for each in (there, nowhere)
    ]
    assert said[0].replace(there, nowhere) == said[1]  # else the words would tell which rounds others have


@services
async def test_a_site_reads_what_was_made_for_it_and_nothing_else(collecting: World) -> None:
    world = collecting
    north, south = world.sites["north"], world.sites["south"]
    for site in (north, south):
        await world.upload(site, await world.round())
    result = await world.distill()
    mine, theirs = await world.task(north), await world.task(south)
    for_both = [result.knowledge, mine["llm_vocabulary_artifact"]]
    for digest in [*for_both, *mine["vocabulary_maps"].values()]:
        assert (await world.send("GET", f"/v1/artifacts/{digest}", north)).status_code == 200
    hidden = [*theirs["vocabulary_maps"].values(), result.adapter]
    async with world.context.store.read() as tx:
        hidden += [row.artifact for row in await tx.maps([(north.words.fingerprint, mine["llm_vocabulary"])])]
        hidden.append((await tx.vocabulary(south.words.fingerprint)).artifact)
        own_vocabulary = (await tx.vocabulary(north.words.fingerprint)).artifact
    assert (await world.send("GET", f"/v1/artifacts/{own_vocabulary}", north)).status_code == 200
    for digest in hidden:
        await world.refused("artifact.unknown", "GET", f"/v1/artifacts/{digest}", north)
        assert (await world.send("GET", f"/v1/artifacts/{digest}", "worker")).status_code == 200
