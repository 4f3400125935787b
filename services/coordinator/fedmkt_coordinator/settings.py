"""Everything that can be set, read once from FEDMKT_ variables (or a secrets folder) and passed down."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmkt.protocol import MAX_KNOWLEDGE_BYTES


class Settings(BaseSettings):
    """Defaults run everything on one machine out of `state_dir`: SQLite, an embedded Redis, a folder of artifacts."""

    model_config = SettingsConfigDict(env_prefix="FEDMKT_", frozen=True, extra="ignore")

    # FEDMKT_DATA_DIR already names the data sets of tests, so the coordinator's own folder has another name.
    state_dir: Path = Field(default=Path("fedmkt-state"), description="database, artifacts, credentials, Redis files")
    host: str = "127.0.0.1"
    port: int = Field(default=8700, ge=0, le=65535)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_style: Literal["json", "text"] = "json"

    database_url: SecretStr | None = Field(default=None, description="postgresql://...; SQLite in state_dir if unset")
    redis_url: SecretStr | None = Field(default=None, description="redis://...; an embedded redis-server if unset")
    worker_redis_url: SecretStr | None = Field(default=None, description="how LLM servers reach Redis, if otherwise")
    artifacts_url: str | None = Field(default=None, description="s3://bucket/prefix and the like; a folder if unset")

    operator_token: SecretStr | None = Field(default=None, min_length=32)
    viewer_token: SecretStr | None = Field(default=None, min_length=32)
    worker_token: SecretStr | None = Field(default=None, min_length=32)
    access_token_s: int = Field(default=600, ge=10, le=3600, description="life of a site's access token")
    enrolment_token_s: int = Field(default=7 * 86400, ge=60, le=90 * 86400)
    clock_skew_s: int = Field(default=60, ge=0, le=600, description="how wrong a site's clock may be")

    site_rate_per_s: float = Field(default=200.0, gt=0, description="requests of one site; ten seconds' worth at once")
    staff_rate_per_s: float = Field(default=2000.0, gt=0, description="the same of an operator's or worker's token")
    address_rate_per_s: float = Field(default=200.0, gt=0, description="the same of an address without any token")
    body_grace_s: float = Field(default=60.0, gt=0, description="how long the sending of a body may stall")
    header_timeout_s: float = Field(default=20.0, gt=0, description="how long the head of a request may take")

    lease_s: float = Field(default=30.0, gt=0, le=3600, description="a worker that is silent for longer loses its job")
    max_attempts: int = Field(default=3, ge=1, le=100)
    retry_delay_s: float = Field(default=2.0, ge=0, le=600, description="a failed job waits attempts times as long")
    metrics_open: bool = Field(default=False, description="/metrics without a token, behind a proxy that guards it")
    otel: bool = Field(default=False, description="OpenTelemetry spans; OTEL_ variables say where to")
    keeper_interval_s: float = Field(default=1.0, gt=0, le=60)
    poll_max_s: float = Field(default=60.0, gt=0, le=600, description="longest long poll")
    poll_recheck_s: float = Field(default=1.0, gt=0, le=60, description="how often a waiting request looks by itself")

    webhook_allow_private: bool = Field(default=False, description="webhooks may go to private and loopback addresses")
    webhook_patience_s: float = Field(
        default=5 * 86400, gt=0, description="a webhook that fails for longer is disabled"
    )

    max_upload_bytes: int = Field(default=MAX_KNOWLEDGE_BYTES, gt=0, le=MAX_KNOWLEDGE_BYTES)
    check_threads: int = Field(default=2, ge=1, le=64, description="uploads checked at the same time")


def read_settings(**given: Any) -> Settings:
    """What is given, else FEDMKT_ variables, else files named like them in the folder FEDMKT_SECRETS_DIR."""
    sources: dict[str, Any] = {"_secrets_dir": os.environ.get("FEDMKT_SECRETS_DIR")}
    return Settings(**sources, **given)
