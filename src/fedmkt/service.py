"""What agent and LLM server share as programs: a folder of their own, logs, signals, exit status, status pages."""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmkt import fault_points
from fedmkt.errors import Refusal
from fedmkt.local_server import serve_in_thread
from fedmkt.logs import Style, configure_logs
from fedmkt.stopping import StopFlag, Stopped
from fedmkt.tracing import configure

log = logging.getLogger(__name__)


class StateInUse(Refusal):
    status = 409
    code = "state_dir.in_use"
    title = "Another process uses this state folder"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and keep every other process that asks out of it. Raises StateInUse."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateInUse(
                f"another process works in {folder.name}; stop it, or name another state folder"
            ) from error
        yield


def run_service(
    name: str, serve: Callable[[StopFlag], None], *, log_level: str, log_style: Style, otel: bool = False
) -> int:
    """Run `serve` until SIGTERM or SIGINT. Exit status: 0 stopped, 1 a Refusal that waiting would not heal."""
    configure_logs(name, level=log_level, style=log_style)
    end_tracing: Callable[[], None] | None = None
    stop = StopFlag()
    stop.listen()
    try:
        fault_points.arm(os.environ)
        end_tracing = configure(name) if otel else None
        serve(stop)
    except Stopped:
        pass
    except Refusal as error:
        log.error("service.cannot_go_on", extra={"code": error.code, "reason": error.detail})
        return 1
    finally:
        if end_tracing is not None:
            end_tracing()
    return 0


@contextmanager
def status_pages(app: Any, host: str, port: int | None, address_file: Path) -> Iterator[None]:
    """Serve the ASGI application `app` beside the block, unless `port` is None; 0 lets the system choose a port.

    Where it listens stands in `address_file`, as JSON, for as long as it does.
    """
    if port is None:
        yield
        return
    with serve_in_thread(app, host, port) as chosen:
        address = {"host": host, "port": chosen}
        address_file.parent.mkdir(parents=True, exist_ok=True)
        address_file.write_text(json.dumps(address))
        log.info("status.listening", extra=address)
        try:
            yield
        finally:
            address_file.unlink(missing_ok=True)
