"""Trying again, ever more rarely, until something works: what keeps the agent from a crash loop."""

from collections.abc import Callable, Collection
from typing import TypeVar

from fedmkt.service import StateInUse
from fedmkt.stopping import StopFlag, Stopped
from fedmkt_client_agent.enrolment import NotEnrolled, OtherCoordinator, OtherFederation
from fedmkt_client_agent.states import State, state_of
from fedmkt_client_agent.status import Status
from fedmkt_client_agent.store import StateUnreadable

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
FATAL = (StateInUse, NotEnrolled, OtherCoordinator, OtherFederation, StateUnreadable)  # only other settings heal them

Answer = TypeVar("Answer")


def patiently(
    call: Callable[[], Answer], status: Status, stop: StopFlag, *, only: Collection[State] | None = None
) -> Answer:
    """Call until it works, however long that takes, and show meanwhile what is wrong and what to do about it.

    Raises Stopped, what is FATAL, and everything that means another state than `only`, where that is given.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except (Stopped, *FATAL):
            raise
        except Exception as error:
            if only is not None and state_of(error) not in only:
                raise
            status.trouble(error, pause_s)
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
