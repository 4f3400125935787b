"""Events followed live from a real coordinator that restarts in between."""

import threading
import time
from itertools import islice
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from fedmkt.client import CoordinatorClient, CoordinatorProblem
from fedmkt.event_stream import _payloads, follow_events
from fedmkt.local_server import serve_in_thread
from fedmkt_coordinator.examples import FEDERATION_VIEW
from live_coordinator import LiveCoordinator, stories, tiny_config

pytestmark = [pytest.mark.services, pytest.mark.timeout(60)]


def test_data_of_several_lines_is_joined_and_comments_are_passed_over() -> None:
    lines = [": ping", "", "id: 1", "event: x", "data: one", "", "data:two", "data: three", "", "data: cut off"]
    assert list(_payloads(lines)) == ["one", "two\nthree"]


def test_events_come_in_order_each_once_over_a_restart(tmp_path: Path) -> None:
    coordinator = LiveCoordinator(tmp_path)
    coordinator.start()
    federation_id = coordinator.create(tiny_config(("north", "south")), stories(0, 20))

    def restart() -> None:
        time.sleep(0.5)
        coordinator.stop()
        coordinator.start()
        coordinator.enrolment_token(federation_id, "north")
        coordinator.enrolment_token(federation_id, "south")

    later = threading.Thread(target=restart)
    later.start()
    with coordinator.client() as operator:
        events = follow_events(operator, federation_id)
        seen = list(islice(events, 4))
        events.close()  # type: ignore[attr-defined]  # a generator
        later.join()
        assert [event.sequence for event in seen] == [1, 2, 3, 4]
        assert [event.kind for event in seen][2:] == ["site.invited", "site.invited"]
        assert [event.site for event in islice(follow_events(operator, federation_id, after=3), 1)] == ["south"]
    coordinator.stop()


class Enough(Exception):
    """Four pauses were made."""


def test_a_proxy_that_ends_every_stream_at_once_is_asked_more_and_more_rarely() -> None:
    app = FastAPI()
    app.get("/v1/federations/{federation_id}")(
        lambda: Response(FEDERATION_VIEW.model_dump_json(), media_type="application/json")
    )
    app.get("/v1/federations/{federation_id}/events/stream")(lambda: Response(b"", media_type="text/event-stream"))
    pauses: list[float] = []

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise Enough

    with (
        serve_in_thread(app) as port,
        CoordinatorClient(f"http://127.0.0.1:{port}", wait=wait) as client,
        pytest.raises(Enough),
    ):
        next(follow_events(client, FEDERATION_VIEW.federation_id))
    assert all(0.125 * 2**n <= pause <= 0.25 * 2**n for n, pause in enumerate(pauses))


def test_a_federation_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    coordinator = LiveCoordinator(tmp_path)
    coordinator.start()
    with coordinator.client() as operator, pytest.raises(CoordinatorProblem) as caught:
        next(follow_events(operator, "fed_00000000000000000000"))
    assert caught.value.status == 404
    coordinator.stop()
