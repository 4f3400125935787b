"""Checking the coordinator's audit log: every row follows the one before, and none is missing at the end.

A chain alone shows a change, a gap, another order, or a row put in between; only a head that was kept elsewhere shows
that the tail was cut off, or that the whole log was written anew by somebody who could compute digests.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedmkt.errors import Refusal
from fedmkt.protocol import FIRST_DIGEST, AuditEntry, AuditHead, audit_digest
from fedmkt.signing import BadSignature, verify

Model = TypeVar("Model", bound=BaseModel)


class AuditBroken(Refusal):
    status = 409
    code = "audit.broken"
    title = "The audit log was tampered with"
    remedy = (
        "Stop, keep a copy of the database, and compare the rows named with a backup: somebody wrote past the "
        "coordinator."
    )


class AuditUnreadable(Refusal):
    code = "audit.unreadable"
    title = "The file is not what it should be"
    remedy = "Give the file that `fedmkt audit export` or --save-head wrote, unchanged."


class HeadUntrusted(Refusal):
    status = 409
    code = "audit.head_untrusted"
    title = "The head of the audit log is not signed as it should be"
    remedy = (
        "Ask the operator whether the signing key was changed on purpose; if not, trust no row after the last good "
        "head."
    )


def check_chain(entries: Iterable[AuditEntry], heads: Iterable[AuditHead] = ()) -> tuple[int, str]:
    """Sequence and digest of the last row, if the rows are a whole log from row 1 and hold every head.

    Raises AuditBroken, which names the first row that is wrong. The heads' signatures are `check_head`'s business.
    """
    expected = {head.sequence: head for head in heads}
    sequence, digest = 0, FIRST_DIGEST
    for entry in entries:
        _check_next(entry, sequence, digest)
        sequence, digest = entry.sequence, entry.digest
        if sequence in expected and expected[sequence].digest != digest:
            raise AuditBroken(
                f"row {sequence} has digest {digest}, the head of {expected[sequence].at.isoformat()} says "
                f"{expected[sequence].digest}: row {sequence} or one before it was written anew"
            )
    longest = max(expected, default=0)
    if longest > sequence:
        raise AuditBroken(
            f"the log ends with row {sequence}, the head of {expected[longest].at.isoformat()} knows {longest} rows: "
            f"row {sequence + 1} and what follows was cut off"
        )
    return sequence, digest


def _check_next(entry: AuditEntry, sequence: int, digest: str) -> None:
    if entry.sequence != sequence + 1:
        raise AuditBroken(f"row {sequence + 1} is missing or displaced: row {sequence} is followed by {entry.sequence}")
    found = audit_digest(entry)
    if found != entry.digest:
        raise AuditBroken(
            f"row {entry.sequence} ({entry.action}, {entry.at.isoformat()}) was changed: its content has digest "
            f"{found}, {entry.digest} is recorded"
        )
    if entry.previous != digest:
        raise AuditBroken(
            f"row {entry.sequence} follows a row with digest {entry.previous}, row {sequence} has {digest}: "
            f"row {sequence} was replaced, or row {entry.sequence} put in"
        )


def check_head(head: AuditHead, public_keys: Iterable[str]) -> None:
    """Raise HeadUntrusted unless one of the coordinator's keys (hex) signed it."""
    known = list(public_keys)
    if head.public_key not in known:
        raise HeadUntrusted(
            f"the head of {head.at.isoformat()} names key {head.public_key[:16]}..., the coordinator has "
            f"{', '.join(f'{key[:16]}...' for key in known)}: was its signing key changed?"
        )
    try:
        verify(head.public_key, head.signature, head.signed_bytes())
    except BadSignature as error:
        raise HeadUntrusted(f"the head of row {head.sequence}: {error.detail}") from error


def read_head(path: Path) -> AuditHead:
    return _parsed(AuditHead, path.read_bytes(), str(path))


def read_export(path: Path) -> Iterator[AuditEntry]:
    """The rows of an exported log, one JSON object a line. Raises AuditUnreadable with the line's number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parsed(AuditEntry, line, f"{path}, line {number}")


def _parsed(model: type[Model], data: bytes, where: str) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AuditUnreadable(f"{where}: no {model.__name__}: {place + ': ' if place else ''}{first['msg']}") from error
