"""Child processes that are watched: restarted when they die, ended cleanly when the demo ends, never left behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fedmkt.demo.workers import end_with_parent
from fedmkt.errors import Refusal

GRACE_S = 15.0  # from SIGTERM to SIGKILL
RESTART_PAUSE_S = 0.5
SHORT_LIFE_S = 30.0  # a process that ends sooner did not get anywhere
MAX_SHORT_LIVES = 4
TAIL_LINES = 5


class ServiceFailed(Refusal):
    code = "demo.service_failed"
    title = "A service of the demo ends again and again"


@dataclass
class Service:
    """One program with its log file. `restarts` counts how often it had to be started again."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _started_at: float = 0.0
    _short_lives: int = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def exit_status(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """In a session of its own, so that Ctrl-C in the terminal reaches the demo alone; ends when the demo ends."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own programs
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._started_at = time.monotonic()

    def revive(self) -> str | None:
        """Start it again if it has died; says so. Raises ServiceFailed when that has not helped several times."""
        status = self.exit_status
        if status is None:
            return None
        short = time.monotonic() - self._started_at < SHORT_LIFE_S
        self._short_lives = self._short_lives + 1 if short else 0
        if self._short_lives >= MAX_SHORT_LIVES:
            raise ServiceFailed(
                f"{self.name} ended {MAX_SHORT_LIVES} times within {SHORT_LIFE_S:g} s of its start, last with "
                f"{_status(status)}; see {self.log}, which ends with: {self.last_lines()}"
            )
        time.sleep(RESTART_PAUSE_S)
        self.start()
        self.restarts += 1
        return f"{self.name} ended with {_status(status)} and was started again"

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return " | ".join(lines[-TAIL_LINES:]) or "nothing"

    def send(self, number: signal.Signals) -> None:
        """To the process and everything it started."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(self._process.pid, number)

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None


@dataclass
class Household:
    """The demo's services in the order they were started. As a context manager, ends them all on the way out."""

    on_restart: Callable[[str], None]
    grace_s: float = GRACE_S
    services: list[Service] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def start(self, service: Service) -> Service:
        self.services.append(service)
        service.start()
        return service

    def check(self) -> None:
        """Start again whatever has died. Raises ServiceFailed."""
        for service in self.services:
            happened = service.revive()
            if happened is not None:
                self.on_restart(happened)

    def end(self) -> None:
        """SIGTERM to all but the first service, which the others talk to, then to that one; SIGKILL after the grace.

        A second Ctrl-C while this waits kills the rest at once.
        """
        try:
            for group in (self.services[1:], self.services[:1]):
                for service in group:
                    service.send(signal.SIGTERM)
                _await_ends(group, self.grace_s)
        finally:
            for service in self.services:
                service.send(signal.SIGKILL)
            _await_ends(self.services, self.grace_s)


def _await_ends(services: Sequence[Service], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not all(service.has_ended() for service in services) and time.monotonic() < deadline:
        time.sleep(0.05)


def _status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
