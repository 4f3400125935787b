"""Whole rounds over HTTP: what moves them, what ends them, who may take part."""

import pytest

from coordinator_world import CARD, PUBLIC_SET, World, a_report, config
from fedmkt.protocol import (
    AdapterPage,
    GateReport,
    Heartbeat,
    HeartbeatReply,
    JobFailure,
    JobView,
    LlmRegistration,
    RoundRequest,
    RoundView,
    Schedule,
    UploadReceipt,
)
from small_tokenizers import vocabulary

pytestmark = [pytest.mark.anyio, pytest.mark.services]


async def test_a_whole_round_from_request_to_completion(ready: World) -> None:
    world = ready
    north, south = world.sites["north"], world.sites["south"]
    assert (await world.request_rounds()).current_round is not None
    view = await world.round()
    assert (view.state, view.missing, view.slice_index) == ("collecting", ("north", "south"), 0)
    assert (await world.task(north))["kind"] == "train_and_upload"

    receipt = await world.upload(north, view)
    assert receipt.site == "north"
    assert (await world.round()).missing == ("south",)
    assert "waits for south" in (await world.task(north))["reason"]
    await world.upload(south, view)
    assert (await world.round()).state == "distilling"
    assert (await world.task(south))["kind"] == "wait"

    job, payload = await world.take_distill()
    assert [each.site for each in payload.uploads] == ["north", "south"]
    assert payload.uploads[0].knowledge == receipt.digest
    result = await world.result(1)
    await world.complete(job, result)
    view = await world.round()
    assert (view.state, view.missing) == ("applying", ("north", "south"))
    task = await world.task(north)
    assert (task["kind"], task["knowledge"]) == ("apply", result.knowledge)
    assert list(task["vocabulary_maps"]) == ["retokenized"]

    await world.report(north, view)
    assert "waits for south" in (await world.task(north))["reason"]
    await world.report(south, view)
    view = await world.round()
    assert (view.state, view.reason) == ("completed", None)
    assert [each.state for each in view.sites] == ["applied", "applied"]
    assert set(view.state_seconds) == {"collecting", "distilling", "applying"}
    assert (await world.task(north))["kind"] == "wait"


async def play_round(world: World, number: int = 1) -> None:
    """Every site does what it should."""
    view = await world.round(number)
    for site in world.sites.values():
        await world.upload(site, view)
    await world.distill()
    for site in world.sites.values():
        await world.report(site, view)


# ------------------------------------------------------------------------------------------------ beginning


async def test_a_round_waits_for_what_is_missing_and_says_so(world: World) -> None:
    await world.create()
    await world.request_rounds()
    assert await waits(world) == ["the public set", "an LLM server", "sites: 0 are ready, quorum is 2; north, south"]
    await world.put_public_set()
    assert await waits(world) == ["an LLM server", "sites: 0 are ready, quorum is 2; north, south"]
    north = await world.enrol("north")
    assert "north still have to send the vocabulary" in (await world.view()).waits_for[-1]
    await world.register_llm()
    await world.describe(north)
    assert await waits(world) == ["vocabulary maps of north", "sites: 0 are ready, quorum is 2; south still"]
    await world.describe(await world.enrol("south"))
    assert await waits(world) == ["vocabulary maps of north, south"]
    assert (await world.view()).current_round is None
    assert await world.build_maps() == 4
    view = await world.view()
    assert view.current_round is not None
    assert (view.waits_for, view.current_round.number) == ((), 1)


async def waits(world: World) -> list[str]:
    """The first words of each sentence of waits_for."""
    known = ["the public set", "an LLM server", "vocabulary maps of north, south", "vocabulary maps of north"]
    known += ["sites: 0 are ready, quorum is 2; north, south", "sites: 0 are ready, quorum is 2; south still"]
    found = (await world.view()).waits_for
    return [next(words for words in known if sentence.startswith(words)) for sentence in found]


async def test_a_round_begins_with_the_ready_sites_once_they_reach_the_quorum(world: World) -> None:
    await world.create(config(schedule=Schedule(quorum=1, collect_timeout_s=100)))
    await world.put_public_set()
    await world.register_llm()
    await world.describe(await world.enrol("north"))
    await world.build_maps()
    await world.request_rounds()
    view = await world.round()
    assert [each.site for each in view.sites] == ["north"]
    await world.describe(await world.enrol("south"))
    await world.build_maps()
    assert "began without this site" in (await world.task(world.sites["south"]))["reason"]


async def test_rounds_follow_each_other_over_the_slices_until_none_is_asked_for(ready: World) -> None:
    world = ready
    await world.request_rounds(3)
    for number, slice_index in ((1, 0), (2, 1), (3, 0)):
        assert (await world.round(number)).slice_index == slice_index
        await play_round(world, number)
    view = await world.view()
    assert (view.rounds_requested, view.rounds_finished, view.current_round) == (3, 3, None)
    assert "no round is due: 3 of 3" in (await world.task(world.sites["north"]))["reason"]


async def test_the_same_idempotency_key_asks_for_rounds_once(world: World) -> None:
    await world.create()
    for _ in range(3):
        assert (await world.request_rounds(2, **{"Idempotency-Key": "one"})).rounds_requested == 2
    assert (await world.request_rounds(2, **{"Idempotency-Key": "two"})).rounds_requested == 4
    path = f"/v1/federations/{world.federation_id}/rounds"
    detail = await world.refused(
        "idempotency_key.used", "POST", path, "operator", RoundRequest(count=3), headers={"Idempotency-Key": "one"}
    )
    assert "count 2 before and with 3 now" in detail


async def test_maps_of_a_pair_are_built_once_for_all_federations(ready: World) -> None:
    world = ready
    first = world.federation_id
    await world.create(config("banks"))
    assert world.federation_id != first
    await world.put_public_set()
    await world.register_llm()
    await world.describe(await world.enrol("north"))
    assert await world.queued() == []
    await world.describe(await world.enrol("south"))
    assert (await world.request_rounds()).current_round is not None


async def test_a_map_that_cannot_be_built_names_its_site_and_is_tried_again_with_its_vocabulary(world: World) -> None:
    await world.create(config(schedule=Schedule(quorum=2)))
    await world.put_public_set()
    await world.register_llm()
    for name in ("north", "south"):
        await world.describe(await world.enrol(name))
    await world.request_rounds()
    failed = await world.claim((await world.queued())[0])
    failure = JobFailure(attempt=1, reason="the tokenizer has no bytes", retry=False)
    await world.ask(JobView, "POST", f"/v1/jobs/{failed.job_id}/fail", "worker", failure)
    await world.build_maps()
    (sentence,) = (await world.view()).waits_for
    assert "1 are ready, quorum is 2" in sentence
    assert "the tokenizer has no bytes" in sentence
    for site in world.sites.values():
        await world.describe(site)
    assert await world.build_maps() == 1
    assert (await world.view()).current_round is not None


# ------------------------------------------------------------------------------------------------ collecting


async def test_at_the_deadline_a_quorum_is_enough(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=1, collect_timeout_s=100, apply_timeout_s=100)))
    await world.request_rounds()
    view = await world.round()
    await world.upload(world.sites["north"], view)
    world.clock.move(99.9)
    await world.tick()
    assert (await world.round()).state == "collecting"
    world.clock.move(0.1)
    await world.tick()
    view = await world.round()
    assert (view.state, [each.state for each in view.sites]) == ("distilling", ["uploaded", "missed"])


async def test_under_quorum_the_round_fails_and_names_who_is_missing(ready: World) -> None:
    world = ready
    await world.request_rounds(2)
    await world.upload(world.sites["south"], await world.round())
    world.clock.move(100)
    await world.tick()
    failed = await world.round(1)
    assert failed.state == "failed"
    assert failed.reason == "1 sites uploaded, quorum is 2; missing at the deadline: north"
    assert (await world.round(2)).state == "collecting"


async def test_late_knowledge_is_refused_after_close(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=1, collect_timeout_s=100)))
    await world.request_rounds(2)
    view = await world.round()
    north, south = world.sites["north"], world.sites["south"]
    blob = world.blob(south, view)
    begun = await world.send_chunks(south, world.manifest(south, view, blob), blob)
    await world.upload(north, view)
    world.clock.move(100)
    await world.tick()
    await world.renew(south)
    detail = await world.refused("round.closed", "POST", f"/v1/uploads/{begun.upload_id}/complete", south)
    assert "round 1 is distilling" in detail
    assert "round 2 opens when this one has ended, at the latest at" in detail
    other = world.blob(south, view, model_id="another")
    path = f"/v1/uploads/{begun.upload_id}/chunks/0"
    await world.refused("round.closed", "PUT", path, south, blob)
    await world.send("DELETE", f"/v1/uploads/{begun.upload_id}", south)
    await world.refused("round.closed", "POST", "/v1/uploads", south, world.manifest(south, view, other))


async def test_a_site_that_missed_the_upload_may_still_apply(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=1, collect_timeout_s=100, apply_timeout_s=100)))
    await world.request_rounds()
    north, south = world.sites["north"], world.sites["south"]
    await world.task(south)
    await world.upload(north, await world.round())
    world.clock.move(100)
    await world.tick()
    await world.distill()
    assert (await world.round()).missing == ("north", "south")
    assert (await world.task(south))["kind"] == "apply"
    await world.report(south, await world.round())
    await world.report(north, await world.round())
    view = await world.round()
    assert (view.state, [each.state for each in view.sites]) == ("completed", ["applied", "applied"])


async def test_a_site_that_never_asked_is_not_waited_for_when_applying(world: World) -> None:
    await world.ready(config(schedule=Schedule(quorum=1, collect_timeout_s=100, apply_timeout_s=100)))
    await world.request_rounds()
    await world.upload(world.sites["north"], await world.round())
    world.clock.move(100)
    await world.tick()
    await world.distill()
    assert (await world.round()).missing == ("north",)
    await world.report(world.sites["north"], await world.round())
    assert (await world.round()).state == "completed"


async def test_federations_that_average_adapters_wait_for_both_uploads(world: World) -> None:
    await world.ready(config(scenario="homogeneous", average_adapters=True))
    await world.request_rounds()
    view = await world.round()
    north, south = world.sites["north"], world.sites["south"]
    assert (await world.task(north))["upload_adapter"] is True
    await world.upload(north, view)
    await world.upload(south, view)
    assert (await world.round()).missing == ("north", "south")
    for site in (north, south):
        blob = f"adapter of {site.name}".encode()
        state = await world.send_chunks(site, world.manifest(site, view, blob, "adapter"), blob)
        receipt = await world.ask(UploadReceipt, "POST", f"/v1/uploads/{state.upload_id}/complete", site)
        assert receipt.kind == "adapter"
    job, payload = await world.take_distill()
    assert [each.private_samples for each in payload.uploads] == [100, 100]
    assert all(each.adapter for each in payload.uploads)
    averaged = await world.store_artifact(b"average")
    await world.complete(job, await world.result(1, averaged_adapter=averaged))
    assert (await world.task(north))["averaged_adapter"] == averaged
    assert (await world.send("GET", f"/v1/artifacts/{averaged}", north)).content == b"average"


async def test_adapters_are_refused_where_they_do_not_travel(collecting: World) -> None:
    world = collecting
    north = world.sites["north"]
    manifest = world.manifest(north, await world.round(), b"adapter", "adapter")
    await world.refused("upload.kind", "POST", "/v1/uploads", north, manifest)


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
    await play_round(world, 1)
    await play_round(world, 2)
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
    await play_round(world)
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
    await play_round(world)
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
