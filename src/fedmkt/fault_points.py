"""Places where a test may end or halt a service, to prove that nothing is lost there.

    FEDMKT_FAULT_POINT="kill job.distill.done.committed 1"   the first time it gets there, the process kills itself
    FEDMKT_FAULT_POINT="stop round.applying.committed 2"     the second time, it halts (SIGSTOP) until it is continued

The variable is read once, when a service starts; nothing that comes over a network can arm a point. Unarmed, which is
always but in a test, `reach` is one comparison.
"""

import ipaddress
import logging
import os
import signal
import threading
from collections.abc import Mapping

from fedmkt.errors import Refusal

log = logging.getLogger(__name__)

VARIABLE = "FEDMKT_FAULT_POINT"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class FaultPointRefused(Refusal):
    code = "fault_point.refused"
    title = "The fault point cannot be armed"


class Fault:
    """What happens the `time`-th time that `point` is reached; once."""

    def __init__(self, action: str, point: str, time: int) -> None:
        self._signal = SIGNALS[action]
        self._point = point
        self._left = time
        self._lock = threading.Lock()

    def reach(self, point: str) -> None:
        if point != self._point:
            return
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now:
            os.kill(os.getpid(), self._signal)


_armed: Fault | None = None  # one a process, as the variable is


def arm(environment: Mapping[str, str], listens_at: str | None = None) -> None:
    """Read the variable, say loudly what it will do. Raises FaultPointRefused when it does not read.

    `listens_at`: the service's own address. One that others can reach runs with no fault point.
    """
    global _armed
    _armed = None
    given = environment.get(VARIABLE, "")
    if not given:
        return
    action, _, rest = given.partition(" ")
    point, _, time = rest.rpartition(" ")
    if action not in SIGNALS or not point or not time.isdecimal() or int(time) < 1:
        raise FaultPointRefused(f"{VARIABLE} is '{given}', expected '<kill or stop> <point> <n-th time>'; unset it")
    if listens_at is not None and not _is_loopback(listens_at):
        raise FaultPointRefused(
            f"{VARIABLE} is set and this service listens at {listens_at}; unset it: it is for tests"
        )
    _armed = Fault(action, point, int(time))
    log.critical("fault_point.armed", extra={"action": action, "point": point, "time": int(time)})


def is_armed() -> bool:
    """Whether anything may happen at all: for callers that would first have to make the point's name."""
    return _armed is not None


def reach(point: str) -> None:
    """The program is at `point`."""
    if _armed is not None:
        _armed.reach(point)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: it may lead anywhere
        return False
