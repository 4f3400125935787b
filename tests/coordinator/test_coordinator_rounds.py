"""Whole rounds over HTTP: what moves them, what ends them, who may take part."""

import pytest

from coordinator_world import World, config
from fedmkt.protocol import (
    JobFailure,
    JobView,
    RoundRequest,
    Schedule,
    UploadReceipt,
)
from fedmkt_coordinator import rounds
from fedmkt_coordinator.readiness import readiness

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


async def test_what_a_round_waits_for_is_found_out_once_for_all_sites_that_ask(world: World) -> None:
    await world.create()
    await world.request_rounds()
    waits_for = world.context.waits_for

    async def told() -> tuple[str, ...]:
        async with world.context.store.read() as tx:
            return await waits_for.of(tx, await tx.federation(world.federation_id))

    first = await told()
    assert [each.partition(":")[0] for each in first] == [
        "the public set",
        "an LLM server to register its model and vocabulary",
        "sites",
    ]
    world.clock.move(5)
    assert await told() is first
    world.clock.move(0.1)
    assert await told() is not first
    await world.put_public_set()
    assert len(await told()) == 2


async def test_a_round_waits_a_while_for_the_others_once_a_quorum_is_ready(world: World) -> None:
    await world.create(config(schedule=Schedule(quorum=1, gather_timeout_s=20, collect_timeout_s=100)))
    await world.put_public_set()
    await world.register_llm()
    await world.describe(await world.enrol("north"))
    await world.build_maps()
    await world.request_rounds()
    (waits_for,) = (await world.view()).waits_for
    assert "south still have to enrol; the round begins without them at" in waits_for
    world.clock.move(19.9)
    await world.tick()
    assert (await world.view()).current_round is None
    world.clock.move(0.1)
    await world.tick()
    assert [each.site for each in (await world.round()).sites] == ["north"]
    await world.describe(await world.enrol("south"))
    await world.build_maps()
    assert "began without this site" in (await world.task(world.sites["south"]))["reason"]


async def test_the_quick_look_keeps_no_round_back_that_the_thorough_one_would_begin(world: World) -> None:
    """Sites come, describe themselves, get maps and go: where the quick look waits, so does the other."""
    schedule = Schedule(quorum=2, gather_timeout_s=20, collect_timeout_s=100)
    await world.create(config(sites=("north", "south", "east"), schedule=schedule))
    await world.put_public_set()
    await world.register_llm()
    seen = set()

    async def looks() -> None:
        async with world.context.store.write() as tx:
            federation = await tx.federation(world.federation_id)
            quick = await rounds._surely_waits(tx, federation)
            thorough = bool((await readiness(tx, federation)).waits_for)
        assert thorough or not quick
        seen.add((quick, thorough))

    await looks()
    for name in ("north", "south", "east"):
        site = await world.enrol(name)
        await looks()
        await world.describe(site)
        for seconds in (0, 19.9, 0.2) if name == "south" else (1,):
            world.clock.move(seconds)
            await looks()
        await world.build_maps()
        await looks()
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/east/revoke", "operator")
    await looks()
    assert seen == {(True, True), (False, True), (False, False)}


async def test_rounds_follow_each_other_over_the_slices_until_none_is_asked_for(ready: World) -> None:
    world = ready
    await world.request_rounds(3)
    for number, slice_index in ((1, 0), (2, 1), (3, 0)):
        assert (await world.round(number)).slice_index == slice_index
        await world.play_round(number)
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
