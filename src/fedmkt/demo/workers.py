"""Heavy functions in a few processes of their own, with progress, ending as soon as the caller does."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

POLL_S = 0.2
PR_SET_PDEATHSIG = 1  # prctl(2)
# Looked up here: between fork and exec, where a child asks for the signal, little is allowed.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

Progress = Callable[[int, int], None]  # done, total
Report = Callable[[str, int, int], None]  # name of the call, done, total


class Abandoned(Exception):
    """Raised inside a worker when nobody waits for its result any more."""


@dataclass(frozen=True)
class Call:
    """One call of a module-level function, whose first parameter is a `Progress`."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)


_channel: "tuple[Connection, Event] | None" = None  # set once in each worker process


def run_calls(calls: Mapping[str, Call], *, workers: int, on_progress: Report) -> dict[str, Any]:
    """Run every call, at most `workers` at a time in the given order; results by name.

    The first exception of a call is raised here after the others have been told to end.
    """
    context = multiprocessing.get_context("spawn")  # fork would copy a process that may hold threads and locks
    reader, writer = context.Pipe(duplex=False)
    abandoned = context.Event()
    futures: dict[Future[Any], str] = {}
    with (
        reader,
        writer,
        ProcessPoolExecutor(workers, context, initializer=_start, initargs=(writer, abandoned, os.getpid())) as pool,
    ):
        try:
            for name, call in calls.items():
                futures[pool.submit(_call, name, call.function, dict(call.arguments))] = name
            _follow(set(futures), reader, on_progress)
            return {name: future.result() for future, name in futures.items()}
        finally:
            abandoned.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _let_end(set(futures), reader)


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux; a no-op elsewhere)."""
    if _PRCTL is None:
        return
    _PRCTL(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _follow(pending: set[Future[Any]], reader: Connection, on_progress: Report) -> None:
    """Pass progress on until every future is done; raise the first failure."""
    while pending:
        finished, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
        while reader.poll():
            on_progress(*reader.recv())
        for future in finished:
            future.result()


def _let_end(pending: set[Future[Any]], reader: Connection) -> None:
    """Until every worker has noticed; one whose progress nobody reads would wait in its write for ever."""
    while pending:
        _, pending = wait(pending, timeout=POLL_S)
        while reader.poll():
            reader.recv()


def _start(writer: Connection, abandoned: Event, parent: int) -> None:
    global _channel
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    _channel = (writer, abandoned)


def _call(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    assert _channel is not None
    writer, abandoned = _channel

    def progress(done: int, total: int) -> None:
        if abandoned.is_set():
            raise Abandoned(name)
        writer.send((name, done, total))  # far below PIPE_BUF, so writes of several workers do not mix

    return function(progress, **arguments)
