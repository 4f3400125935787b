"""The protocol's version on every request and answer. A program that sends another one is told so before all else."""

from collections.abc import Mapping
from typing import ClassVar

from starlette.responses import Response
from starlette.types import Scope

from fedmkt.errors import Refusal
from fedmkt.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedmkt_coordinator.problems import problem_response

NAME = PROTOCOL_HEADER.lower().encode()


class OtherProtocol(Refusal):
    status = 426
    code = "protocol.mismatch"
    title = "Coordinator and client speak different protocols"
    headers: ClassVar[dict[str, str]] = {"Upgrade": f"fedmkt/{PROTOCOL_VERSION}"}


def check_protocol(spoken: str) -> None:
    """Raise OtherProtocol unless `spoken` is the coordinator's own version."""
    if spoken == str(PROTOCOL_VERSION):
        return
    if not spoken.isdecimal():
        remedy = f"send {PROTOCOL_HEADER}: {PROTOCOL_VERSION}"
    else:
        remedy = f"update the {'client' if int(spoken[:9]) < PROTOCOL_VERSION else 'coordinator'}"
    raise OtherProtocol(f"the coordinator speaks protocol {PROTOCOL_VERSION}, the client {spoken[:20]}; {remedy}")


def other_protocol(scope: Scope, headers: Mapping[bytes, bytes]) -> Response | None:
    """The answer to a client of another version. Without the header a request passes: curl need not know of it.

    Only /v1 is guarded: health and /version answer whoever asks.
    """
    spoken = headers.get(NAME)
    if spoken is None or not scope["path"].startswith("/v1/"):
        return None
    try:
        check_protocol(spoken.decode("latin-1"))
    except OtherProtocol as refusal:
        return problem_response(
            refusal.status, refusal.code, refusal.title, refusal.detail, scope["path"], refusal.headers
        )
    return None
