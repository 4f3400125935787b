"""Prepare a compose stack's volumes on its first start: secrets, each in a volume that only its readers mount, and
folders that the services' user may write.

    python first_start.py SECRETS_FOLDER [FOLDER_FOR_THE_SERVICES ...]

Runs as root in a bare Python image at every `up`; a secret that is there already is left alone, so that the database
stays readable. `docker compose down --volumes` is how to get new ones.
"""

import json
import os
import secrets
import sys
from pathlib import Path

SERVICE_USER = 10001  # `fedmkt` in the services' Dockerfiles


def keep(path: Path, text: str, *, everyone: bool = False) -> str:
    """Write `text` unless the file exists, whole or not at all; returns what the file holds.

    Only the services' user may read it, or every user of the containers that mount the volume.
    """
    if not path.exists():
        draft = path.with_name(f".{path.name}.draft")
        draft.unlink(missing_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        draft.chmod(0o444 if everyone else 0o400)
        if os.geteuid() == 0 and not everyone:
            os.chown(draft, SERVICE_USER, SERVICE_USER)
        draft.replace(path)
    return path.read_text(encoding="ascii")


def make_secrets(root: Path) -> None:
    """One folder below `root` for each volume: database, redis, coordinator, operator, worker."""
    # PostgreSQL and Redis read theirs as users of their own, whose numbers differ between images.
    database = keep(root / "database" / "password", secrets.token_hex(24), everyone=True)
    redis = keep(root / "redis" / "password", secrets.token_hex(24), everyone=True)
    operator = keep(root / "operator" / "token", secrets.token_hex(32))
    keep(root / "operator" / "credentials.json", json.dumps({"operator": operator}))  # as `fedmkt` commands read it
    worker = keep(root / "worker" / "token", secrets.token_hex(32))
    # Named as the coordinator's settings are, so that it reads the whole folder.
    keep(root / "coordinator" / "fedmkt_database_url", f"postgresql://fedmkt:{database}@postgres:5432/fedmkt")
    keep(root / "coordinator" / "fedmkt_redis_url", f"redis://:{redis}@redis:6379/0")
    keep(root / "coordinator" / "fedmkt_operator_token", operator)
    keep(root / "coordinator" / "fedmkt_worker_token", worker)
    keep(root / "coordinator" / "fedmkt_viewer_token", secrets.token_hex(32))


if __name__ == "__main__":
    make_secrets(Path(sys.argv[1]))
    for folder in sys.argv[2:]:
        os.chown(folder, SERVICE_USER, SERVICE_USER)
    print("secrets and folders are in place")
