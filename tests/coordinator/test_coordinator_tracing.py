"""OpenTelemetry: what is recorded where it is on, that it hangs together, and that nothing is paid where it is off."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from coordinator_world import World
from fedmkt.protocol import DistillJob
from fedmkt.session import HEADER, _headers
from fedmkt.tracing import TraceContext, configure, current_header, enabled, span, traced

pytestmark = pytest.mark.anyio

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[ReadableSpan]]]:
    """Ends the recording and gives what was recorded, oldest first."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    exporter = InMemorySpanExporter()
    end = configure("coordinator", exporter)

    def recorded() -> list[ReadableSpan]:
        end()
        return sorted(exporter.get_finished_spans(), key=lambda each: each.start_time or 0)

    yield recorded
    end()


def trace_id(recorded: ReadableSpan) -> str:
    assert recorded.context is not None
    return f"{recorded.context.trace_id:032x}"


async def test_a_request_is_a_span_of_its_callers_trace_with_its_transactions(
    ready: World, spans: Callable[[], list[ReadableSpan]]
) -> None:
    path = f"/v1/federations/{ready.federation_id}"
    answer = await ready.send("GET", path, "viewer", headers={HEADER: PARENT, "X-Request-ID": "r-1"})
    found = [each for each in spans() if trace_id(each) == TRACE]
    (request,) = [each for each in found if each.name == "GET /v1/federations/{federation_id}"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == "00f067aa0ba902b7"
    attributes = dict(request.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["http.route"] == "/v1/federations/{federation_id}"
    assert (attributes["fedmkt.request_id"], attributes["fedmkt.role"]) == ("r-1", "viewer")
    assert request.context is not None
    below = {each.name for each in found if each.parent and each.parent.span_id == request.context.span_id}
    assert below == {"database.read"}
    echoed = TraceContext.parse(answer.headers[HEADER])
    assert echoed == TraceContext(TRACE, f"{request.context.span_id:016x}", True)


async def test_a_trace_goes_from_the_agent_over_the_job_to_the_llm_server(
    collecting: World, spans: Callable[[], list[ReadableSpan]]
) -> None:
    view = await collecting.round()
    await collecting.upload(collecting.sites["north"], view)
    with traced("task train_and_upload"):  # the agent that completes the round's uploads
        agents = current_header()
        south, blob = collecting.sites["south"], collecting.blob(collecting.sites["south"], view)
        state = await collecting.send_chunks(south, collecting.manifest(south, view, blob), blob)
        path, headers = f"/v1/uploads/{state.upload_id}/complete", _headers(None, "", None)
        assert headers == {HEADER: agents}
        assert (await collecting.send("POST", path, south, headers=headers)).status_code == 200
    job, payload = await collecting.take_distill()
    assert isinstance(payload, DistillJob)
    ordered = TraceContext.parse(payload.traceparent)
    begun = TraceContext.parse(agents)
    assert ordered is not None
    assert begun is not None
    assert ordered.trace_id == begun.trace_id
    with traced("job distill", parent=payload.traceparent, kind="consumer"):  # the LLM server
        await collecting.send("POST", f"/v1/jobs/{job.job_id}/heartbeat", "worker", headers=_headers(None, "", None))
    names = {each.name for each in spans() if trace_id(each) == begun.trace_id}
    assert {
        "task train_and_upload",
        "POST /v1/uploads/{upload_id}/complete",
        "database.write",
        "job distill",
        "POST /v1/jobs/{job_id}/heartbeat",
    } <= names


async def test_the_keepers_look_is_a_trace_of_its_own(world: World, spans: Callable[[], list[ReadableSpan]]) -> None:
    await world.tick()
    found = spans()
    (tick,) = [each for each in found if each.name == "keeper.tick"]
    assert tick.parent is None
    assert any(trace_id(each) == trace_id(tick) for each in found if each.name == "database.read")


async def test_a_failure_of_ours_marks_its_span(world: World, spans: Callable[[], list[ReadableSpan]]) -> None:
    await world.create()
    async with world.context.store.engine.connect() as connection:
        await connection.exec_driver_sql("DROP TABLE events")
        await connection.exec_driver_sql("COMMIT")
    await world.send("GET", f"/v1/federations/{world.federation_id}/events", "viewer")
    (failed,) = [each for each in spans() if each.name.startswith("GET ")]
    assert failed.status.status_code.name == "ERROR"


# ------------------------------------------------------------------------------------------------ on the wire, and off


def test_spans_are_sent_to_where_the_standard_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.path.encode() + b" " + self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    end = configure("agent")
    try:
        with traced("task apply", site="north"), span("step"):
            pass
    finally:
        end()
        server.shutdown()
        server.server_close()
        thread.join()
    path, _, body = received[0].partition(b" ")
    assert path == b"/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert "fedmkt-agent" in str(resource.resource)
    found: dict[str, Span] = {each.name: each for scope in resource.scope_spans for each in scope.spans}
    assert set(found) == {"task apply", "step"}
    assert found["step"].parent_span_id == found["task apply"].span_id


def test_switched_off_it_imports_nothing_and_records_nothing() -> None:
    assert not enabled()
    code = (
        "import sys, fedmkt.tracing as t, fedmkt.session\n"
        "with t.traced('a') as one, t.span('b') as two: one.set(x=1); two.fail('no')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
