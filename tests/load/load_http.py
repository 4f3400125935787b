"""A light HTTP/1.1 client for load: one kept-alive connection a caller, requests written as bytes, answers parsed once.

httpx costs a millisecond of processor time a request, which would measure the client. This one costs a tenth of it.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[bytes, bytes]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def etag(self) -> str:
        return self.headers[b"etag"].decode()


class ConnectionLost(Exception):
    """The server closed the connection in the middle of an exchange."""


class Connection:
    """One connection, opened when first used and again when the server closed it between two requests."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._host, self._port = parts.hostname, parts.port
        self.token = token
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    def head(self, method: str, path: str, length: int | None, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}:{self._port}"]
        if self.token is not None:
            lines.append(f"Authorization: Bearer {self.token}")
        if length is not None:
            lines.append(f"Content-Length: {length}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        given = dict(headers or {})
        if body is not None and body.startswith(b"{"):
            given.setdefault("Content-Type", "application/json")
        if body is None and method in ("POST", "PUT"):
            body = b""
        return await self.exchange(self.head(method, path, None if body is None else len(body), given), body)

    async def exchange(self, head: bytes, body: bytes | None = None) -> Answer:
        """One request as bytes, one answer. A connection that the server has closed while it lay idle is replaced."""
        reused = self._reader is not None and not self._reader.at_eof()
        try:
            return await self._once(head, body)
        except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError) as error:
            if not reused or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                raise ConnectionLost(f"in the middle of an exchange: {error!r}") from error
        await self.close()
        return await self._once(head, body)

    async def _once(self, head: bytes, body: bytes | None) -> Answer:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            await self._open()
        assert self._reader is not None
        assert self._writer is not None
        self._writer.writelines([head, body or b""])
        await self._writer.drain()
        return await self._answer(self._reader)

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].split(b"\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        status = int(first.split(b" ", 2)[1])
        if headers.get(b"transfer-encoding") == b"chunked":
            body = await _chunked(reader)
        else:
            length = int(headers.get(b"content-length", b"0"))
            body = await reader.readexactly(length) if length and status not in (204, 304) else b""
        if headers.get(b"connection") == b"close":
            await self.close()
        return Answer(status, headers, body)

    async def _open(self) -> None:
        await self.close()
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)

    async def close(self) -> None:
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()


async def _chunked(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        body += await reader.readexactly(size)
        await reader.readexactly(2)
        if size == 0:
            return bytes(body)
