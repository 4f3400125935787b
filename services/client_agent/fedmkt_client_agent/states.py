"""The states that an agent can be in, what each asks of people, and which one an error means.

Every trouble is a state with a reason and a remedy, shown on the status pages and logged; the agent goes on trying,
ever more rarely, and goes on working when the cause has gone. What an unexpected exception says may quote private text
or a path, so only its kind and the places in the code are told.
"""

import errno
import re
import traceback
from collections.abc import Iterator
from typing import Literal

from fedmkt.answers import CoordinatorProblem
from fedmkt.errors import Refusal
from fedmkt.logs import without_secrets
from fedmkt.session import RETRIED

State = Literal[
    "starting",
    "waiting",
    "working",
    "finished",
    "stopped",
    "outside_hours",
    "awaiting_approval",
    "over_budget",
    "not_allowed",
    "policy_unreadable",
    "unreachable",
    "disk_full",
    "read_only",
    "enrolment_refused",
    "revoked",
    "protocol_mismatch",
    "clock_wrong",
    "private_text_refused",
    "model_refused",
    "failed",
]

TO_DO: dict[State, str] = {
    "outside_hours": "nothing: it goes on within the hours of the policy file",
    "awaiting_approval": "look at `fedmkt knowledge inspect --pending`, then `fedmkt agent approve`",
    "over_budget": "raise the limit in the policy file, or leave it: rounds go on without this site",
    "not_allowed": "change the policy file, or ask the operator for a federation that does not want this",
    "policy_unreadable": "mend the policy file that FEDMKT_POLICY_FILE names",
    "unreachable": "check the network, the proxy variables, the certificate, and the coordinator's address",
    "disk_full": "make room on the disk that holds the state folder",
    "read_only": "let the agent's user write into the state folder; look for a disk that was mounted read-only",
    "enrolment_refused": "ask the operator for a new enrolment token and put it into the token's file",
    "revoked": "ask the operator why; with a new enrolment token in the token's file the site joins again",
    "protocol_mismatch": "upgrade the older of the two, agent or coordinator",
    "clock_wrong": "set this machine's clock (NTP)",
    "private_text_refused": "run `fedmkt data check` on the private text",
    "model_refused": "mend the folder or name of the model",
    "failed": "look into the log; if it stays, tell the operator the reason",
}

CODES: dict[str, State] = {
    "coordinator.unreachable": "unreachable",
    "coordinator.unexpected_answer": "unreachable",
    "enrolment.refused": "enrolment_refused",
    "site.revoked": "revoked",
    "protocol.mismatch": "protocol_mismatch",
    "assertion.clock": "clock_wrong",
    "model.unusable": "model_refused",
    "policy.unreadable": "policy_unreadable",
    "policy.outside_hours": "outside_hours",
    "policy.not_approved": "awaiting_approval",
    "policy.over_budget": "over_budget",
    "policy.send_adapter": "not_allowed",
}
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # how safetensors reports what the system said
FRAMES = 12
DISK_STATES: frozenset[State] = frozenset({"disk_full", "read_only"})


def state_of(error: BaseException) -> State:
    """Which state an exception means, by its own code or by the errno of what caused it."""
    for each in _chain(error):
        if isinstance(each, Refusal):
            if each.code in CODES:
                return CODES[each.code]
            if isinstance(each, CoordinatorProblem) and each.status in RETRIED:
                return "unreachable"
            if each.code.startswith("private_set."):
                return "private_text_refused"
        number = _errno(each)
        if number in DISK_FULL:
            return "disk_full"
        if number in READ_ONLY:
            return "read_only"
    return "failed"


def reason_of(error: BaseException) -> str:
    """In words that may be shown and logged: a refusal's own, and of anything else no more than its kind."""
    if isinstance(error, Refusal):
        return f"{error.code}: {without_secrets(error.detail)}"
    number = _errno(error)
    return type(error).__name__ if number is None else f"{type(error).__name__} {errno.errorcode.get(number, number)}"


def frames_of(error: BaseException) -> list[str]:
    """Where it was raised, innermost last, without what it said: one text a frame, a cause's frames first."""
    lines: list[str] = []
    for each in reversed(list(_chain(error))):
        places = traceback.extract_tb(each.__traceback__)[-FRAMES:]
        lines += [f"{_module(place.filename)}:{place.lineno} {place.name}" for place in places]
        lines.append(type(each).__name__)
    return lines


def _module(filename: str) -> str:
    """The last two parts of a source file's path: where the code is installed is nobody's business."""
    return "/".join(filename.replace("\\", "/").split("/")[-2:])


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = RUST_ERRNO.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found.group(1)) if found else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, what caused it, and so on."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
