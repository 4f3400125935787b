"""A coordinator process for which no name resolves but this machine's own: fuzzed webhooks must not reach anybody."""

import socket
from typing import Any

from fedmkt_coordinator.command import serve
from fedmkt_coordinator.settings import read_settings

_real = socket.getaddrinfo


def only_here(host: Any, *more: Any, **named: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in (None, "127.0.0.1", "::1", "localhost"):
        raise socket.gaierror(socket.EAI_NONAME, "no names in a fuzzed coordinator")
    return _real(host, *more, **named)


if __name__ == "__main__":
    socket.getaddrinfo = only_here
    serve(read_settings())
