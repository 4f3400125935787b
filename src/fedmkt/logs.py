"""JSON logs: one line an event, the event's dotted name first, its fields beside it.

    log.info("upload.accepted", extra={"round_id": round_id, "size_bytes": size})

What a whole piece of work has in common (request, federation, round, site, job, trace) is bound once, and stands in
every line that is written meanwhile, in this task or thread and in those it starts:

    with binding(job_id=job.job_id, round_id=round_id):
        ...

A field named like an attribute of LogRecord is refused by `logging` itself. Nothing secret may be passed as a field;
what looks like a credential all the same is hidden, which is a net and no licence.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal, TextIO

Style = Literal["json", "text"]
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


_bound: ContextVar[Mapping[str, object]] = ContextVar("bound", default=MappingProxyType({}))

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(r"(?:^|_)(?:authorization|token|password|passphrase|secret|private_key|assertion)$")
_SECRET_TEXT = re.compile(
    r"(?<=bearer )[\w.~+/=-]{8,}"  # a header
    r"|(?<=://)[^/@\s\"]*:[^/@\s\"]+(?=@)"  # user and password in an address
    r"|eyJ[\w-]{4,}\.[\w-]{4,}\.[\w-]+",  # a signed token
    re.IGNORECASE,
)


def bound() -> Mapping[str, object]:
    """What stands in every line written here and now."""
    return _bound.get()


def bind(**fields: object) -> None:
    """Add fields for the rest of this task; None leaves a field as it is."""
    _bound.set({**_bound.get(), **{name: value for name, value in fields.items() if value is not None}})


def bind_anew(**fields: object) -> None:
    """These fields and no others, for the rest of this task: a request begins."""
    _bound.set(fields)


@contextmanager
def binding(**fields: object) -> Iterator[None]:
    """Add fields for the time of the block."""
    before = _bound.get()
    bind(**fields)
    try:
        yield
    finally:
        _bound.set(before)


def fields(record: logging.LogRecord) -> dict[str, object]:
    """What is bound, then what was passed as `extra`, in the order given."""
    given = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    both = {**_bound.get(), **given}
    return {key: HIDDEN if _SECRET_NAME.search(key) else value for key, value in both.items()}


_paths: dict[str, str] = {}


def hide_paths(paths: Mapping[str, str]) -> None:
    """From now on write the value wherever a key stands in a line. Called once, by the service's main."""
    _paths.clear()
    _paths.update(sorted(paths.items(), key=lambda pair: -len(pair[0])))  # a folder after what lies in it


def without_secrets(text: str) -> str:
    for path, label in _paths.items():
        text = text.replace(path, label)
    return _SECRET_TEXT.sub(HIDDEN, text)


class JsonFormatter(logging.Formatter):
    """at, level, service, logger, event, then the fields; a traceback under `traceback`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
            **fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, default=str, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """For eyes: `12:34:56 info  upload.accepted round_id=rnd_... size_bytes=1024`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        extra = "".join(f" {key}={value}" for key, value in fields(record).items())
        line = f"{at} {record.levelname.lower():<8}{record.getMessage()}{extra}"
        return without_secrets(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


def configure_logs(
    service: str, *, level: str = "INFO", style: Style = "json", stream: TextIO | None = None
) -> logging.Handler:
    """Send every log of this process to `stream` (standard error) in one form; returns the handler that does it.

    Called once, by the service's main. Run uvicorn with log_config=None so that its lines take the same way.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service) if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    return handler
