"""Ed25519 keys and what they sign: upload manifests and assertions (site), receipts and audit heads (coordinator).

Public keys travel as 64 hexadecimal digits (32 raw bytes), signatures as 128. Private keys are PKCS#8 PEM files that
only their owner can read. Everything here is pure but `save_key` and `load_key`.
"""

import hashlib
import os
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedmkt.errors import Refusal
from fedmkt.protocol import CHUNK_BYTES, AuditHead, Manifest, UploadReceipt, manifest_bytes

ASSERTION_AUDIENCE = "fedmkt"
ASSERTION_LIFETIME_S = 60
UploadKind = Literal["knowledge", "adapter"]


# The points of edwards25519 of order 1, 2, 4 and 8, as they are written with the sign bit off, non-canonical ones too:
# under such a key one signature fits many messages, and anybody can make it.
SMALL_ORDER = frozenset(
    {
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    }
)


def is_weak(public_key: str) -> bool:
    """Whether a public key (hex) is one for which anybody can sign."""
    raw = bytearray.fromhex(public_key)
    raw[-1] &= 0x7F
    return raw.hex() in SMALL_ORDER


class KeyUnreadable(Refusal):
    status = 422
    code = "key.unreadable"
    title = "The key file cannot be used"
    remedy = "`chmod 600` the key file, or restore it; without it, revoke the site and enrol it anew."


class BadSignature(Refusal):
    status = 401
    code = "signature.invalid"
    title = "The signature does not fit"


class BadReceipt(Refusal):
    """A receipt that proves nothing. 502: for the client the coordinator is the upstream that answered wrongly."""

    status = 502
    code = "receipt.invalid"
    title = "The receipt does not prove the upload"


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def public_hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def save_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write the key as PEM with mode 0600. Never replaces a file: FileExistsError keeps an enrolled key safe."""
    if path.exists():
        raise FileExistsError(f"{path.name} exists already; move it away before making another key")
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # renamed when whole: a crash leaves no half key
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a key that `save_key` wrote. Raises KeyUnreadable when it is no Ed25519 key or others may read it."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise KeyUnreadable(f"key file {path.name} has mode {mode:04o}, at most 0600 is allowed: run chmod 600 on it")
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise KeyUnreadable(f"key file {path.name} is not an unencrypted PEM private key: enrol again") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnreadable(f"key file {path.name} holds a {type(key).__name__}, an Ed25519 key is needed")
    return key


def verify(public_key: str, signature: str, signed: bytes) -> None:
    """Raise BadSignature unless `signature` (hex) of `signed` was made with the key behind `public_key` (hex)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), signed)
    except (InvalidSignature, ValueError) as error:
        raise BadSignature(
            f"the signature over {len(signed)} bytes was not made with the key {public_key[:8]}...; "
            "sign with the key that was enrolled"
        ) from error


def sign_manifest(key: Ed25519PrivateKey, kind: UploadKind, round_id: str, blob: bytes) -> Manifest:
    """The signed announcement of one upload; `blob` must not be empty."""
    digest = hashlib.sha256(blob).hexdigest()
    chunks = tuple(
        hashlib.sha256(blob[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(blob), CHUNK_BYTES)
    )
    signature = key.sign(manifest_bytes(kind, round_id, digest, len(blob), chunks)).hex()
    return Manifest(
        kind=kind, round_id=round_id, digest=digest, size_bytes=len(blob), chunks=chunks, signature=signature
    )


def verify_manifest(manifest: Manifest, public_key: str) -> None:
    verify(public_key, manifest.signature, manifest.signed_bytes())


def sign_receipt(key: Ed25519PrivateKey, unsigned: UploadReceipt) -> UploadReceipt:
    """The receipt with its signature filled in; whatever stood there is ignored."""
    return unsigned.model_copy(update={"signature": key.sign(unsigned.signed_bytes()).hex()})


def verify_receipt(receipt: UploadReceipt, manifest: Manifest, public_keys: Sequence[str]) -> None:
    """Raise BadReceipt unless one of the coordinator's keys (hex) signed this receipt and it is about this upload."""
    announced = (manifest.kind, manifest.round_id, manifest.digest, manifest.size_bytes)
    received = (receipt.kind, receipt.round_id, receipt.digest, receipt.size_bytes)
    if announced != received:
        raise BadReceipt(f"the receipt is for {received}, the upload was {announced}: upload again")
    if not any(_fits(key, receipt) for key in public_keys):
        known = ", ".join(f"{key[:8]}..." for key in public_keys)
        raise BadReceipt(
            f"the receipt of upload {receipt.upload_id} was signed with none of the coordinator's "
            f"{len(public_keys)} known keys ({known}); ask the operator whether its keys were changed"
        )


def sign_head(key: Ed25519PrivateKey, sequence: int, digest: str, at: datetime) -> AuditHead:
    """The end of the audit log at that time, signed."""
    unsigned = AuditHead(sequence=sequence, digest=digest, at=at, public_key=public_hex(key), signature="0" * 128)
    return unsigned.model_copy(update={"signature": key.sign(unsigned.signed_bytes()).hex()})


def _fits(public_key: str, receipt: UploadReceipt) -> bool:
    try:
        verify(public_key, receipt.signature, receipt.signed_bytes())
    except BadSignature:
        return False
    return True


def site_assertion(key: Ed25519PrivateKey, site_id: str, now: datetime) -> str:
    """A JWT (EdDSA) by which a site asks for an access token: RFC 7523, single use, valid for a minute."""
    issued_at = int(now.timestamp())
    claims = {
        "iss": site_id,
        "sub": site_id,
        "aud": ASSERTION_AUDIENCE,
        "iat": issued_at,
        "exp": issued_at + ASSERTION_LIFETIME_S,
        "jti": secrets.token_hex(16),
    }
    return jwt.encode(claims, key, algorithm="EdDSA")
