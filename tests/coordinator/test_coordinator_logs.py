"""Log lines of requests and work: which ids they carry, how they are echoed, and what never stands in them."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from coordinator_world import TOKENS, World
from fedmkt.logs import HIDDEN, bind, binding, bound, configure_logs
from fedmkt.tracing import TraceContext, current, traced

pytestmark = pytest.mark.anyio

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs("coordinator", level="INFO", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(written: io.StringIO, event: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line for line in found if event is None or line["event"] == event]


# ------------------------------------------------------------------------------------------------ requests


async def test_a_request_leaves_one_line_with_its_template_ids_and_role(ready: World, written: io.StringIO) -> None:
    path = f"/v1/federations/{ready.federation_id}"
    answer = await ready.send("GET", path, "viewer", headers={"X-Request-ID": "nightly-7", "traceparent": PARENT})
    (line,) = lines(written, "request.answered")
    expected = {
        "request_id": "nightly-7",
        "trace_id": TRACE,
        "role": "viewer",
        "federation_id": ready.federation_id,
        "method": "GET",
        "route": "/v1/federations/{federation_id}",
        "status": 200,
    }
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["seconds"] < 60
    assert answer.headers["x-request-id"] == "nightly-7"
    echoed = TraceContext.parse(answer.headers["traceparent"])
    assert echoed is not None
    assert (echoed.trace_id, echoed.sampled) == (TRACE, True)
    assert echoed.span_id != "00f067aa0ba902b7"


async def test_what_an_upload_does_is_logged_with_site_round_and_request(
    collecting: World, written: io.StringIO
) -> None:
    view = await collecting.round()
    await collecting.upload(collecting.sites["north"], view)
    (accepted,) = lines(written, "knowledge.accepted")
    assert (accepted["site"], accepted["round_id"]) == ("north", view.round_id)
    assert accepted["federation_id"] == collecting.federation_id
    (complete,) = [line for line in lines(written, "request.answered") if line["route"].endswith("/complete")]
    assert complete["request_id"] == accepted["request_id"]
    assert (complete["role"], complete["site"]) == ("site", "north")
    assert complete["upload_id"].startswith("upload_")


async def test_a_problem_names_the_request_and_the_line_names_the_problem(world: World, written: io.StringIO) -> None:
    answer = await world.send("GET", "/v1/federations/fed_0123456789abcdef0000", "viewer")
    (line,) = lines(written, "request.answered")
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == line["request_id"]
    assert (line["code"], line["status"]) == ("federation.unknown", 404)


@pytest.mark.parametrize("given", ["", "with space", "x" * 65, "new\tline", '"quoted"'])
async def test_a_request_id_that_is_none_is_replaced(world: World, given: str) -> None:
    answer = await world.send("GET", "/version", None, headers={"X-Request-ID": given})
    made = answer.headers["x-request-id"]
    assert made != given
    assert len(made) == 16


async def test_probes_that_go_well_leave_no_line(world: World, written: io.StringIO) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await world.send("GET", path, None)).status_code == 200
    assert lines(written, "request.answered") == []


async def test_a_mistake_of_ours_is_logged_with_its_request(world: World, written: io.StringIO) -> None:
    await world.create()
    async with world.context.store.engine.connect() as connection:
        await connection.exec_driver_sql("DROP TABLE events")
        await connection.exec_driver_sql("COMMIT")
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/events", "viewer")
    (failed,) = lines(written, "request.failed")
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == failed["request_id"]
    (line,) = [line for line in lines(written, "request.answered") if line["status"] == 500]
    assert line["code"] == "internal"


# ------------------------------------------------------------------------------------------------ fields, secrets


def test_what_is_bound_stands_in_every_line_of_the_block(written: io.StringIO) -> None:
    log = logging.getLogger("x")
    with binding(job_id="job_1", round_id="round_1"):
        bind(attempt=2, site=None)
        log.info("inside", extra={"round_id": "round_2"})
    log.info("outside")
    inside, outside = lines(written)
    assert (inside["job_id"], inside["round_id"], inside["attempt"]) == ("job_1", "round_2", 2)
    assert "site" not in inside
    assert not {"job_id", "round_id", "attempt"} & outside.keys()
    assert bound() == {}


SECRETS = (
    ("header", f"Authorization: Bearer {TOKENS['operator']}", TOKENS["operator"]),
    ("address", "postgresql://fedmkt:hunter2-is-long@db:5432/fedmkt", "hunter2-is-long"),
    ("redis", "redis://:another-secret@10.0.0.1:6379/0", "another-secret"),
    ("token", "token eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJzaXRlXzEifQ.c2lnbmF0dXJl refused", "c2lnbmF0dXJl"),
)


@pytest.mark.parametrize(("name", "text", "secret"), SECRETS, ids=[each[0] for each in SECRETS])
def test_what_looks_like_a_credential_is_hidden(written: io.StringIO, name: str, text: str, secret: str) -> None:
    logging.getLogger("x").info("event", extra={"reason": text})
    try:
        raise RuntimeError(text)
    except RuntimeError:
        logging.getLogger("x").exception("failed")
    assert secret not in written.getvalue()
    assert written.getvalue().count(HIDDEN) >= 2


def test_a_field_named_for_a_secret_is_hidden_and_a_count_of_tokens_is_not(written: io.StringIO) -> None:
    logging.getLogger("x").info("event", extra={"enrolment_token": "abc", "password": "p", "tokens": 7})
    (line,) = lines(written)
    assert (line["enrolment_token"], line["password"], line["tokens"]) == (HIDDEN, HIDDEN, 7)


# ------------------------------------------------------------------------------------------------ trace context


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
    ],
)
def test_a_traceparent_that_is_none_begins_a_trace(header: str | None) -> None:
    assert TraceContext.parse(header) is None
    with traced("work", parent=header):
        begun = current()
    assert begun is not None
    assert begun.trace_id != TRACE


def test_work_inside_work_is_of_one_trace() -> None:
    with traced("outer", parent=PARENT):
        outer = current()
        with traced("inner"):
            inner = current()
    assert outer is not None
    assert inner is not None
    assert outer.trace_id == inner.trace_id == TRACE
    assert outer.span_id != inner.span_id
    assert current() is None
    assert TraceContext.parse(f"{PARENT[:-2]}00") == TraceContext(TRACE, "00f067aa0ba902b7", False)
