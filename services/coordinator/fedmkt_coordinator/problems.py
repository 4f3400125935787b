"""One place where refusals and failures become RFC 9457 problem documents."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fedmkt.errors import Refusal
from fedmkt.logs import bind, bound
from fedmkt.protocol import Problem
from fedmkt_coordinator.audit import Refusals
from fedmkt_coordinator.dependencies import ASK_AGAIN_S, NEEDED, REMEDIES, DependencyDown
from fedmkt_coordinator.store.audit import acting

log = logging.getLogger(__name__)

MAX_COMPLAINTS = 10  # validation errors quoted in one problem


@dataclass(frozen=True, slots=True)
class Known:
    """A problem for the API's description; `details` are what it may say, `...` for what is filled in."""

    status: int
    code: str
    title: str
    details: tuple[str, ...]
    remedy: str = ""  # what to do, where the details leave it open; for docs/troubleshooting.md


# What is answered before any route is asked. What routes refuse are classes beside the rules.
ALWAYS = (
    Known(
        400,
        "request.control_character",
        "The address is not readable",
        ("send the address without it",),
        "Quote ids in addresses as URLs want it; line ends and other control characters belong in none.",
    ),
    Known(
        408,
        "body.too_slow",
        "The body comes too slowly",
        ("send it again on a better line",),
        "Send chunks in parts with Content-Range, so that what came is kept; FEDMKT_BODY_GRACE_S is the patience.",
    ),
    Known(
        413,
        "body.too_large",
        "The body is too large",
        ("the body has ... bytes, at most ... are accepted",),
        "Send large things as uploads, in chunks; docs/api.md shows how.",
    ),
    Known(500, "internal", "Internal error", ("the coordinator made a mistake; the request may be sent again",)),
)
OTHER_PROTOCOL = Known(
    426,
    "protocol.mismatch",
    "Coordinator and client speak different protocols",
    ("the coordinator speaks protocol ..., the client ...; update the ...",),
)
DOWN = {
    name: Known(503, f"{name}.unavailable", f"The coordinator's {name} cannot be reached", ("send it again in 2 s",))
    for name in sorted(NEEDED)
}
NOT_FOUND = Known(404, "http.not_found", "Not Found", ("there is no such address; GET /openapi.json lists them",))
MALFORMED = Known(422, "request.malformed", "The request is malformed", ("body.name: ...; send it as described",))
NOT_TEXT = Known(400, "http.bad_request", "Bad Request", ("the body is no UTF-8 text",), "Send JSON, encoded as UTF-8.")


def problem_response(
    status: int, code: str, title: str, detail: str, instance: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    request_id = bound().get("request_id")
    problem = Problem(
        type=f"urn:fedmkt:problem:{code}",
        title=title,
        status=status,
        code=code,
        detail=detail,
        instance=instance,
        request_id=str(request_id) if request_id else None,
    )
    bind(code=code)  # for the request's own line and metrics
    sent = dict(headers or {})
    if request_id:  # also in the answer to a mistake of ours, which is made outside of all middleware
        sent["X-Request-ID"] = str(request_id)
    if status == 401:
        sent.setdefault("WWW-Authenticate", "Bearer")
    return Response(
        problem.model_dump_json(exclude_none=True), status, headers=sent, media_type="application/problem+json"
    )


def install_problems(app: FastAPI) -> None:
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(DependencyDown, _down)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    log.info("request.refused", extra={"code": error.code, "reason": error.detail[:500]})
    refusals: Refusals = request.app.state.context.refusals  # the context's own module imports this one
    refusals.note(error.code, acting.get(), request.url.path)
    return problem_response(error.status, error.code, error.title, error.detail, request.url.path, error.headers)


async def _down(request: Request, error: Exception) -> Response:
    """Nothing that was acknowledged is lost, and every call may be sent again: clients do so by themselves."""
    assert isinstance(error, DependencyDown)
    log.warning("dependency.down", extra={"dependency": error.dependency, "reason": str(error)})
    known, headers = DOWN[error.dependency], {"Retry-After": str(ASK_AGAIN_S)}
    detail = f"{REMEDIES[error.dependency]}; send the request again in {ASK_AGAIN_S} s"
    return problem_response(known.status, known.code, known.title, detail, request.url.path, headers)


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    complaints = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()]
    more = len(complaints) - MAX_COMPLAINTS
    detail = "; ".join(complaints[:MAX_COMPLAINTS]) + (f"; and {more} more" if more > 0 else "")
    return problem_response(422, "request.malformed", "The request is malformed", detail, request.url.path)


async def _http(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown paths, wrong methods, bodies that are not JSON."""
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    code = f"http.{title.lower().replace(' ', '_').replace('-', '_')}"
    detail = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the framework names the methods of the first route with this path alone
        headers["Allow"] = ", ".join(sorted(request.app.state.methods_of(request.url.path)))
    return problem_response(error.status_code, code, title, detail, request.url.path, headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of ours. The server logs the traceback; the client learns only that trying again may help."""
    log.error("request.failed", exc_info=error, extra={"method": request.method, "path": request.url.path})
    detail = "the coordinator made a mistake; its log has the details, and the request may be sent again"
    return problem_response(500, "internal", "Internal error", detail, request.url.path)
