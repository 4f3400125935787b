"""Jobs: leases, attempts, results, and what becomes of a round whose job fails."""

from typing import Any

import pytest
import redis

from coordinator_world import World
from fedmkt.protocol import (
    DistillResult,
    Heartbeat,
    HeartbeatReply,
    JobCompletion,
    JobFailure,
    JobView,
    LlmProgress,
    MapResult,
    QueueView,
)
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


async def beat(world: World, job: JobView, attempt: int = 1, progress: LlmProgress | None = None) -> HeartbeatReply:
    body = Heartbeat(attempt=attempt, progress=progress)
    return await world.ask(HeartbeatReply, "POST", f"/v1/jobs/{job.job_id}/heartbeat", "worker", body)


async def fail(world: World, job: JobView, attempt: int, **changes: Any) -> JobView:
    body = JobFailure(**{"attempt": attempt, "reason": "out of memory", **changes})
    return await world.ask(JobView, "POST", f"/v1/jobs/{job.job_id}/fail", "worker", body)


async def test_the_worker_finds_job_ids_where_the_queue_says(world: World, redis_server: RedisProcess) -> None:
    await world.create()
    await world.put_public_set()
    await world.register_llm()
    for name in world.config.sites:
        await world.describe(await world.enrol(name))
    view = await world.ask(QueueView, "GET", "/v1/jobs/queue", "worker")
    assert view.redis_url == redis_server.url
    for _ in range(2):  # a second look adds nothing
        await world.tick()
    with redis.Redis.from_url(view.redis_url, decode_responses=True, protocol=2) as client:
        taken = client.xreadgroup(view.group, "worker", {view.stream: ">"}, count=100)
    ids = [fields["job_id"] for _, fields in taken[0][1]]
    assert len(ids) == 4  # a map to the LLM and one from it, of two sites
    assert sorted(ids) == sorted(await world.queued())


async def test_a_job_is_leased_renewed_and_shows_its_progress(distilling: World) -> None:
    world = distilling
    job, _ = await world.take_distill()
    assert job.lease_expires_at is not None
    assert (job.lease_expires_at - world.clock.now).total_seconds() == job.lease_s == 30
    await world.refused("job.not_free", "POST", f"/v1/jobs/{job.job_id}/claim", "worker")
    world.clock.move(29)
    reply = await beat(world, job, progress=LlmProgress(step="aligning", done=1, total=4))
    assert ((reply.lease_expires_at - world.clock.now).total_seconds(), reply.cancelled) == (30, False)
    assert (await world.round()).llm_progress == LlmProgress(step="aligning", done=1, total=4)
    world.clock.move(29)
    await world.tick()
    assert await world.queued() == []
    assert (await world.event_kinds()).count("llm.progress") == 1


async def test_a_silent_workers_job_goes_to_the_next_one_and_the_old_one_is_told(distilling: World) -> None:
    world = distilling
    first, _ = await world.take_distill()
    world.clock.move(30.1)
    await world.tick()
    second, _ = await world.take_distill()
    assert (first.job_id, first.attempt, second.attempt) == (second.job_id, 1, 2)
    path = f"/v1/jobs/{first.job_id}"
    detail = await world.refused("job.lease_lost", "POST", f"{path}/heartbeat", "worker", Heartbeat(attempt=1))
    assert "attempt 1" in detail
    assert "running in attempt 2" in detail
    stale = JobCompletion(attempt=1, result=await world.result(1))
    await world.refused("job.lease_lost", "POST", f"{path}/complete", "worker", stale)
    assert (await world.round()).state == "distilling"
    await world.complete(second, await world.result(1))
    assert (await world.round()).state == "applying"


async def test_a_job_is_tried_three_times_then_its_round_fails_with_the_reason(distilling: World) -> None:
    world = distilling
    for attempt in (1, 2, 3):
        job, _ = await world.take_distill()
        assert job.attempt == attempt
        assert (await fail(world, job, attempt)).state == ("queued" if attempt < 3 else "failed")
        again = await fail(world, job, attempt)
        assert again.state == ("queued" if attempt < 3 else "failed")
    view = await world.round()
    assert (view.state, view.reason) == ("failed", "the LLM server gave up after 3 attempts: out of memory")
    assert (await world.view()).current_round is None


async def test_a_worker_that_always_dies_fails_the_round_too(distilling: World) -> None:
    world = distilling
    for _ in range(3):
        await world.take_distill()
        world.clock.move(30.1)
        await world.tick()
    view = await world.round()
    assert view.reason is not None
    assert view.reason.startswith("the LLM server gave up after 3 attempts: the worker was silent for more than 30 s")
    assert "the LLM server's log says how far it was" in view.reason


async def test_a_failure_that_no_retry_heals_ends_at_once(distilling: World) -> None:
    job, _ = await distilling.take_distill()
    assert (await fail(distilling, job, 1, retry=False)).state == "failed"
    assert (await distilling.round()).state == "failed"


async def test_a_failed_job_waits_before_it_is_due_again(distilling: World) -> None:
    world = distilling
    async with world.context.store.write() as tx:
        (job_id,) = await world.queued()
        job = await tx.claim_job(await tx.job(job_id), world.clock.now, None)
        from datetime import timedelta

        await tx.requeue_job(job, world.clock.now + timedelta(seconds=2), "it stumbled")
    assert await world.queued() == []
    world.clock.move(2)
    assert await world.queued() == [job_id]


async def test_a_result_counts_once_and_the_same_again_changes_nothing(distilling: World) -> None:
    world = distilling
    job, _ = await world.take_distill()
    result = await world.result(1)
    first = await world.complete(job, result)
    assert await world.complete(job, result) == first
    assert (first.state, (await world.event_kinds()).count("adapter.promoted")) == ("done", 1)
    other = JobCompletion(attempt=1, result=await world.result(1, refused_sites={"north": "it lies"}))
    await world.refused("job.lease_lost", "POST", f"/v1/jobs/{job.job_id}/complete", "worker", other)


async def test_a_result_must_fit_its_job_and_its_artifacts_must_be_there(distilling: World) -> None:
    world = distilling
    job, _ = await world.take_distill()
    path = f"/v1/jobs/{job.job_id}/complete"
    there = await world.store_artifact(b"a map")
    wrong = JobCompletion(attempt=1, result=MapResult(artifact=there))
    detail = await world.refused("job.wrong_result", "POST", path, "worker", wrong)
    assert "is a distill, the result is a MapResult" in detail
    missing = JobCompletion(attempt=1, result=await world.result(1, adapter="0" * 64))
    await world.refused("job.artifact_missing", "POST", path, "worker", missing)
    assert (await world.round()).state == "distilling"


async def test_a_claim_whose_answer_was_lost_is_answered_again(distilling: World) -> None:
    world = distilling
    (job_id,) = await world.queued()
    path, mine = f"/v1/jobs/{job_id}/claim", {"Idempotency-Key": "mine"}
    first = await world.ask(JobView, "POST", path, "worker", headers=mine)
    assert await world.ask(JobView, "POST", path, "worker", headers=mine) == first
    await world.refused("job.not_free", "POST", path, "worker", headers={"Idempotency-Key": "another's"})
    await world.refused("job.unknown", "POST", "/v1/jobs/job_00000000000000000000/claim", "worker")


async def test_sites_whose_knowledge_was_left_out_are_not_in_the_lineage(distilling: World) -> None:
    world = distilling
    result = await world.distill(refused_sites={"north": "its rows do not fit the texts"})
    assert isinstance(result, DistillResult)
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/adapters", "viewer")
    assert list(answer.json()["items"][0]["knowledge"]) == ["south"]
    view = await world.round()
    assert view.llm_result is not None
    assert view.llm_result.refused_sites == {"north": "its rows do not fit the texts"}
