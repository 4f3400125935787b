"""Operator's, viewer's and worker's tokens: from settings, or made at the first start and kept in a private file."""

import json
import os
import secrets
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from fedmkt_coordinator.ids import new_secret, secret_hash
from fedmkt_coordinator.settings import Settings
from fedmkt_coordinator.store import Store, Transaction

StaffRole = Literal["operator", "viewer", "worker"]
STAFF: tuple[StaffRole, ...] = get_args(StaffRole)
FILE = "credentials.json"
FROM_SETTINGS = "settings"


class CredentialsFile(BaseModel):
    """What `credentials.json` holds. The installation's id tells its tokens from those of other replicas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    installation: str = Field(min_length=8, max_length=64)
    operator: str = Field(min_length=32)
    viewer: str = Field(min_length=32)
    worker: str = Field(min_length=32)


def read_or_make(state_dir: Path) -> CredentialsFile:
    """The tokens of this folder; made, and readable by the owner alone, if there are none."""
    path = state_dir / FILE
    if path.exists():
        return CredentialsFile.model_validate_json(path.read_bytes())
    made = CredentialsFile(
        installation=secrets.token_hex(8), operator=new_secret(), viewer=new_secret(), worker=new_secret()
    )
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{FILE}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(made.model_dump(), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)  # whole or not there: tokens in the database are never known to nobody
    return made


async def install(store: Store, settings: Settings) -> None:
    """Make the database accept exactly the tokens of the settings and of this installation's file."""
    given = {role: getattr(settings, f"{role}_token") for role in STAFF}
    kept = None if all(given.values()) else read_or_make(settings.state_dir)
    async with store.write() as tx:
        for role in STAFF:
            from_settings = given[role].get_secret_value() if given[role] else None
            from_file = getattr(kept, role) if kept and from_settings is None else None
            for origin, token in ((FROM_SETTINGS, from_settings), (kept.installation if kept else None, from_file)):
                if origin is None:
                    continue
                await _make_accepted(tx, role, origin, secret_hash(token) if token else None)


async def _make_accepted(tx: Transaction, role: StaffRole, origin: str, token_hash: str | None) -> None:
    """Exactly this token of that role and origin, or none."""
    dropped = await tx.drop_credentials(role, origin, token_hash)
    added = token_hash is not None and await tx.set_credential(token_hash, role, origin)
    if dropped or added:
        tx.audit("credentials.changed", role, {"origin": origin, "added": int(added), "dropped": dropped})
