"""Which adapter counts: promoted by the gate, promoted and rolled back by hand, and what the next round starts from."""

import asyncio
from typing import Any

import pytest

from coordinator_world import World
from fedmkt.protocol import AdapterPage, AdapterRollback, AdapterView, GateReport

pytestmark = [pytest.mark.anyio, pytest.mark.services]


def path(world: World, version: int, what: str = "") -> str:
    return f"/v1/federations/{world.federation_id}/adapters/{version}{what}"


async def promoted(world: World) -> list[int]:
    page = await world.ask(AdapterPage, "GET", f"/v1/federations/{world.federation_id}/adapters", "viewer")
    return [each.version for each in page.items if each.promoted]


async def promote(world: World, version: int) -> AdapterView:
    return await world.ask(AdapterView, "POST", path(world, version, "/promote"))


async def roll_back(world: World, version: int, to_version: int | None = None) -> AdapterView:
    wanted = AdapterRollback(to_version=to_version)
    return await world.ask(AdapterView, "POST", path(world, version, "/rollback"), "operator", wanted)


async def played(world: World, rounds: int) -> None:
    await world.request_rounds(rounds)
    for number in range(1, rounds + 1):
        await world.play_round(number)


async def events(world: World, *kinds: str) -> list[dict[str, Any]]:
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/events?limit=200", "viewer")
    return [each["data"] for each in answer.json()["items"] if each["kind"] in kinds]


async def test_the_next_round_starts_from_the_version_that_was_promoted_by_hand(ready: World) -> None:
    world = ready
    await played(world, 3)
    first = await world.ask(AdapterView, "GET", path(world, 1), "viewer")
    for _ in range(2):
        assert (await promote(world, 1)).promoted
    assert await promoted(world) == [1]
    await world.request_rounds()
    for site in world.sites.values():
        await world.upload(site, await world.round(4))
    job, payload = await world.take_distill()
    assert payload.adapter == first.artifact
    await world.complete(job, await world.result(4))
    made = await world.ask(AdapterView, "GET", path(world, 4), "viewer")
    assert (made.parent, made.promoted) == (1, True)
    by_hand = [each for each in await events(world, "adapter.promoted") if each.get("by") == "operator"]
    assert by_hand == [{"version": 1, "parent": 0, "replaced": 3, "by": "operator"}]


async def test_rolling_back_goes_to_the_parent_or_to_a_named_version_and_asked_again_stays(ready: World) -> None:
    world = ready
    await played(world, 3)
    for _ in range(2):
        assert (await roll_back(world, 3)).version == 2
    assert await promoted(world) == [2]
    assert (await roll_back(world, 2, to_version=0)).version == 0
    await world.request_rounds()
    for site in world.sites.values():
        await world.upload(site, await world.round(4))
    _, payload = await world.take_distill()
    assert payload.adapter is None, "version 0 is the bare base model"
    history = [(each["replaced"], each["version"]) for each in await events(world, "adapter.rolled_back")]
    assert history == [(3, 2), (2, 0)]


async def test_a_version_that_the_gate_kept_back_can_be_promoted(ready: World) -> None:
    world = ready
    await world.request_rounds()
    for site in world.sites.values():
        await world.upload(site, await world.round())
    job, _ = await world.take_distill()
    gate = GateReport(decision="rolled_back", before_bits_per_byte=1.4, after_bits_per_byte=1.6)
    await world.complete(job, await world.result(1, gate=gate))
    assert await promoted(world) == [0]
    await promote(world, 1)
    assert await promoted(world) == [1]


async def test_what_a_round_is_just_deciding_is_not_decided_by_hand(ready: World) -> None:
    world = ready
    await played(world, 2)
    await world.request_rounds()
    await promote(world, 1)
    view = await world.round(3)
    for site in world.sites.values():
        await world.upload(site, view)
    detail = await world.refused("adapter.round_distilling", "POST", path(world, 2, "/promote"))
    assert f"round 3 is distilling (until {(await world.round(3)).deadline.isoformat()} at the latest)" in detail
    assert f"POST /v1/rounds/{view.round_id}/cancel" in detail
    body = AdapterRollback()
    await world.refused("adapter.round_distilling", "POST", path(world, 1, "/rollback"), "operator", body)
    assert (await promote(world, 1)).version == 1, "nothing changes: nothing to wait for"
    await world.distill()
    assert await promoted(world) == [3]
    assert (await promote(world, 2)).promoted, "sites apply; the LLM's own part is over"


async def test_versions_that_are_not_there_cannot_be_promoted(ready: World) -> None:
    world = ready
    await played(world, 2)
    detail = await world.refused("adapter.no_artifact", "POST", path(world, 0, "/promote"))
    assert "version 0 is the bare base model" in detail
    await world.refused("adapter.unknown", "POST", path(world, 3, "/promote"))
    body = AdapterRollback(to_version=9)
    await world.refused("adapter.unknown", "POST", path(world, 2, "/rollback"), "operator", body)
    body = AdapterRollback()
    detail = await world.refused("adapter.not_promoted", "POST", path(world, 1, "/rollback"), "operator", body)
    assert "version 2 is promoted, not 1" in detail
    await roll_back(world, 2, to_version=0)
    await world.refused("adapter.no_parent", "POST", path(world, 0, "/rollback"), "operator", body)
    assert await promoted(world) == [0]
    for role in ("viewer", "worker"):
        await world.refused("role.forbidden", "POST", path(world, 1, "/promote"), role)


async def test_many_at_once_leave_one_version_promoted(ready: World) -> None:
    world = ready
    await played(world, 3)
    await asyncio.gather(*(promote(world, version) for version in (1, 2, 3, 1, 2, 3)))
    assert len(await promoted(world)) == 1


async def test_a_version_is_downloaded_by_its_number_with_a_name_and_in_ranges(ready: World) -> None:
    world = ready
    await played(world, 1)
    answer = await world.send("GET", path(world, 1, "/folder"), "operator")
    assert (answer.status_code, answer.content) == (200, b"adapter of round 1")
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == 'attachment; filename="hospitals-adapter-1.tar"'
    part = await world.send("GET", path(world, 1, "/folder"), "operator", headers={"Range": "bytes=11-"})
    assert (part.status_code, part.content) == (206, b"round 1")
    known = {"If-None-Match": answer.headers["etag"]}
    same = await world.send("GET", path(world, 1, "/folder"), "operator", headers=known)
    assert same.status_code == 304
    await world.refused("adapter.no_artifact", "GET", path(world, 0, "/folder"))
    await world.refused("role.forbidden", "GET", path(world, 1, "/folder"), "viewer")
