"""Following a federation's events as they happen, over server-sent events, across broken lines and restarts."""

from collections.abc import Iterable, Iterator

import httpx

from fedmkt.client import CoordinatorClient
from fedmkt.protocol import Event
from fedmkt.session import RETRIED, CoordinatorProblem


def follow_events(client: CoordinatorClient, federation_id: str, after: int = 0) -> Iterator[Event]:
    """Every event after sequence `after`, in order, each once, for ever; waits for those to come.

    A line that breaks is taken up at the last event seen. Raises CoordinatorProblem for a refusal, and
    CoordinatorUnreachable when the coordinator stays away for longer than the client's patience.
    """
    path = f"/v1/federations/{federation_id}/events/stream"
    while True:
        client.federation(federation_id)  # patient; the stream below is one attempt
        try:
            with client.session.stream("GET", path, headers={"Last-Event-ID": str(after)}) as response:
                for data in _payloads(response.iter_lines()):
                    event = Event.model_validate_json(data)
                    after = event.sequence
                    yield event
        except httpx.TransportError:
            continue
        except CoordinatorProblem as problem:
            if problem.problem.status not in RETRIED:
                raise


def _payloads(lines: Iterable[str]) -> Iterator[str]:
    """The `data` of each event of a text/event-stream; comments (pings) and other fields are passed over."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
