"""Column types that both databases share: UTC times, and wire models kept as JSON."""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import DateTime, Dialect, String, Text
from sqlalchemy.types import TypeDecorator

Identifier = String(64)
DigestText = String(64)
NameText = String(63)
StateText = String(16)
SHARED = 128  # models of one column that are kept parsed


class UtcTime(TypeDecorator[datetime]):
    """Aware UTC datetimes in and out; SQLite, which has no time zones, keeps them without."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Wire(TypeDecorator[Any]):
    """A pydantic type kept as JSON text, validated again when it is read."""

    impl = Text
    cache_ok = True

    def __init__(self, kept: Any, *, often: bool = False) -> None:
        """`often`: the same few texts are read with every request; a frozen model may then be shared."""
        super().__init__()
        self.kept = kept  # SQLAlchemy's cache key: one column type per kept type
        self._adapter: TypeAdapter[Any] = TypeAdapter(kept)
        self._read = lru_cache(SHARED)(self._adapter.validate_json) if often else self._adapter.validate_json

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> str | None:
        return None if value is None else self._adapter.dump_json(value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any | None:
        return None if value is None else self._read(value)
