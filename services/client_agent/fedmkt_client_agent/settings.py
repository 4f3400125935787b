"""Everything that can be set, read once from FEDMKT_ variables or the command line and passed down."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmkt.privacy import PrivacyGoal
from fedmkt.private_formats import BadColumns, read_columns


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FEDMKT_", frozen=True, extra="ignore")

    coordinator_url: str = Field(description="e.g. https://fedmkt.example.org")
    enrolment_token: SecretStr | None = Field(default=None, description="one-time token, for the first start only")
    enrolment_token_file: Path | None = Field(default=None, description="a file that holds it")

    model: str = Field(description="folder or hub id of the site's model; safetensors, never remote code")
    model_revision: str | None = Field(default=None, description="pinned commit, for a hub id")
    device: str = "auto"
    dtype: str = "auto"
    gradient_checkpointing: bool = Field(default=False, description="less memory, a third more time")
    torch_threads: int = Field(default=1, ge=0, description="CPU threads of torch; 0 leaves torch's own choice")

    private_file: Path = Field(
        description="JSONL, CSV, Parquet, a folder of text files, or datasets:NAME; stays on this host"
    )
    private_columns: str = Field(default="", description="where names differ: prompt=question,completion=answer")
    private_holdout_share: float = Field(default=0.1, gt=0, le=0.5, description="kept from training, for the gate")

    privacy_epsilon: float | None = Field(
        default=None, gt=0, le=100, description="DP-SGD on private text, to this epsilon over all rounds; off if unset"
    )
    privacy_rounds: int | None = Field(default=None, gt=0, description="private trainings that it has to last for")
    privacy_delta: float | None = Field(default=None, gt=0, lt=1, description="samples^-1.1 if unset")
    privacy_max_grad_norm: float = Field(default=1.0, gt=0, description="longest gradient of one sample")

    policy_file: Path | None = Field(
        default=None, description="TOML: what this site allows; nothing is limited if unset"
    )
    state_dir: Path = Field(default=Path("fedmkt-agent"), description="key, progress, adapter and optimizer state")
    status_host: str = "127.0.0.1"
    status_port: int | None = Field(default=None, ge=0, le=65535, description="status pages; 0 chooses, none if unset")
    checkpoint_s: float = Field(default=300.0, gt=0, description="longest training that a kill can cost")
    poll_s: float = Field(default=30.0, ge=0, le=60, description="how long the coordinator may hold an answer back")
    otel: bool = Field(default=False, description="OpenTelemetry spans; OTEL_ variables say where to")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_style: Literal["json", "text"] = "json"

    @field_validator("private_columns")
    @classmethod
    def _columns(cls, given: str) -> str:
        try:
            read_columns(given)
        except BadColumns as error:
            raise ValueError(error.detail) from None
        return given

    @model_validator(mode="after")
    def _one_token(self) -> "Settings":
        if self.enrolment_token is not None and self.enrolment_token_file is not None:
            raise ValueError("give the enrolment token once: enrolment_token or enrolment_token_file")
        return self

    @model_validator(mode="after")
    def _whole_goal(self) -> "Settings":
        if (self.privacy_epsilon is None) != (self.privacy_rounds is None):
            raise ValueError("privacy_epsilon and privacy_rounds belong together: set both or neither")
        return self

    @property
    def privacy(self) -> PrivacyGoal | None:
        if self.privacy_epsilon is None or self.privacy_rounds is None:
            return None
        return PrivacyGoal(
            epsilon=self.privacy_epsilon,
            rounds=self.privacy_rounds,
            delta=self.privacy_delta,
            max_grad_norm=self.privacy_max_grad_norm,
        )

    def paths(self) -> dict[str, str]:
        """What names a place on this host -> what stands for it in logs."""
        named = {
            "(private text)": self.private_file,
            "(state folder)": self.state_dir,
            "(model)": Path(self.model) if Path(self.model).exists() else None,
            "(policy file)": self.policy_file,
            "(token file)": self.enrolment_token_file,
        }
        return {
            text: label
            for label, path in named.items()
            if path is not None
            for text in {str(path), str(path.absolute()), str(path.resolve())}
            if "/" in text or label == "(private text)"
        }

    def token(self) -> str | None:
        """The enrolment token, if one is given and its file is still there; an enrolled site needs none."""
        if self.enrolment_token is not None:
            return self.enrolment_token.get_secret_value()
        if self.enrolment_token_file is not None and self.enrolment_token_file.exists():
            return self.enrolment_token_file.read_text().strip()
        return None
