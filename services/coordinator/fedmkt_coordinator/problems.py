"""One place where refusals and failures become RFC 9457 problem documents."""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fedmkt.errors import Refusal
from fedmkt.protocol import Problem

log = logging.getLogger(__name__)

MAX_COMPLAINTS = 10  # validation errors quoted in one problem


def problem_response(
    status: int, code: str, title: str, detail: str, instance: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    problem = Problem(
        type=f"urn:fedmkt:problem:{code}", title=title, status=status, code=code, detail=detail, instance=instance
    )
    sent = dict(headers or {})
    if status == 401:
        sent.setdefault("WWW-Authenticate", "Bearer")
    return Response(
        problem.model_dump_json(exclude_none=True), status, headers=sent, media_type="application/problem+json"
    )


def install_problems(app: FastAPI) -> None:
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    log.info("request.refused", extra={"code": error.code, "method": request.method, "path": request.url.path})
    return problem_response(error.status, error.code, error.title, error.detail, request.url.path)


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
    return problem_response(error.status_code, code, title, detail, request.url.path, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of ours. The server logs the traceback; the client learns only that trying again may help."""
    log.error("request.failed", exc_info=error, extra={"method": request.method, "path": request.url.path})
    detail = "the coordinator made a mistake; its log has the details, and the request may be sent again"
    return problem_response(500, "internal", "Internal error", detail, request.url.path)
