"""The coordinator's own Ed25519 key: it signs receipts, and the access tokens that sites get."""

from datetime import datetime, timedelta
from functools import lru_cache

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedmkt.errors import Refusal
from fedmkt.protocol import AuditHead, UploadReceipt
from fedmkt.signing import new_key, public_hex, sign_head, sign_receipt
from fedmkt_coordinator.store import Store

SECRET_NAME = "signing_key"  # noqa: S105 - the name of a secret
ISSUER = "fedmkt-coordinator"
AUDIENCE = "fedmkt-api"
KEPT_TOKENS = 20_000  # of a few hundred bytes each


class TokenInvalid(Refusal):
    status = 401
    code = "token.invalid"
    title = "The token is not valid"


class TokenExpired(Refusal):
    status = 401
    code = "token.expired"
    title = "The access token has expired"


class CoordinatorKey:
    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public = private.public_key()
        self.public_hex = public_hex(private)
        # A signature is checked once for each token, not once for each request; whether the site was revoked is asked
        # of the database every time. Refusals are not kept.
        self._verified = lru_cache(KEPT_TOKENS)(self._decode)

    @classmethod
    async def load(cls, store: Store) -> "CoordinatorKey":
        """The key that all replicas share; the first one to start makes it."""
        proposal = new_key().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()
        async with store.write() as tx:
            kept = await tx.shared_secret(SECRET_NAME, proposal)
        return cls(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(kept)))

    def sign(self, receipt: UploadReceipt) -> UploadReceipt:
        return sign_receipt(self._private, receipt)

    def audit_head(self, sequence: int, digest: str, at: datetime) -> AuditHead:
        return sign_head(self._private, sequence, digest, at)

    def access_token(self, site_id: str, now: datetime, life_s: int) -> str:
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": site_id, "iat": now, "exp": now + timedelta(seconds=life_s)}
        return jwt.encode(claims, self._private, algorithm="EdDSA")

    def site_id(self, token: str, now: datetime) -> str:
        """Whose access token it is. Raises TokenInvalid or TokenExpired."""
        site_id, expires_at = self._verified(token)
        late_s = now.timestamp() - expires_at
        if late_s >= 0:
            raise TokenExpired(f"the access token expired {late_s:.0f} s ago; get another with POST /v1/token")
        return site_id

    def _decode(self, token: str) -> tuple[str, float]:
        """Site and end of a token that this key signed: what its bytes say, whenever one looks."""
        try:
            claims = jwt.decode(
                token,
                self._public,
                algorithms=["EdDSA"],
                audience=AUDIENCE,
                issuer=ISSUER,
                # The time is ours to check: `now` comes from the coordinator's one clock.
                options={"require": ["exp", "sub"], "verify_exp": False, "verify_iat": False, "verify_nbf": False},
            )
            return str(claims["sub"]), float(claims["exp"])
        except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError) as error:
            raise TokenInvalid(f"the token was not issued by this coordinator ({error}); ask for a new one") from error
