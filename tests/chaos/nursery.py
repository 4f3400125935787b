"""Services as real processes that start in a tenth of a second: forked from one process that has imported everything.

`Nursery` is the test's end. The other end runs as `python nursery.py module...`, imports the modules, and forks a child
for every line it reads. A child runs the same entry point as `python -m` would, has a log file of its own, and ends
when the nursery ends, which ends when the test does.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

POLL_S = 0.01
PR_SET_PDEATHSIG = 1  # prctl(2)


class Nursery:
    """As a context: every child that is left at the end is killed."""

    def __init__(self, *modules: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(self, entry: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> "Child":
        """`entry` is 'module:function'; the function is called with the arguments, or is a typer application."""
        about = {"entry": entry, "arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        return Child(self, int(self.ask({"start": about})))

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the nursery has ended"
        return json.loads(answer)


class Child:
    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process is there."""
        if self._status is None:
            self._status = self._nursery.ask({"poll": self.pid})
        return self._status

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = 30) -> int:
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} has not ended within {timeout_s:g} s"
            time.sleep(POLL_S)
        return status

    @property
    def is_halted(self) -> bool:
        """Whether SIGSTOP holds it."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"


# ------------------------------------------------------------------------------------------------ the other end


def _serve(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _become(request["start"])
            children.add(pid)
            answer: Any = pid
        else:
            answer = _status(request["poll"], children)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _status(pid: int, children: set[int]) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    if found == 0:
        return None
    children.discard(pid)
    return os.waitstatus_to_exitcode(status)


def _become(about: Mapping[str, Any]) -> None:
    """In the child: never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        log = os.open(about["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for handle, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(handle, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        os.environ.update(about["environment"])
        module, _, name = about["entry"].partition(":")
        getattr(importlib.import_module(module), name)(about["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the top of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
