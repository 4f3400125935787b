"""Every request seen from outside: its ids, its log line, its metrics and its span."""

import logging
import re
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmkt.logs import bind_anew, bound
from fedmkt.tracing import Span, current_header, traced
from fedmkt_coordinator.context import Context

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
IDS = re.compile(r"/(fed|round)_[0-9a-f]+")
PLACES = {"fed": "/{federation_id}", "round": "/{round_id}"}
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds: no line while they go well


class Observed:
    """ASGI middleware, the outermost. Echoes X-Request-ID (or makes one) and traceparent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not REQUEST_ID.match(request_id):
            request_id = secrets.token_hex(8)
        parent = headers.get(b"traceparent", b"").decode("latin-1") or None
        bind_anew(request_id=request_id)  # and stays: a mistake of ours is logged and answered outside of this
        with traced("request", parent=parent, kind="server") as span:
            await _Request(scope, span, request_id).run(self._app, receive, send)


class _Request:
    def __init__(self, scope: Scope, span: Span, request_id: str) -> None:
        self._scope = scope
        self._span = span
        self._request_id = request_id
        self._status = 500  # what the server says when nothing was said

    async def run(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        context = getattr(self._scope["app"].state, "context", None)
        metrics = context.metrics if isinstance(context, Context) else None
        began = time.perf_counter()

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = self._request_id
                headers["traceparent"] = current_header() or ""
            await send(message)

        if metrics is not None:
            metrics.in_progress.inc()
        try:
            await app(self._scope, receive, labelled)
        finally:
            seconds = time.perf_counter() - began
            route, known = self._route(), bound()
            # A mistake of ours is answered outside of all middleware, this one included.
            code = str(known["code"]) if "code" in known else "internal" if self._status >= 500 else None
            if metrics is not None:
                metrics.in_progress.dec()
                metrics.answered(self._scope["method"], route, self._status, seconds, code)
            self._tell(route, seconds, code)

    def _route(self) -> str | None:
        """The template, never the address: addresses have no bound."""
        route = self._scope.get("route")
        if route is not None:
            return str(getattr(route, "path_format", getattr(route, "path", "")))
        if self._status == 304:  # a poll that was answered before the routes
            return IDS.sub(lambda found: PLACES[found[1]], self._scope["path"])
        return None

    def _tell(self, route: str | None, seconds: float, code: str | None) -> None:
        method, status = self._scope["method"], self._status
        self._span.rename(f"{method} {route or '(none)'}")
        self._span.set(http__request__method=method, http__response__status_code=status, http__route=route)
        self._span.set(**{f"fedmkt__{name}": str(value) for name, value in bound().items() if name not in IN_SPANS})
        if status >= 500:
            self._span.fail(code or "internal")
        quiet = (route in PROBES and status < 400) or not log.isEnabledFor(logging.INFO)
        log.log(
            logging.DEBUG if quiet else logging.INFO,
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


IN_SPANS = frozenset({"trace_id"})  # a span has it anyway
