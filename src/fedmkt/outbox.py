"""What a site's agent is about to send for a round, as files: byte for byte, and there before anything leaves.

    outbox/about.json   whose round this is, and size and digest of each file
    outbox/knowledge    the blob                outbox/adapter     safetensors, where adapters are averaged
    outbox/report       JSON                    approved.json      beside the folder: what people have approved

People look at it with `fedmkt knowledge inspect --pending` and approve it with `fedmkt agent approve`.
"""

import hashlib
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmkt.durable import write_atomically
from fedmkt.errors import Refusal

Item = Literal["knowledge", "adapter", "report"]


class NothingPending(Refusal):
    status = 404
    code = "outbox.empty"
    title = "Nothing waits to be sent"
    remedy = "Wait until a round begins, or check --state-dir."


class Pending(BaseModel):
    """One file of the outbox. `made_with`: the settings that it was made with; other ones make another file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    digest: str
    made_with: str = ""


class About(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    round_id: str
    round_number: int
    items: dict[Item, Pending] = {}


class Approval(BaseModel):
    """A person's consent to one round: to these knowledge and adapter bytes, and to the report that follows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round_id: str
    round_number: int
    digests: tuple[str, ...]
    at: datetime


class Outbox:
    """In the agent's state folder. The agent writes the outbox, whoever approves writes approved.json."""

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "outbox"
        self.approval_file = state_dir / "approved.json"
        self._about_file = self.folder / "about.json"

    def begin(self, round_id: str, round_number: int) -> About:
        """What is there of this round; another round's files go."""
        about = self.about()
        if about is None or about.round_id != round_id:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            about = About(round_id=round_id, round_number=round_number)
            self._write(about)
        return about

    def about(self) -> About | None:
        """None when there is no outbox, or one that a crash has left half written."""
        try:
            return About.model_validate_json(self._about_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def put(self, about: About, item: Item, data: bytes, made_with: str = "") -> About:
        """Keep these bytes, ready to be looked at; the same bytes again change nothing."""
        pending = Pending(bytes=len(data), digest=hashlib.sha256(data).hexdigest(), made_with=made_with)
        if about.items.get(item) != pending:
            write_atomically(self.folder / item, data)
            about = about.model_copy(update={"items": {**about.items, item: pending}})
            self._write(about)
        return about

    def take(self, about: About, item: Item, made_with: str = "") -> bytes | None:
        """The bytes as they were put; None when there are none, made with these settings, that are still whole."""
        pending = about.items.get(item)
        if pending is None or pending.made_with != made_with:
            return None
        try:
            data = (self.folder / item).read_bytes()
        except FileNotFoundError:
            return None
        return data if hashlib.sha256(data).hexdigest() == pending.digest else None

    def read(self, item: Item) -> bytes:
        """For people: what would be sent."""
        return (self.folder / item).read_bytes()

    # ------------------------------------------------------------------------------------------ consent

    def pending(self) -> About:
        """Raises NothingPending when no round has anything to send."""
        about = self.about()
        if about is None or not about.items:
            raise NothingPending(
                f"nothing waits in {self.folder.parent.name}: the agent makes knowledge when a round begins"
            )
        return about

    def approve(self, about: About) -> Approval:
        """Consent to what is there now. Files that are made anew, with other settings, need it again."""
        digests = tuple(pending.digest for _, pending in sorted(about.items.items()))
        approval = Approval(
            round_id=about.round_id, round_number=about.round_number, digests=digests, at=datetime.now(UTC)
        )
        write_atomically(self.approval_file, approval.model_dump_json(indent=1).encode())
        return approval

    def approval(self) -> Approval | None:
        """The last one given; None when there is none that reads."""
        try:
            return Approval.model_validate_json(self.approval_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def approved(self, about: About) -> bool:
        """Whether the last approval covers this round's files as they are now; the report needs none of its own."""
        approval = self.approval()
        files = {pending.digest for item, pending in about.items.items() if item != "report"}
        return approval is not None and approval.round_id == about.round_id and files <= set(approval.digests)

    def _write(self, about: About) -> None:
        write_atomically(self._about_file, about.model_dump_json(indent=1).encode())
