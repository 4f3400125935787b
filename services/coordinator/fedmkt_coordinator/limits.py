"""How large a request's body may be, enforced before anything parses it."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmkt.protocol import CHUNK_BYTES, MAX_VOCABULARY_BYTES
from fedmkt_coordinator.problems import problem_response

MIB = 1 << 20
JSON_BYTES = MIB

# First match decides; everything else is JSON.
LIMITS: Sequence[tuple[str, re.Pattern[str], int]] = (
    ("PUT", re.compile(r"^/v1/uploads/[^/]+/chunks/[^/]+$"), CHUNK_BYTES + 4096),
    ("PUT", re.compile(r"^/v1/me/vocabulary$"), MAX_VOCABULARY_BYTES),
    ("PUT", re.compile(r"^/v1/federations/[^/]+/public-set$"), 256 * MIB),
    ("PUT", re.compile(r"^/v1/artifacts/[^/]+$"), 4096 * MIB),
    ("POST", re.compile(r"^/v1/jobs/[^/]+/complete$"), 16 * MIB),  # reports on up to 10,000 sites
)


def limit_bytes(method: str, path: str) -> int:
    for wanted, pattern, limit in LIMITS:
        if method == wanted and pattern.match(path):
            return limit
    return JSON_BYTES


class BodyTooLarge(Exception):
    """Ends the reading of a body that grew beyond its limit; the client sees a problem instead."""


class BodyLimit:
    """ASGI middleware. A declared length is refused at once, an undeclared one as soon as it is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = limit_bytes(scope["method"], scope["path"])
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            await _too_large(f"the body has {declared} bytes", limit, scope, receive, send)
            return
        await _Counted(self._app, limit).run(scope, receive, send)


class _Counted:
    """One request whose body is counted as it comes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._left = limit
        self._exceeded = False
        self._answered = False

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._left -= len(message.get("body", b""))
                if self._left < 0:
                    self._exceeded = True
                    raise BodyTooLarge
            return message

        async def checked_send(message: Message) -> None:
            # The framework turns what stops the reading into an answer of its own; ours takes its place.
            if not self._exceeded or self._answered:
                self._answered = True
                await send(message)

        try:
            await self._app(scope, counted_receive, checked_send)
        except BodyTooLarge:
            if self._answered:
                raise
        if self._exceeded and not self._answered:
            await _too_large("the body is longer", self._limit, scope, receive, send)


async def _too_large(what: str, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    detail = f"{what}, at most {limit} bytes are accepted by {scope['method']} {scope['path']}"
    response = problem_response(
        413, "body.too_large", "The body is too large", detail, scope["path"], {"Connection": "close"}
    )
    await response(scope, receive, send)
