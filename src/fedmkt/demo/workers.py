"""Heavy functions in a few processes of their own, with progress, ending as soon as the caller does."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty
from typing import Any

POLL_S = 0.2
PR_SET_PDEATHSIG = 1  # prctl(2)

Progress = Callable[[int, int], None]  # done, total


class Abandoned(Exception):
    """Raised inside a worker when nobody waits for its result any more."""


@dataclass(frozen=True)
class Call:
    """One call of a module-level function, whose first parameter is a `Progress`."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)


_channel: "tuple[Queue[tuple[str, int, int]], Event] | None" = None  # set once in each worker process


def run_calls(
    calls: Mapping[str, Call], *, workers: int, on_progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run every call, at most `workers` at a time in the given order; results by name.

    The first exception of a call is raised here after the others have been told to end.
    """
    context = multiprocessing.get_context("spawn")  # fork would copy a process that may hold threads and locks
    queue: Queue[tuple[str, int, int]] = context.Queue()
    abandoned = context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(queue, abandoned, os.getpid())) as pool:
        try:
            futures = {
                pool.submit(_call, name, call.function, dict(call.arguments)): name for name, call in calls.items()
            }
            _follow(set(futures), queue, on_progress)
            return {name: future.result() for future, name in futures.items()}
        finally:
            abandoned.set()
            pool.shutdown(wait=True, cancel_futures=True)
            queue.cancel_join_thread()


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux; a no-op elsewhere)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _follow(
    pending: set[Future[Any]],
    queue: "Queue[tuple[str, int, int]]",
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Pass progress on until every future is done; raise the first failure."""
    while pending:
        finished, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
        _drain(queue, on_progress)
        for future in finished:
            future.result()


def _drain(queue: "Queue[tuple[str, int, int]]", on_progress: Callable[[str, int, int], None]) -> None:
    while True:
        try:
            on_progress(*queue.get_nowait())
        except Empty:
            return


def _start(queue: "Queue[tuple[str, int, int]]", abandoned: Event, parent: int) -> None:
    global _channel
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    _channel = (queue, abandoned)


def _call(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    assert _channel is not None
    queue, abandoned = _channel

    def progress(done: int, total: int) -> None:
        if abandoned.is_set():
            raise Abandoned(name)
        queue.put((name, done, total))

    return function(progress, **arguments)
