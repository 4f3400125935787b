"""Clocks that are wrong: tolerated up to a bound, named beyond it; deadlines and leases are the coordinator's."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coordinator_world import TOKENS, Clock, World, served
from fedmkt.client import CoordinatorClient, CoordinatorProblem, RetryPolicy, SiteKey, StaticToken
from fedmkt.protocol import Heartbeat, HeartbeatReply, TrainAndUpload, Wait

pytestmark = [pytest.mark.anyio, pytest.mark.services]

SKEWS = (-60, -59, 0, 59, 60)  # seconds; the setting clock_skew_s is 60


def site_client(url: str, world: World, skew_s: float, name: str = "north") -> CoordinatorClient:
    site = world.sites[name]
    return CoordinatorClient(
        url,
        SiteKey(site.site_id, site.key),
        retry=RetryPolicy(0.01, 0.05, 1.0),
        clock=lambda: world.clock() + timedelta(seconds=skew_s),
    )


@pytest.mark.parametrize("skew_s", SKEWS)
async def test_a_site_whose_clock_is_wrong_within_the_bound_does_its_part(collecting: World, skew_s: float) -> None:
    world, north = collecting, collecting.sites["north"]
    blob = world.blob(north, await world.round())

    def act(url: str) -> None:
        with site_client(url, world, skew_s) as client:
            task = client.next_task(0).task
            assert isinstance(task, TrainAndUpload)
            client.upload("knowledge", task.round_id, blob, north.key, client.keys().public_keys)
            assert isinstance(client.next_task(0).task, Wait)

    async with served(world) as url:
        await asyncio.to_thread(act, url)
    assert (await world.round()).missing == ("south",)


@pytest.mark.parametrize(
    ("skew_s", "words"), [(61, "61 s ahead of"), (7200, "7200 s ahead of"), (-7200, "7200 s behind")]
)
async def test_beyond_the_bound_the_offset_and_the_remedy_are_named(
    collecting: World, skew_s: float, words: str
) -> None:
    world = collecting

    def act(url: str) -> CoordinatorProblem:
        with site_client(url, world, skew_s) as client, pytest.raises(CoordinatorProblem) as refused:
            client.next_task(0)
        return refused.value

    async with served(world) as url:
        problem = await asyncio.to_thread(act, url)
    assert problem.code == "assertion.clock"
    assert words in problem.detail
    assert "at most 60 s are tolerated: set the site's clock (NTP)" in problem.detail


async def test_a_lease_ends_by_the_coordinators_clock_alone(distilling: World) -> None:
    world = distilling
    job, _ = await world.take_distill()
    path = f"/v1/jobs/{job.job_id}/heartbeat"
    for _ in range(2):
        world.clock.move(29)
        beat = await world.ask(HeartbeatReply, "POST", path, "worker", Heartbeat(attempt=1))
        assert beat.lease_expires_at == world.clock() + timedelta(seconds=job.lease_s)
        await world.tick()
    world.clock.move(31)
    await world.tick()
    await world.refused("job.lease_lost", "POST", path, "worker", Heartbeat(attempt=1))


# ------------------------------------------------------------------------------------------------ the client's side


@contextmanager
def told_time(clock: Clock) -> Iterator[str]:
    """Answers with the coordinator's time in the Date header, and first asks for a pause until a date."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b'{"version": "1", "protocol_version": 1}'
            self.send_response_only(503 if len(asked) == 1 else 200)
            self.send_header("Date", format_datetime(clock(), usegmt=True))
            self.send_header("Retry-After", format_datetime(clock() + timedelta(seconds=5), usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("skew_s", [-86400.0, 0.0, 86400.0])
def test_a_client_reads_dates_by_the_coordinators_clock(
    clock: Clock, skew_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    with (
        told_time(clock) as url,
        caplog.at_level(logging.WARNING, "fedmkt.session"),
        CoordinatorClient(
            url,
            StaticToken(TOKENS["viewer"]),
            wait=waits.append,
            clock=lambda: clock() + timedelta(seconds=skew_s),
        ) as client,
    ):
        client.version()
        assert waits == [5.0], "a wrong clock neither hurries it nor puts it to sleep for hours"
        assert abs((client.session.now() - clock()).total_seconds()) <= 1.5
    warned = [record.__dict__["reason"] for record in caplog.records if record.message == "clock.differs"]
    side = "ahead of" if skew_s > 0 else "behind"
    assert warned == ([] if skew_s == 0 else [warned[0]])
    assert all(f"{side} the coordinator's: set it (NTP)" in each for each in warned)
