"""Answers that a dashboard asks for again and again: an ETag over the body, 304 while it is the same."""

import hashlib

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response


def conditional(request: Request, view: BaseModel) -> Response:
    body = view.model_dump_json().encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def matches(if_none_match: str | None, etag: str) -> bool:
    """Weak comparison, as RFC 9110 wants it for If-None-Match."""
    if if_none_match is None:
        return False
    given = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return "*" in given or etag in given
