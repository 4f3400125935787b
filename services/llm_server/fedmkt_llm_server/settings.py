"""Everything that can be set, read once from FEDMKT_ variables or the command line and passed down."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FEDMKT_", frozen=True, extra="ignore")

    coordinator_url: str = Field(description="e.g. https://fedmkt.example.org")
    worker_token: SecretStr | None = Field(default=None, description="the worker credential; or worker_token_file")
    worker_token_file: Path | None = Field(default=None, description="a file that holds it, read at the start")
    redis_url: SecretStr | None = Field(default=None, description="the queue; asked from the coordinator if unset")
    worker_name: str | None = Field(default=None, description="in the queue; made once for the state folder if unset")

    model: str = Field(description="folder or hub id of the LLM; safetensors, never remote code")
    model_revision: str | None = Field(default=None, description="pinned commit, for a hub id")
    device: str = "auto"
    dtype: str = "auto"
    quantize: Literal["4bit", "8bit"] | None = Field(
        default=None, description="4bit or 8bit base under the LoRA layers (bitsandbytes)"
    )
    shard: bool = Field(default=False, description="spread the base over the processes of `accelerate launch` (FSDP)")
    gradient_checkpointing: bool = Field(default=False, description="less memory, a third more time")
    torch_threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 leaves torch's own choice")

    checkpoint_s: float = Field(default=300.0, gt=0, description="longest training that a kill can cost")
    state_dir: Path = Field(default=Path("fedmkt-llm-server"), description="optimizer states, caches")
    status_host: str = "127.0.0.1"
    status_port: int | None = Field(default=None, ge=0, le=65535, description="status pages; 0 chooses, none if unset")
    registration_interval_s: float = Field(default=3.0, gt=0, description="how often new federations are looked for")
    otel: bool = Field(default=False, description="OpenTelemetry spans; OTEL_ variables say where to")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_style: Literal["json", "text"] = "json"

    @model_validator(mode="after")
    def _one_token(self) -> "Settings":
        if (self.worker_token is None) == (self.worker_token_file is None):
            raise ValueError("give the worker credential once: worker_token or worker_token_file")
        return self

    def token(self) -> str:
        """The worker credential, without white space around it."""
        if self.worker_token_file is not None:
            return self.worker_token_file.read_text().strip()
        assert self.worker_token is not None
        return self.worker_token.get_secret_value()
