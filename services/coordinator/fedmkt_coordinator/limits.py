"""What stands before every request: how large and how slow a body may be, and which characters an address may hold.

All of it is enforced before anything parses the body.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmkt.protocol import CHUNK_BYTES, MAX_VOCABULARY_BYTES
from fedmkt_coordinator.artifacts import MAX_ARTIFACT_BYTES
from fedmkt_coordinator.problems import problem_response

MIB = 1 << 20
JSON_BYTES = MIB

# First match decides; everything else is JSON.
LIMITS: Sequence[tuple[str, re.Pattern[str], int]] = (
    ("PUT", re.compile(r"^/v1/uploads/[^/]+/chunks/[^/]+$"), CHUNK_BYTES + 4096),
    ("PUT", re.compile(r"^/v1/me/vocabulary$"), MAX_VOCABULARY_BYTES),
    ("PUT", re.compile(r"^/v1/federations/[^/]+/public-set$"), 256 * MIB),
    ("PUT", re.compile(r"^/v1/artifacts/[^/]+$"), MAX_ARTIFACT_BYTES),
    ("POST", re.compile(r"^/v1/jobs/[^/]+/complete$"), 16 * MIB),  # reports on up to 10,000 sites
)

# A tenth of a modem's: what comes slower than this for longer than the grace is no bad link.
SLOWEST_BYTES_PER_S = 1000.0
CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


def limit_bytes(method: str, path: str) -> int:
    for wanted, pattern, limit in LIMITS:
        if method == wanted and pattern.match(path):
            return limit
    return JSON_BYTES


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a request is ended here."""

    status: int
    code: str
    title: str
    detail: str

    def response(self, scope: Scope) -> Response:
        headers = {"Connection": "close"}  # what is left of the body will not be read
        return problem_response(self.status, self.code, self.title, self.detail, scope["path"], headers)


class BodyStopped(Exception):
    """Ends the reading of a body that is too long or too slow; the client sees a problem instead."""


def refused(scope: Scope, headers: Mapping[bytes, bytes]) -> Response | None:
    """The answer to an address or a declared length that cannot be accepted."""
    stop = _unreadable(scope) or _declared_too_large(scope, headers)
    return None if stop is None else stop.response(scope)


def _unreadable(scope: Scope) -> Stop | None:
    """No name and no id of ours has control characters; databases and terminals choke on them."""
    query = scope["query_string"]
    found = CONTROL.search(scope["path"].encode("utf-8", "surrogateescape")) or (
        CONTROL.search(unquote_to_bytes(query)) if query else None
    )
    if found is None:
        return None
    detail = f"the address holds the control character 0x{found[0][0]:02x}; send it without"
    return Stop(400, "request.control_character", "The address is not readable", detail)


def _declared_too_large(scope: Scope, headers: Mapping[bytes, bytes]) -> Stop | None:
    declared = headers.get(b"content-length", b"").decode("latin-1")
    if not declared:
        return None
    limit = limit_bytes(scope["method"], scope["path"])
    return _too_large(f"the body has {declared} bytes", limit, scope) if _above(declared, limit) else None


def _above(declared: str, limit: int) -> bool:
    return declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit)


def _too_large(what: str, limit: int, scope: Scope) -> Stop:
    detail = f"{what}, at most {limit} bytes are accepted by {scope['method']} {scope['path']}"
    return Stop(413, "body.too_large", "The body is too large", detail)


class Reading:
    """One request whose body is counted and timed as it comes.

    Patience is a budget of seconds: waiting spends it, bytes earn it back, up to the grace. So a stall may last the
    grace at most, and a body that keeps the slowest pace may take as long as it needs.
    """

    def __init__(self, app: ASGIApp, scope: Scope, grace_s: float) -> None:
        self._app = app
        self._scope = scope
        self._limit = limit_bytes(scope["method"], scope["path"])
        self._left = self._limit
        self._grace_s = self._patience_s = grace_s
        self._whole = False
        self._stop: Stop | None = None
        self._answered = False

    async def run(self, receive: Receive, send: Send) -> None:
        async def checked_receive() -> Message:
            if self._whole:  # from now on it is the disconnection that is awaited, and that may take for ever
                return await receive()
            message = await self._in_time(receive)
            if message["type"] == "http.request":
                self._left -= len(message.get("body", b""))
                self._whole = not message.get("more_body", False)
                if self._left < 0:
                    self._end(_too_large("the body is longer", self._limit, self._scope))
            return message

        async def checked_send(message: Message) -> None:
            # The framework turns what stops the reading into an answer of its own; ours takes its place.
            if self._stop is None or self._answered:
                self._answered = True
                await send(message)

        try:
            await self._app(self._scope, checked_receive, checked_send)
        except BodyStopped:
            if self._answered:
                raise
        if self._stop is not None and not self._answered:
            await self._stop.response(self._scope)(self._scope, receive, send)

    async def _in_time(self, receive: Receive) -> Message:
        clock = asyncio.get_running_loop().time
        asked = clock()
        try:
            async with asyncio.timeout(self._patience_s):
                message = await receive()
        except TimeoutError:
            came = self._limit - self._left
            detail = (
                f"{came} bytes of the body came, then it stalled for {self._grace_s:g} s or kept below "
                f"{SLOWEST_BYTES_PER_S:g} bytes a second; send it again on a better line"
            )
            self._end(Stop(408, "body.too_slow", "The body comes too slowly", detail))
        earned_s = len(message.get("body", b"")) / SLOWEST_BYTES_PER_S
        self._patience_s = min(self._grace_s, self._patience_s - (clock() - asked) + earned_s)
        return message

    def _end(self, stop: Stop) -> None:
        self._stop = stop
        raise BodyStopped
