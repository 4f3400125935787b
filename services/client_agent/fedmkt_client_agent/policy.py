"""What the site allows, whatever the federation's configuration says: one TOML file, read again whenever it changes.

    max_upload_bytes = 50_000_000       # of one upload
    max_total_bytes = 20_000_000_000    # of everything ever sent
    max_rounds = 100                    # rounds in which anything is sent
    max_top_k = 16                      # tokens a row of knowledge, at most
    round_logprobs_nats = 0.1           # a coarser scale; makes copying harder, guarantees nothing
    hours = "20:00-06:00"               # when work begins and anything of a round is sent or fetched
    time_zone = "Europe/Berlin"
    require_approval = true             # of every round, by `fedmkt agent approve`
    send_local_metrics = false          # losses on private text, number of private samples
    send_adapter = false                # weights, which federations that average adapters ask for

What is left out is not limited. A file that is named but cannot be read forbids everything.
"""

import re
import tomllib
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmkt_client_agent.withheld import Withheld

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
Limit = Annotated[int, Field(ge=0)]


class PolicyUnreadable(Withheld):
    code = "policy.unreadable"
    title = "The site's policy cannot be read"
    remedy = "Correct the policy file; docs/site-guide.md lists its keys. Nothing leaves the site until then."


class Policy(BaseModel):
    """The file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_upload_bytes: Limit | None = None
    max_total_bytes: Limit | None = None
    max_rounds: Limit | None = None
    max_top_k: int | None = Field(default=None, ge=1)
    round_logprobs_nats: float = Field(default=0.0, ge=0, le=10, allow_inf_nan=False)
    hours: str | None = None
    time_zone: str | None = None
    require_approval: bool = False
    send_local_metrics: bool = True
    send_adapter: bool = True

    @model_validator(mode="after")
    def _readable_hours(self) -> Self:
        if (self.hours is None) != (self.time_zone is None):
            raise ValueError("hours and time_zone belong together; set both or neither")
        if self.hours is not None and self.time_zone is not None:
            _span(self.hours)
            _zone(self.time_zone)
        return self

    def open_at(self, now: datetime) -> bool:
        """Whether `now` lies within the hours; the first minute does, the last does not. Equal ends: always."""
        if self.hours is None or self.time_zone is None:
            return True
        begins, ends = _span(self.hours)
        local = now.astimezone(_zone(self.time_zone)).time()
        return begins <= local < ends if begins < ends else local >= begins or local < ends


def _span(hours: str) -> tuple[time, time]:
    found = HOURS.fullmatch(hours)
    if found is None:
        raise ValueError(f"hours is {hours!r}, expected HH:MM-HH:MM, for example 20:00-06:00")
    first, second, third, fourth = map(int, found.groups())
    return time(first, second), time(third, fourth)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"time_zone is {name!r}, expected a name such as Europe/Berlin") from error


class PolicyFile:
    """The policy as the file has it now. No file named: nothing is limited."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._policy = Policy()

    @property
    def now(self) -> Policy:
        """Raises PolicyUnreadable, also when the file has gone."""
        if self.path is None:
            return self._policy
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp != self._stamp:
                self._policy = _parse(self.path.read_bytes())
                self._stamp = stamp
        except OSError as error:
            self._stamp = None
            raise PolicyUnreadable(f"the policy file cannot be read: {error.strerror}; nothing is sent") from error
        return self._policy


def _parse(content: bytes) -> Policy:
    try:
        return Policy.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PolicyUnreadable(
            f"the policy file is wrong: {where + ': ' if where else ''}{first['msg']}; nothing is sent"
        ) from None
    except ValueError as error:  # not TOML, not UTF-8
        raise PolicyUnreadable(f"the policy file is not TOML: {error}; nothing is sent") from None
