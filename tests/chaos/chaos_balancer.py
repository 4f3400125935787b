"""What stands before several replicas: every connection goes to the next one that accepts it."""

import contextlib
import socket
import threading
from collections.abc import Sequence
from itertools import count


class Balancer:
    """Bytes pass as they are; a replica that dies breaks the connections that it had."""

    def __init__(self, backends: Sequence[int]) -> None:
        self._backends = backends
        self._turn = count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.prefer: int | None = None  # as long as it accepts, it gets every new connection
        self.served = dict.fromkeys(backends, 0)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        turns = [self._backends[next(self._turn) % len(self._backends)] for _ in self._backends]
        for port in turns if self.prefer is None else (self.prefer, *turns):
            with contextlib.suppress(ConnectionRefusedError):
                backend = socket.create_connection(("127.0.0.1", port))
                self.served[port] += 1
                for pair in ((client, backend), (backend, client)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()
                return
        client.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    """One direction, until it ends; then both ends are told."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    target.close()
