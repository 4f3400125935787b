"""Scheduled and paused rounds: on one grid, never two at once, told to everybody, kept over restarts."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coordinator_servers import Worlds, settings_for
from coordinator_world import Clock, World, config
from fedmkt.protocol import FederationView, RoundRequest, Schedule
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


async def ask(world: World, **wanted: Any) -> FederationView:
    path = f"/v1/federations/{world.federation_id}/rounds"
    return await world.ask(FederationView, "POST", path, "operator", RoundRequest(**wanted))


async def tell(world: World, what: str) -> FederationView:
    return await world.ask(FederationView, "POST", f"/v1/federations/{world.federation_id}/rounds/{what}")


async def begun(world: World) -> int:
    view = await world.view()
    return view.rounds_finished + (view.current_round is not None)


async def test_rounds_begin_on_the_grid_until_the_last_one(ready: World) -> None:
    world, started = ready, ready.clock()
    view = await ask(world, every_s=60, count=3)
    assert view.schedule is not None
    assert (view.schedule.rounds_left, view.schedule.next_round_at) == (2, started + timedelta(seconds=60))
    for number in (1, 2, 3):
        assert await begun(world) == number
        await world.play_round(number)
        world.clock.move(59)
        await world.tick()
        assert await begun(world) == number
        world.clock.move(1)
        await world.tick()
    view = await world.view()
    assert (view.rounds_finished, view.schedule) == (3, None)
    world.clock.move(1000)
    await world.tick()
    assert await begun(world) == 3
    kinds = await world.event_kinds()
    assert (kinds.count("rounds.scheduled"), kinds.count("schedule.ended")) == (3, 1)


async def test_times_that_pass_while_a_round_runs_are_made_up_once(ready: World) -> None:
    world, started = ready, ready.clock()
    await ask(world, every_s=20)
    for _ in range(3):
        world.clock.move(25)
        await world.tick()
        assert await begun(world) == 1
    await world.play_round(1)
    assert await begun(world) == 2, "20, 40 and 60 s have passed: one round"
    await world.play_round(2)
    view = await world.view()
    assert view.schedule is not None
    assert view.schedule.next_round_at == started + timedelta(seconds=80)
    assert await begun(world) == 2


async def test_a_scheduled_round_waits_for_its_quorum_and_those_after_it_do_not_pile_up(world: World) -> None:
    await world.create()
    await world.put_public_set()
    await world.register_llm()
    await ask(world, every_s=10)
    for _ in range(5):
        world.clock.move(10)
        await world.tick()
    view = await world.view()
    assert (view.rounds_requested, view.current_round) == (1, None)
    assert "quorum is 2" in view.waits_for[-1]
    for name in world.config.sites:
        await world.describe(await world.enrol(name))
    await world.build_maps()
    assert await begun(world) == 1
    await world.play_round(1)
    assert await begun(world) == 2, "for all the times that passed while the first one waited"


async def test_a_federation_may_come_with_its_schedule(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=2, every_s=60, rounds=2)))
    assert await begun(world) == 1
    await world.play_round(1)
    world.clock.move(60)
    await world.tick()
    await world.play_round(2)
    assert (await world.view()).schedule is None


async def test_rounds_on_demand_go_beside_the_schedule(ready: World) -> None:
    world = ready
    await ask(world, every_s=1000)
    await ask(world, count=2)
    for number in (1, 2, 3):
        await world.play_round(number)
    assert await begun(world) == 3
    world.clock.move(1000)
    await world.tick()
    assert await begun(world) == 4


async def test_the_next_time_is_told_to_sites_to_dashboards_and_to_who_comes_late(ready: World) -> None:
    world, north = ready, ready.sites["north"]
    at = (world.clock() + timedelta(seconds=3600)).isoformat()
    await ask(world, every_s=3600)
    first = await world.round()
    await world.play_round(1)
    task = await world.task(north)
    assert task["until"] == at.replace("+00:00", "Z")
    assert task["reason"] == f"round 2 is scheduled for {at}"
    schedule = (await world.view()).schedule
    assert schedule is not None
    assert schedule.next_round_at.isoformat() == at
    manifest = world.manifest(north, first, b"late", "adapter")
    detail = await world.refused("round.closed", "POST", "/v1/uploads", north, manifest)
    assert f"round 2 opens at {at}, once a quorum is ready" in detail
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/events?limit=200", "viewer")
    (scheduled,) = [each for each in answer.json()["items"] if each["kind"] == "rounds.scheduled"]
    assert scheduled["data"]["next_round_at"] == at


# ------------------------------------------------------------------------------------------------ pausing


async def test_a_pause_lets_the_running_round_end_and_begins_no_other(ready: World) -> None:
    world, north = ready, ready.sites["north"]
    await world.request_rounds(2)
    first = await world.round()
    for _ in range(2):
        view = await tell(world, "pause")
    assert view.paused_at == world.clock()
    assert (view.current_round is not None, view.waits_for) == (True, ())
    await world.play_round(1)
    world.clock.move(50)
    await world.tick()
    view = await world.view()
    assert (view.rounds_finished, view.current_round) == (1, None)
    assert view.waits_for == (f"the operator to resume: rounds are paused since {view.paused_at.isoformat()}",)
    assert "rounds are paused since" in (await world.task(north))["reason"]
    manifest = world.manifest(north, first, b"late", "adapter")
    detail = await world.refused("round.closed", "POST", "/v1/uploads", north, manifest)
    assert "the next one opens when the operator resumes" in detail
    for _ in range(2):
        view = await tell(world, "resume")
    assert view.paused_at is None
    assert await begun(world) == 2
    kinds = await world.event_kinds()
    assert (kinds.count("rounds.paused"), kinds.count("rounds.resumed")) == (1, 1)


async def test_times_that_pass_during_a_pause_are_made_up_once(ready: World) -> None:
    world = ready
    await tell(world, "pause")
    await ask(world, every_s=10)
    for _ in range(4):
        world.clock.move(10)
        await world.tick()
        assert await begun(world) == 0
    await tell(world, "resume")
    assert await begun(world) == 1
    await world.play_round(1)
    assert await begun(world) == 1


# ------------------------------------------------------------------------------------------------ cancelling


async def test_cancelling_ends_the_round_those_to_come_and_the_schedule(ready: World) -> None:
    world = ready
    await ask(world, every_s=10)
    await ask(world, count=3)
    for _ in range(2):
        view = await tell(world, "cancel")
        assert (view.current_round, view.schedule, view.rounds_requested) == (None, None, 1)
    assert (await world.round()).state == "cancelled"
    world.clock.move(100)
    await world.tick()
    assert await begun(world) == 1
    assert (await world.event_kinds()).count("rounds.withdrawn") == 1
    await world.request_rounds()
    assert await begun(world) == 2


# ------------------------------------------------------------------------------------------------ kept


async def test_a_schedule_and_a_pause_outlive_the_coordinator(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess, clock: Clock
) -> None:
    first = await worlds.open(settings_for(state_dir, redis_server.url))
    await first.ready()
    await ask(first, every_s=60)
    await first.play_round(1)
    clock.move(300)  # nobody was there for five times of the grid
    second = await worlds.open(settings_for(state_dir, redis_server.url))
    second.federation_id, second.sites = first.federation_id, first.sites
    await second.tick()
    await second.play_round(2)
    assert await begun(second) == 2
    await tell(second, "pause")
    clock.move(100)
    third = await worlds.open(settings_for(state_dir, redis_server.url))
    third.federation_id = first.federation_id
    await third.tick()
    view = await third.view()
    assert (view.rounds_finished, view.current_round) == (2, None)
    assert view.paused_at is not None


async def test_replicas_take_each_time_once(
    worlds: Worlds,
    state_dir: Path,
    redis_server: RedisProcess,
    clock: Clock,
    database_url: str | None,
) -> None:
    settings = settings_for(state_dir, redis_server.url, database_url=database_url)
    replicas = [await worlds.open(settings) for _ in range(3)]
    world = replicas[0]
    await world.ready()
    await ask(world, every_s=60, count=3)
    for number in (1, 2, 3):
        await asyncio.gather(*(each.tick() for each in replicas))
        assert await begun(world) == number
        await world.play_round(number)
        clock.move(60)
    assert (await world.event_kinds()).count("rounds.scheduled") == 3


# ------------------------------------------------------------------------------------------------ asking


async def test_the_same_key_sets_a_schedule_once(ready: World) -> None:
    world = ready
    path, key = f"/v1/federations/{world.federation_id}/rounds", {"Idempotency-Key": "nightly"}
    wanted = RoundRequest(every_s=60, count=5)
    await world.ask(FederationView, "POST", path, "operator", wanted, headers=key)
    await world.play_round(1)
    again = await world.ask(FederationView, "POST", path, "operator", wanted, headers=key)
    assert (again.rounds_requested, again.current_round) == (1, None)
    await world.refused("idempotency_key.used", "POST", path, "operator", RoundRequest(every_s=61), headers=key)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"count": 10_001}, "10001 rounds are asked for at once, at most 10000; set every_s"),
        ({"every_s": 0.5}, "greater than or equal to 1"),
        ({"count": 0}, "greater than or equal to 1"),
    ],
)
async def test_schedules_that_make_no_sense_are_malformed(ready: World, body: dict[str, Any], complaint: str) -> None:
    answer = await ready.send("POST", f"/v1/federations/{ready.federation_id}/rounds", "operator", json=body)
    assert answer.status_code == 422
    assert complaint in answer.json()["detail"]


def test_a_number_of_rounds_needs_an_interval() -> None:
    with pytest.raises(ValueError, match="rounds is 3 but every_s is not set"):
        Schedule(rounds=3)
