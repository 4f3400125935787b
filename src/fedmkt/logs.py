"""JSON logs: one line an event, the event's dotted name first, its fields beside it.

    log.info("upload.accepted", extra={"round_id": round_id, "size_bytes": size})

A field named like an attribute of LogRecord is refused by `logging` itself. Nothing secret may be passed as a field;
no formatter can find that out afterwards.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

Style = Literal["json", "text"]
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def fields(record: logging.LogRecord) -> dict[str, object]:
    """What was passed as `extra`, in the order given."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


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
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For eyes: `12:34:56 info  upload.accepted round_id=rnd_... size_bytes=1024`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        extra = "".join(f" {key}={value}" for key, value in fields(record).items())
        line = f"{at} {record.levelname.lower():<8}{record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


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
