"""A small ASGI app beside a program's real work: the status pages of the agent and of the LLM server.

Imports uvicorn, so only services that have it import this module.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0


class LocalServerFailed(RuntimeError):
    """The server ended before it listened; the log says why."""


@contextmanager
def serve_in_thread(app: Any, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Serve the ASGI application `app` until the block ends; yields the port, chosen by the system when `port` is 0.

    Signals stay with the caller: uvicorn installs no handlers outside the main thread. OSError when the port is taken.
    """
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=3
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_run, args=(server, listener), name="local-server", daemon=True)
    thread.start()
    try:
        _await_start(server, thread)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        server.run([listener])
    except (Exception, SystemExit):  # the top of a thread; uvicorn leaves by SystemExit when it cannot start
        log.exception("local_server.failed")


def _await_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise LocalServerFailed(f"the local server did not listen within {START_TIMEOUT_S:g} s")
        time.sleep(0.01)
