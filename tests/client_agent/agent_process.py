"""A real agent process whose every line is kept."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from live_coordinator import until


class AgentProcess:
    """`lines` is all it writes, standard output and standard error."""

    def __init__(self, options: dict[str, str], environment: dict[str, str]) -> None:
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedmkt_client_agent", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self.lines: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def said(self, event: str, **fields: str) -> bool:
        parsed = [json.loads(line) for line in list(self.lines) if line.startswith(b"{")]
        return any(
            line["event"] == event and all(str(line.get(name)) == value for name, value in fields.items())
            for line in parsed
        )

    def until_said(self, event: str, **fields: str) -> None:
        def holds() -> bool:
            assert self.process.poll() is None or self.said(event, **fields), b"".join(self.lines[-30:]).decode()
            return self.said(event, **fields)

        until(holds, 240)

    def ended(self, timeout_s: float = 60) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join(10)
        return status

    def close(self) -> None:
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended()


@contextmanager
def agent_process(options: dict[str, str], environment: dict[str, str]) -> Iterator[AgentProcess]:
    agent = AgentProcess(options, environment)
    try:
        yield agent
    finally:
        agent.process.kill()
        agent.process.wait()
        agent.close()
