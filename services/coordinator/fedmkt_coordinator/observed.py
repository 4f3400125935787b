"""Every request seen from outside, once: its ids, its bounds, its log line, its metrics and its span."""

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmkt.logs import bind_anew, bound
from fedmkt.protocol import PROTOCOL_VERSION
from fedmkt.tracing import HEADER, Span, current_header, enabled, traced
from fedmkt_coordinator.context import Context
from fedmkt_coordinator.handshake import NAME, other_protocol
from fedmkt_coordinator.limits import Reading, refused
from fedmkt_coordinator.routes.conditional import Unchanged, unchanged
from fedmkt_coordinator.store.audit import SYSTEM, acting

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds: no line while they go well
VERSION = (NAME, str(PROTOCOL_VERSION).encode())
IN_SPANS = frozenset({"trace_id"})  # a span has it anyway


class Observed:
    """ASGI middleware, all that a request passes before the routes: a layer each would cost more than it does.

    Echoes X-Request-ID (or makes one) and traceparent. Another protocol, an unreadable address, too large a body and a
    poll that finds nothing new are answered here.
    """

    def __init__(self, app: ASGIApp, *, body_grace_s: float) -> None:
        self._app = app
        self._grace_s = body_grace_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not REQUEST_ID.match(request_id):
            request_id = secrets.token_hex(8)
        parent = headers.get(HEADER.encode(), b"").decode("latin-1") or None
        bind_anew(request_id=request_id)  # and stays: a mistake of ours is logged and answered outside of this
        with traced("request", parent=parent, kind="server") as span:
            request = _Request(scope, headers, span, request_id, self._grace_s)
            await request.run(self._app, receive, send)


class _Request:
    def __init__(
        self, scope: Scope, headers: dict[bytes, bytes], span: Span, request_id: str, body_grace_s: float
    ) -> None:
        self._scope = scope
        self._headers = headers
        self._span = span
        self._request_id = request_id
        self._grace_s = body_grace_s
        self._status = 500  # what the server says when nothing was said
        self._poll: Unchanged | None = None

    async def run(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        context = getattr(self._scope["app"].state, "context", None)
        metrics = context.metrics if isinstance(context, Context) else None
        began = time.perf_counter()

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._label(message)
            await send(message)

        if metrics is not None:
            metrics.in_progress.inc()
        try:
            await self._answer(app, receive, labelled)
        finally:
            seconds = time.perf_counter() - began
            route, known = self._route(), bound()
            # A mistake of ours is answered outside of all middleware, this one included.
            code = str(known["code"]) if "code" in known else "internal" if self._status >= 500 else None
            if metrics is not None:
                metrics.in_progress.dec()
                metrics.answered(self._scope["method"], route, self._status, seconds, code)
            self._tell(route, seconds, code)

    async def _answer(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        scope = self._scope
        early: ASGIApp | None = other_protocol(scope, self._headers) or refused(scope, self._headers)
        if early is None and scope["method"] == "GET":
            early = self._poll = await unchanged(scope, self._headers)
        if early is not None:
            await early(scope, receive, send)
            return
        before = acting.set(SYSTEM)  # what a request's own task would give it; some servers have no such task
        try:
            await Reading(app, scope, self._grace_s).run(receive, send)
        finally:
            acting.reset(before)

    def _label(self, start: Message) -> None:
        """Those that `problem_response` has set are set again."""
        self._status = start["status"]
        ours = (
            (b"x-request-id", self._request_id.encode("latin-1")),
            (HEADER.encode(), (current_header() or "").encode()),
            VERSION,
        )
        names = {name for name, _ in ours}
        start["headers"] = [*(each for each in start.get("headers", ()) if each[0].lower() not in names), *ours]

    def _route(self) -> str | None:
        """The template, never the address: addresses have no bound."""
        if self._poll is not None:
            return self._poll.route
        route = self._scope.get("route")
        return None if route is None else str(getattr(route, "path_format", getattr(route, "path", "")))

    def _tell(self, route: str | None, seconds: float, code: str | None) -> None:
        method, status = self._scope["method"], self._status
        if enabled():
            self._span.rename(f"{method} {route or '(none)'}")
            self._span.set(http__request__method=method, http__response__status_code=status, http__route=route)
            self._span.set(**{f"fedmkt__{name}": str(value) for name, value in bound().items() if name not in IN_SPANS})
            if status >= 500:
                self._span.fail(code or "internal")
        level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
        if not log.isEnabledFor(level):
            return
        log.log(
            level,
            "request.answered",
            extra={
                "method": method,
                "route": route,
                **({"path": self._scope["path"][:200]} if route is None else {}),
                "status": status,
                **({"code": code} if code is not None else {}),
                "seconds": round(seconds, 4),
            },
        )
