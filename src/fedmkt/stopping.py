"""Ending a long-running program cleanly: one flag, set by SIGTERM or SIGINT, looked at between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """Raised between two steps because the program was asked to end."""


class StopFlag:
    """Set once, never cleared. `wait` is a sleep that ends early, fit for a client's `wait`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._interruptible = False

    def set(self) -> None:
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        if self._event.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep, or raise Stopped as soon as the flag is set."""
        if self._event.wait(seconds):
            raise Stopped

    def pause(self, seconds: float) -> bool:
        """Sleep, at most until the flag is set; says whether it is. For the loops that end quietly."""
        return self._event.wait(seconds)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around a call that may block for long and may be broken off anywhere: a signal raises Stopped inside it."""
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    def listen(self) -> None:
        """Set the flag on SIGTERM and SIGINT; a second signal ends the process at once. Main thread only."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.is_set:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.set()
            if self._interruptible:
                raise Stopped

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
