"""What every refusal in the project has in common.

A broken rule is a class beside the rule. It carries a stable `code` that programs can match, an HTTP `status`, a short
`title`, and a message with the numbers and the next step. The coordinator turns each into an RFC 9457 problem; the
command line prints the message and exits.
"""

from collections.abc import Mapping
from typing import ClassVar


class Refusal(Exception):
    """A request, file or setting that breaks a rule. Subclass it beside the rule; the message says what to do."""

    status: ClassVar[int] = 422
    code: ClassVar[str] = "refused"
    title: ClassVar[str] = "The request breaks a rule"
    remedy: ClassVar[str] = ""  # what to do, where the messages leave it open; for docs/troubleshooting.md
    headers: ClassVar[Mapping[str, str]] = {}  # that HTTP wants with the status

    @property
    def detail(self) -> str:
        return str(self)
