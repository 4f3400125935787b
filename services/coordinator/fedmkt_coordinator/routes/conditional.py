"""Answers that a dashboard asks for again and again: 304 while nothing has changed, and cheap.

What a federation's events move carries a weak ETag made of their sequence (`polled`); `unchanged` compares it before
the request meets anything else. Small answers about something else carry a hash of their body (`conditional`).
"""

import hashlib
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fedmkt import __version__
from fedmkt_coordinator.context import Context
from fedmkt_coordinator.ids import secret_hash
from fedmkt_coordinator.security import NAME_DIGITS, READERS
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.store.versions import Failed, Subject

# A view may say for so long that a site was last seen earlier than it was: no event tells that.
FRESH_S = 15
CACHING = {"Cache-Control": "private, no-cache"}
# What is polled, and whose events move it.
POLLED = re.compile(
    r"^/v1/(?:federations(?:/(?P<federation>[^/]+)(?:/rounds|/adapters|/events)?)?|rounds/(?P<round>[^/]+))$"
)


async def polled(
    context: Context, request: Request, subject: Subject, key: str, view: Callable[[Transaction], Awaitable[BaseModel]]
) -> Response:
    """`view` made in one snapshot, under the ETag of that snapshot. It raises the refusal if there is no subject."""
    async with context.store.read() as tx:
        body = (await view(tx)).model_dump_json().encode()
        tag = _tag(await tx.version(subject, key), tx.now, request.scope["query_string"])
    return _answer(request, body, tag)


def conditional(request: Request, view: BaseModel) -> Response:
    body = view.model_dump_json().encode()
    return _answer(request, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _answer(request: Request, body: bytes, tag: str) -> Response:
    if matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers={"ETag": tag, **CACHING})
    return Response(body, media_type="application/json", headers={"ETag": tag, **CACHING})


def matches(if_none_match: str | None, etag: str) -> bool:
    """Weak comparison, as RFC 9110 wants it for If-None-Match."""
    if if_none_match is None:
        return False
    given = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return "*" in given or etag.removeprefix("W/") in given


def _tag(version: str, now: datetime, query: bytes) -> str:
    return f'W/"{__version__}.{version}.{int(now.timestamp()) // FRESH_S}.{zlib.crc32(query):08x}"'


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The answer to a poll that finds nothing new, and the template of the address that was polled."""

    tag: bytes
    route: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"etag", self.tag), (b"cache-control", CACHING["Cache-Control"].encode())]
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def unchanged(scope: Scope, headers: Mapping[bytes, bytes]) -> Unchanged | None:
    """Asked before the request meets anything else, and answered from one statement; None lets it go its way.

    It only ever says "not modified", and only to a token that may read. Whatever else is the matter with a request, or
    with the database, is found out and said by the route.
    """
    known, bearer = headers.get(b"if-none-match"), headers.get(b"authorization", b"")
    if known is None or bearer[:7].lower() != b"bearer ":
        return None
    found = POLLED.match(scope["path"])
    if found is None:
        return None
    context = scope["app"].state.context
    assert isinstance(context, Context)
    subject, key = _subject(found)
    try:
        token_hash = secret_hash(bearer[7:].decode("latin-1").strip())
        seen = await context.store.glance.look(token_hash, subject, key)
    except Failed:
        return None
    if seen.role not in READERS or seen.version is None or not context.rates.staff.grants(token_hash[:NAME_DIGITS]):
        return None
    tag = _tag(seen.version, context.clock(), scope["query_string"])
    if not matches(known.decode("latin-1"), tag):
        return None
    return Unchanged(tag.encode(), scope["path"].replace(key, f"{{{subject}_id}}") if key else scope["path"])


def _subject(found: re.Match[str]) -> tuple[Subject, str]:
    """What is polled, and its id."""
    if found["round"] is not None:
        return "round", found["round"]
    return ("federation", found["federation"]) if found["federation"] is not None else ("federations", "")
