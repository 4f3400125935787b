"""Identifiers, secrets and their hashes."""

import hashlib
import secrets


def new_id(prefix: str) -> str:
    """`prefix` and 80 random bits: fed_, site_, round_, upload_, job_."""
    return f"{prefix}_{secrets.token_hex(10)}"


def new_secret() -> str:
    """256 random bits for a bearer token; shown once, kept as `secret_hash`."""
    return secrets.token_hex(32)


def secret_hash(secret: str) -> str:
    """SHA-256 is enough for secrets of 256 random bits: there is nothing to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()
