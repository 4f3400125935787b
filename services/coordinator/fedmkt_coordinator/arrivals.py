"""Bodies that come over bad lines: what arrived before a line broke is kept, and the sender goes on from there.

A body is known by a key (an upload's chunk, an artifact's digest). Its bytes may come in several requests, each saying
with Content-Range which of them it carries; whatever a broken request brought counts as well. What is kept lies as
objects `incoming/<key>/<first byte>-<byte after the last>`, never with a gap or twice, and is swept by its age if the
sender never comes back. Nothing of it is believed: the whole is checked against its digest when all of it is there.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmkt.errors import Refusal
from fedmkt_coordinator.objects import Objects

MIN_KEPT_BYTES = 1024  # what a broken request brought beyond the bytes already there; less is not worth an object
IDLE_S = 5.0  # a sender that is silent for so long may have given up on the line: what it sent is kept meanwhile
SETTLED_S = 2.0  # longest wait of an answer for requests that broke before
HELD_MESSAGES = 4  # of up to 256 KiB each
CONTENT_RANGE = re.compile(r"^bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})$")


class BadContentRange(Refusal):
    code = "body.content_range"
    title = "The Content-Range does not fit"


class LineBroke(Refusal):
    status = 408
    code = "body.incomplete"
    title = "The body did not arrive whole"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes start to stop - 1 of a body of `total` bytes; empty in a question of how many are there."""

    start: int
    stop: int
    total: int
    declared: bool = True

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, self.total)


def read_span(header: str | None, total: int) -> Span:
    """What a request carries of a body that has `total` bytes; all of it without the header."""
    if header is None:
        return Span(0, total, total, declared=False)
    span = read_range(header)
    if span.total != total:
        raise BadContentRange(f"Content-Range {header.strip()!r} for a body of {total} bytes; announce another one")
    return span


def read_range(header: str) -> Span:
    found = CONTENT_RANGE.match(header.strip())
    if found is None:
        raise BadContentRange(
            f"Content-Range {header[:100]!r}; write 'bytes FIRST-LAST/TOTAL', or 'bytes */TOTAL' to ask"
        )
    first, last, said = found.groups()
    span = Span(0, 0, int(said)) if first is None else Span(int(first), int(last) + 1, int(said))
    if span.stop > span.total or (first is not None and span.start >= span.stop):
        raise BadContentRange(f"Content-Range {header.strip()!r} ends before it begins, or beyond the body")
    if 0 < span.stop - span.start < MIN_KEPT_BYTES and span.stop < span.total:
        raise BadContentRange(f"{span.stop - span.start} bytes; at least {MIN_KEPT_BYTES}, but for the last ones")
    return span


Pieces = Sequence[bytes]  # bytes as they came, one after the other: hashed and written so, and never copied together


@dataclass(slots=True)
class _Coming:
    """One request's bytes, while it goes on. `heard_at` is the loop's time when some came last."""

    span: Span
    heard_at: float
    pieces: list[bytes] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


class Arrivals:
    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects = objects
        self._folder = folder
        self._coming: dict[str, list[_Coming]] = {}

    async def there(self, key: str) -> int:
        """Bytes of this body that have arrived, counted from its first."""
        return contiguous(await self._spans(key))

    async def all_there(self, prefix: str) -> dict[str, int]:
        """The same of every body whose key is `prefix`, a slash and a name: by that name."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for path in await self._paths(prefix):
            name, _, span = path.removeprefix(f"{self._folder}/{prefix}/").partition("/")
            spans.setdefault(name, []).append(_span(span))
        return {name: contiguous(each) for name, each in spans.items()}

    async def receive(self, key: str, span: Span, request: Request) -> Pieces:
        """The bytes of the span. Whatever breaks the reading, those that came are kept; LineBroke if the line did."""
        coming = _Coming(span, asyncio.get_running_loop().time())
        self._coming.setdefault(key, []).append(coming)
        listening = asyncio.create_task(self._keep_when_silent(key, coming))
        try:
            await _read(request, coming)
            return _checked(coming)
        except ClientDisconnect as error:
            await self.keep(key, span, coming.data)
            raise LineBroke(
                f"{coming.size_bytes} of {span.stop - span.start} bytes came; ask how many are there with "
                f"'Content-Range: bytes */{span.total}', and go on from that one"
            ) from error
        except Refusal:
            raise
        except Exception:  # raised by what bounds the reading
            await self.keep(key, span, coming.data)
            raise
        finally:
            self._coming[key].remove(coming)
            if not self._coming[key]:
                del self._coming[key]
            if not listening.cancel():
                await listening  # it ends by itself only where the store fails: raises what that raised

    async def _keep_when_silent(self, key: str, coming: _Coming) -> None:
        """A task of its own, one a request: the waiting for the next bytes is never broken off.

        Whatever bounds that waiting (`limits.Gate`) counts on one long wait.
        """
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(coming.heard_at + IDLE_S - clock())
            if clock() - coming.heard_at >= IDLE_S:
                await self.keep(key, coming.span, coming.data)
                coming.heard_at = clock()

    async def settle(self, prefix: str) -> None:
        """Keep what requests of this process are just receiving: who asks, or sends anew, has given up on them."""
        for key, receiving in list(self._coming.items()):
            if key == prefix or key.startswith(f"{prefix}/"):
                for coming in list(receiving):
                    await self.keep(key, coming.span, coming.data)

    async def keep(self, key: str, span: Span, data: bytes) -> None:
        """Keep what goes beyond the bytes that are there; what would leave a gap is not kept."""
        have = await self.there(key)
        new = data[have - span.start :] if span.start <= have else b""
        if len(new) >= MIN_KEPT_BYTES or (new and span.start + len(data) == span.stop):
            path = f"{self._folder}/{key}/{have:012d}-{have + len(new):012d}"
            await self._objects.put(path, new)

    async def stream(self, key: str, stop: int) -> AsyncIterator[bytes]:
        """Bytes 0 to stop - 1, which must be there."""
        at = 0
        for start, end in sorted(await self._spans(key)):
            if at >= stop:
                return
            if end <= at:
                continue
            found = await self._objects.get(f"{self._folder}/{key}/{start:012d}-{end:012d}")
            piece = found[at - start : stop - start]
            yield piece
            at += len(piece)

    async def drop(self, key: str) -> None:
        """Forget a body, or every body below a prefix."""
        for path in await self._paths(key):
            await self._objects.delete(path)

    async def _spans(self, key: str) -> list[tuple[int, int]]:
        return [_span(path.rpartition("/")[2]) for path in await self._paths(key)]

    async def _paths(self, key: str) -> list[str]:
        return await self._objects.paths(f"{self._folder}/{key}/")


class ReadAhead:
    """ASGI middleware: reads a body that may come in parts as it arrives, before anybody asks for it.

    A server drops what it has read and not handed over when the line breaks: all of it, while we still look up whose
    token it is. A few messages are held at most; beyond that the sender waits, as it would without this. Who asks how
    much has come is answered once the requests that broke before have kept theirs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._broken: dict[str, set[asyncio.Event]] = {}  # by address: requests whose line broke, until they end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (span := dict(scope["headers"]).get(b"content-range")) is None:
            await self._app(scope, receive, send)
            return
        if b"*" in span:
            await self._settled(scope["path"])
        held: asyncio.Queue[Message] = asyncio.Queue(HELD_MESSAGES)
        ended = asyncio.Event()
        reading = asyncio.create_task(self._read(scope["path"], receive, held, ended))
        try:
            await self._app(scope, held.get, send)
        finally:
            reading.cancel()
            ended.set()

    async def _read(self, path: str, receive: Receive, held: "asyncio.Queue[Message]", ended: asyncio.Event) -> None:
        whole = False
        while True:
            message = await receive()
            if message["type"] == "http.disconnect" and not whole:
                self._broken.setdefault(path, set()).add(ended)
                asyncio.get_running_loop().call_later(SETTLED_S, self._forget, path, ended)
            whole = whole or not message.get("more_body", False)
            await held.put(message)
            if message["type"] == "http.disconnect":
                return

    async def _settled(self, path: str) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLED_S):
                for broken in list(self._broken.get(path, ())):
                    await broken.wait()

    def _forget(self, path: str, ended: asyncio.Event) -> None:
        self._broken[path].discard(ended)
        if not self._broken[path]:
            del self._broken[path]


def contiguous(spans: Iterable[tuple[int, int]]) -> int:
    """How far (start, stop) pairs reach from 0 without a gap."""
    reached = 0
    for start, stop in sorted(spans):
        if start > reached:
            break
        reached = max(reached, stop)
    return reached


def _span(name: str) -> tuple[int, int]:
    start, _, stop = name.partition("-")
    return int(start), int(stop)


def _checked(coming: _Coming) -> Pieces:
    """As many bytes as the request announced; without a Content-Range it announced none."""
    expected = coming.span.stop - coming.span.start
    if coming.span.declared and coming.size_bytes != expected:
        raise BadContentRange(f"{coming.size_bytes} bytes came, {expected} were announced")
    return coming.pieces


async def _read(request: Request, into: _Coming) -> None:
    """The body as it comes. Raises ClientDisconnect."""
    clock = asyncio.get_running_loop().time
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        into.heard_at = clock()
        if piece := message.get("body", b""):
            into.pieces.append(piece)
            into.size_bytes += len(piece)
        if not message.get("more_body"):
            return
