"""Where time goes in a piece of work: seconds by part, each without the parts that are called from inside it."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Part = str | Callable[..., str]  # a name, or what gives one from the arguments of the call
Watched = tuple[object, str, Part]  # a module or class, the name of its function, the part that its time belongs to
REST = "other"


class Stopwatch:
    """`part` may be nested: what is inside takes its time from what is around it. One thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._since = clock()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def watching(self, watched: Sequence[Watched]) -> Iterator[None]:
        """Inside, every call of the watched functions is a part; all else is REST. Put back at the end."""
        found = [(owner, name, vars(owner)[name]) for owner, name, _ in watched]
        try:
            for (owner, name, function), (_, _, part) in zip(found, watched, strict=True):
                setattr(owner, name, self._timed(function, part))
            with self.part(REST):
                yield
        finally:
            for owner, name, function in found:
                setattr(owner, name, function)

    def _timed(self, function: Any, part: Part) -> Any:
        inner = function.__func__ if isinstance(function, staticmethod) else function

        @functools.wraps(inner)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*arguments)):
                return inner(*arguments, **options)

        return staticmethod(timed) if isinstance(function, staticmethod) else timed
