"""How rounds end: revoked sites, deadlines, reports, cancelling; and what stays fixed meanwhile."""

import pytest

from coordinator_world import CARD, PUBLIC_SET, World, a_report, config
from fedmkt.protocol import (
    AdapterPage,
    GateReport,
    Heartbeat,
    HeartbeatReply,
    LlmRegistration,
    RoundView,
    Schedule,
)
from small_tokenizers import vocabulary

pytestmark = [pytest.mark.anyio, pytest.mark.services]


# ------------------------------------------------------------------------------------------------ revoking


async def test_a_revoked_site_is_no_longer_waited_for(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=1)))
    await world.request_rounds()
    await world.upload(world.sites["north"], await world.round())
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/south/revoke")
    assert (await world.round()).state == "distilling"


async def test_knowledge_of_a_site_that_is_revoked_while_collecting_does_not_count(collecting: World) -> None:
    world = collecting
    await world.upload(world.sites["north"], await world.round())
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    await world.upload(world.sites["south"], await world.round())
    view = await world.round()
    assert (view.state, view.reason) == ("failed", "1 sites uploaded, quorum is 2; revoked meanwhile: north")


async def test_a_site_with_a_new_key_joins_the_next_round(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=1, collect_timeout_s=100)))
    await world.request_rounds(2)
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    await world.describe(await world.enrol("north"))
    north = world.sites["north"]
    manifest = world.manifest(north, await world.round(), b"anything")
    detail = await world.refused("upload.not_expected", "POST", "/v1/uploads", north, manifest)
    assert "joins the next round" in detail
    world.clock.move(100)
    await world.tick()
    await world.renew(north)
    await world.upload(north, await world.round(2))


# ------------------------------------------------------------------------------------------------ distilling, applying


async def test_a_round_whose_llm_server_is_silent_fails_at_the_deadline_and_its_job_is_called_off(
    distilling: World,
) -> None:
    world = distilling
    job, _ = await world.take_distill()
    for _ in range(5):
        world.clock.move(20)
        beat = await world.ask(
            HeartbeatReply, "POST", f"/v1/jobs/{job.job_id}/heartbeat", "worker", Heartbeat(attempt=1)
        )
        assert not beat.cancelled
    await world.tick()
    view = await world.round()
    assert view.state == "failed"
    assert view.reason == "the LLM server did not finish within 100 s (distill_timeout_s)"
    beat = await world.ask(HeartbeatReply, "POST", f"/v1/jobs/{job.job_id}/heartbeat", "worker", Heartbeat(attempt=1))
    assert beat.cancelled


async def test_the_adapter_is_promoted_with_its_lineage(ready: World) -> None:
    world = ready
    await world.request_rounds(2)
    await world.play_round(1)
    await world.play_round(2)
    page = await world.ask(AdapterPage, "GET", f"/v1/federations/{world.federation_id}/adapters", "viewer")
    assert [(each.version, each.parent, each.promoted) for each in page.items] == [
        (2, 1, True),
        (1, 0, False),
        (0, None, False),
    ]
    assert set(page.items[0].knowledge) == {"north", "south"}


async def test_the_next_job_starts_from_the_promoted_adapter_not_from_one_rolled_back(ready: World) -> None:
    world = ready
    await world.request_rounds(2)
    view = await world.round()
    for site in world.sites.values():
        await world.upload(site, view)
    job, payload = await world.take_distill()
    assert payload.adapter is None
    gate = GateReport(decision="rolled_back", before_bits_per_byte=1.4, after_bits_per_byte=1.6)
    await world.complete(job, await world.result(1, gate=gate))
    for site in world.sites.values():
        await world.report(site, view)
    view = await world.round(2)
    for site in world.sites.values():
        await world.upload(site, view)
    _, payload = await world.take_distill()
    assert payload.adapter is None


async def test_applying_ends_at_its_deadline_and_names_who_did_not_report(distilling: World) -> None:
    world = distilling
    await world.distill()
    await world.report(world.sites["north"], await world.round())
    world.clock.move(100)
    await world.tick()
    view = await world.round()
    assert (view.state, view.reason) == ("completed", "south did not report before the deadline")


async def test_a_report_counts_once_and_another_one_is_refused(collecting: World) -> None:
    world = collecting
    view = await world.round()
    north = world.sites["north"]
    path = f"/v1/rounds/{view.round_id}/report"
    await world.refused("round.not_applying", "POST", path, north, a_report())
    for site in world.sites.values():
        await world.upload(site, view)
    await world.distill()
    await world.report(north, view)
    await world.report(north, view)
    await world.refused("report.differs", "POST", path, north, a_report(bytes_up=1))
    await world.report(world.sites["south"], view)
    await world.report(north, view)  # the round has ended; the answer is still the same
    assert (await world.event_kinds()).count("site.applied") == 2


# ------------------------------------------------------------------------------------------------ cancelling


@pytest.mark.parametrize("state", ["collecting", "distilling", "applying"])
async def test_a_cancelled_round_ends_and_withdraws_those_to_come(ready: World, state: str) -> None:
    world = ready
    await world.request_rounds(5)
    view = await world.round()
    if state != "collecting":
        for site in world.sites.values():
            await world.upload(site, view)
    if state == "applying":
        await world.distill()
    assert (await world.round()).state == state
    for _ in range(2):
        cancelled = await world.ask(RoundView, "POST", f"/v1/rounds/{view.round_id}/cancel")
        assert (cancelled.state, cancelled.reason) == ("cancelled", "an operator cancelled it")
    after = await world.view()
    assert (after.current_round, after.rounds_requested, after.rounds_finished) == (None, 1, 1)
    assert await world.queued() == []
    await world.request_rounds()
    assert (await world.round(2)).state == "collecting"


async def test_a_round_that_has_ended_cannot_be_cancelled(collecting: World) -> None:
    world = collecting
    await world.play_round()
    await world.refused("round.over", "POST", f"/v1/rounds/{(await world.round()).round_id}/cancel")


# ------------------------------------------------------------------------------------------------ what stays fixed


async def test_the_public_set_and_the_llm_are_fixed_once_a_round_has_begun(ready: World) -> None:
    world = ready
    path = f"/v1/federations/{world.federation_id}"
    longer = PUBLIC_SET + b'{"id":"more","text":"one more"}\n'
    assert (await world.send("PUT", f"{path}/public-set", "operator", longer)).status_code == 200
    await world.put_public_set()
    await world.request_rounds()
    await world.put_public_set()
    await world.register_llm()
    detail = await world.refused("public_set.fixed", "PUT", f"{path}/public-set", "operator", longer)
    assert "1 rounds were made" in detail
    other = await world.store_artifact(vocabulary("unigram").to_bytes())
    wanted = LlmRegistration(vocabulary=other, model=CARD)
    await world.refused("llm.fixed", "PUT", f"{path}/llm", "worker", wanted)


async def test_a_site_keeps_its_vocabulary_while_a_round_counts_on_it(collecting: World) -> None:
    world = collecting
    north = world.sites["north"]
    await world.describe(north)
    other = vocabulary("word_piece").to_bytes()
    await world.refused("vocabulary.in_use", "PUT", "/v1/me/vocabulary", north, other)


async def test_every_transition_left_an_event_in_order(collecting: World) -> None:
    world = collecting
    await world.play_round()
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/events?limit=200", "viewer")
    items = answer.json()["items"]
    assert [each["sequence"] for each in items] == list(range(1, len(items) + 1))
    states = [each["data"]["state"] for each in items if each["kind"] == "round.state"]
    assert states == ["collecting", "distilling", "applying", "completed"]
    kinds = [each["kind"] for each in items]
    for kind in ("federation.created", "public_set.stored", "llm.registered", "rounds.requested", "adapter.promoted"):
        assert kinds.count(kind) == 1
    for kind in ("site.enrolled", "site.vocabulary", "site.model", "knowledge.accepted", "site.applied"):
        assert kinds.count(kind) == 2
