"""A TCP proxy between client and coordinator: real sockets, lines that break on demand, every byte counted."""

import fcntl
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

READ_BYTES = 1 << 14
LINE_BUFFER_BYTES = 1 << 14  # small, so that little more than what the proxy has read is on its way
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST instead of FIN


@dataclass(frozen=True)
class Fault:
    """What happens to one connection once `up` bytes of the client, or `down` bytes for it, have passed."""

    how: Literal["cut", "reset", "stall", "half_open", "page"]
    up: int | None = None
    down: int | None = None
    seconds: float = 1e6  # of a stall; it goes on afterwards
    page: bytes = b""  # instead of an answer


CLEAN = Fault("cut")


@dataclass
class FaultProxy:
    """`plan` holds the faults of the next connections, first to last; those beyond it are left alone."""

    upstream: int
    rate_bytes_s: float | None = None
    plan: deque[Fault] = field(default_factory=deque)
    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0
    faults_done: int = 0
    recorded: list[bytearray] = field(default_factory=list)  # what each connection's client sent
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _open: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ---------------------------------------------------------------------------------------------- connections

    def accept(self, listener: socket.socket) -> None:
        while not self._ended.is_set():
            try:
                client, _ = listener.accept()
            except OSError:  # closed: the test has ended
                return
            with self._lock:
                fault = self.plan.popleft() if self.plan else CLEAN
                self.connections += 1
                recorded = bytearray()
                self.recorded.append(recorded)
            self.start(_Line(self, client, fault, recorded).run)

    def start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def keep(self, opened: socket.socket) -> None:
        with self._lock:
            self._open.append(opened)

    def count(self, *, up: int = 0, down: int = 0, fault: bool = False) -> None:
        with self._lock:
            self.up_bytes += up
            self.down_bytes += down
            self.faults_done += fault

    def pause(self, seconds: float) -> bool:
        """True when the test has ended meanwhile."""
        return self._ended.wait(seconds)

    def end(self) -> None:
        self._ended.set()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


class _Line:
    """One connection, both directions in one thread: a socket that another thread reads cannot be reset."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, fault: Fault, recorded: bytearray) -> None:
        self._proxy, self._client, self._fault, self._recorded = proxy, client, fault, recorded
        self._left = {"up": fault.up, "down": fault.down}  # bytes until the fault; None: it never comes
        proxy.keep(client)

    def run(self) -> None:
        with self._client, suppress(OSError):
            if self._fault.how == "page":
                self._answer_page()
                return
            with socket.create_connection(("127.0.0.1", self._proxy.upstream), 5) as server:
                server.settimeout(None)
                for each in (self._client, server):  # what the proxy has counted shall not wait in it
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._proxy.keep(server)
                self._carry(server)

    def _answer_page(self) -> None:
        self._proxy.count(up=len(self._client.recv(READ_BYTES)), fault=True)
        self._client.sendall(self._fault.page)
        self._client.shutdown(socket.SHUT_WR)
        while self._client.recv(READ_BYTES):
            pass

    def _carry(self, server: socket.socket) -> None:
        ways = {self._client: ("up", server), server: ("down", self._client)}
        while ways:
            for source in select.select(list(ways), [], [])[0]:
                way, target = ways[source]
                left = self._left[way]
                data = source.recv(READ_BYTES if left is None else min(READ_BYTES, left))
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    del ways[source]
                    continue
                self._pass_on(way, data, target)
                if left is not None:
                    self._left[way] = left - len(data)
                    if self._left[way] == 0 and self._fail(server):
                        return

    def _pass_on(self, way: str, data: bytes, target: socket.socket) -> None:
        self._proxy.count(**{way: len(data)})
        if way == "up":
            self._recorded += data
        rate = self._proxy.rate_bytes_s
        step = len(data) if rate is None else max(1, int(rate / 20))
        for at in range(0, len(data), step):
            target.sendall(data[at : at + step])
            if rate is not None:
                self._proxy.pause(step / rate)

    def _fail(self, server: socket.socket) -> bool:
        """Whether the line is at its end."""
        self._left = {"up": None, "down": None}
        self._proxy.count(fault=True)
        match self._fault.how:
            case "reset":
                for each in (self._client, server):
                    _drain(each)
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            case "stall":
                return self._proxy.pause(self._fault.seconds)
            case "half_open":  # nothing passes any more, and neither side learns of it
                self._proxy.pause(1e6)
        return True


def _drain(sender: socket.socket) -> None:
    """Until the other side's system has what was sent: the line breaks behind these bytes, not before them."""
    ends = time.monotonic() + 5
    while struct.unpack("i", fcntl.ioctl(sender, termios.TIOCOUTQ, bytes(4)))[0] and time.monotonic() < ends:
        time.sleep(0.001)


@contextmanager
def proxied(upstream: int, *plan: Fault, rate_bytes_s: float | None = None) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream, rate_bytes_s, deque(plan))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LINE_BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        proxy.port = listener.getsockname()[1]
        proxy.start(lambda: proxy.accept(listener))
        try:
            yield proxy
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            proxy.end()


def replay(port: int, recorded: bytes) -> bytes:
    """Deliver a recorded connection once more, as a line that duplicates would; the beginning of what is answered."""
    with socket.create_connection(("127.0.0.1", port), 30) as again:
        again.sendall(recorded)
        return again.recv(READ_BYTES)
