"""The protocol's version on every request and answer. A program that sends another one is told so before all else."""

from typing import ClassVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


class Handshake:
    """ASGI middleware. Without the header a request passes: curl and dashboards need not know of it.

    Only /v1 is guarded: health and /version answer whoever asks.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def versioned(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[PROTOCOL_HEADER] = str(PROTOCOL_VERSION)
            await send(message)

        spoken = next((value for name, value in scope["headers"] if name == NAME), None)
        if spoken is not None and scope["path"].startswith("/v1/"):
            try:
                check_protocol(spoken.decode("latin-1"))
            except OtherProtocol as refusal:
                answer = problem_response(
                    refusal.status, refusal.code, refusal.title, refusal.detail, scope["path"], refusal.headers
                )
                await answer(scope, receive, versioned)
                return
        await self._app(scope, receive, versioned)
