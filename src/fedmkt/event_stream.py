"""Following a federation's events as they happen, over server-sent events, across broken lines and restarts."""

import logging
from collections.abc import Iterable, Iterator

import httpx

from fedmkt.answers import CoordinatorProblem
from fedmkt.client import CoordinatorClient
from fedmkt.protocol import Event
from fedmkt.session import RETRIED

log = logging.getLogger(__name__)


def follow_events(client: CoordinatorClient, federation_id: str, after: int = 0) -> Iterator[Event]:
    """Every event after sequence `after`, in order, each once, for ever; waits for those to come.

    A line that breaks is taken up at the last event seen. Raises CoordinatorProblem for a refusal, and
    CoordinatorUnreachable when the coordinator stays away for longer than the client's patience.
    """
    path = f"/v1/federations/{federation_id}/events/stream"
    failures = 0
    while True:
        client.federation(federation_id)  # patient; the stream below is one attempt
        asked_s: float | None = None
        try:
            with client.session.stream("GET", path, headers={"Last-Event-ID": str(after)}) as response:
                for data in _payloads(response.iter_lines()):
                    event = Event.model_validate_json(data)
                    after, failures = event.sequence, 0
                    yield event
        except httpx.TransportError as error:
            log.debug("events.line_broke", extra={"federation_id": federation_id, "reason": str(error)})
        except CoordinatorProblem as problem:
            if problem.problem.status not in RETRIED:
                raise
            asked_s = problem.retry_after_s
        client.session.pause(failures, asked_s)  # a proxy that ends every stream at once is not asked at once again
        failures += 1


def _payloads(lines: Iterable[str]) -> Iterator[str]:
    """The `data` of each event of a text/event-stream; comments (pings) and other fields are passed over."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
