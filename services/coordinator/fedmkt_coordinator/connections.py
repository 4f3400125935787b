"""The head of a request, which uvicorn lets take for ever, and with some parsers grow for ever: here neither."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEAD_BYTES = 1 << 16


def with_bounded_heads(seconds: float, protocol: Any = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which breaks a connection off when a request's head takes longer than `seconds` or 64 KiB.

    The time runs from the connection's beginning, or from a later request's first byte, until the head is whole; how
    long a body may take is for `limits.Reading`, and how long an idle connection stays for uvicorn.
    """

    class Impatient(protocol):  # type: ignore[misc]  # which class it is depends on what is installed
        _cut: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._cut = asyncio.get_running_loop().call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
                self._disarm()
                return
            if self._cut is None:
                self._cut = asyncio.get_running_loop().call_later(seconds, self.transport.abort)
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _disarm(self) -> None:
            self._head_bytes = 0
            if self._cut is not None:
                self._cut.cancel()
                self._cut = None

    return Impatient
