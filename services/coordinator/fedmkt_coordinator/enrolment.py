"""How a site gets in and out: one-time token, its own key, signed assertions, revocation."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmkt.errors import Refusal
from fedmkt.protocol import Enrolled, Enrolment, EnrolmentToken
from fedmkt.signing import ASSERTION_AUDIENCE, is_weak
from fedmkt_coordinator import rounds
from fedmkt_coordinator.handshake import check_protocol
from fedmkt_coordinator.ids import new_secret, secret_hash
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import EnrolmentTokenRow, FederationRow, SiteRow
from fedmkt_coordinator.store.sites import SiteUnknown

MAX_ASSERTION_S = 300
JTI = re.compile(r"[\x20-\x7e]{1,100}")
SITE_ID = re.compile(r"site_[0-9a-f]{16,32}")


class SiteNotNamed(Refusal):
    code = "site.not_named"
    title = "The federation does not name this site"
    remedy = "Ask for a token for one of the names in the federation's configuration, spelled the same."


class AlreadyEnrolled(Refusal):
    status = 409
    code = "site.already_enrolled"
    title = "The site is enrolled"


class EnrolmentRefused(Refusal):
    status = 403
    code = "enrolment.refused"
    title = "The enrolment token does not work"


class WeakKey(Refusal):
    code = "enrolment.weak_key"
    title = "The public key proves nothing"


class SiteRevoked(Refusal):
    status = 403
    code = "site.revoked"
    title = "The site was revoked"


class AssertionRefused(Refusal):
    status = 401
    code = "assertion.refused"
    title = "The assertion does not prove who asks"


class ClockSkew(Refusal):
    status = 401
    code = "assertion.clock"
    title = "The clocks of site and coordinator differ too much"


class AssertionUsed(Refusal):
    status = 401
    code = "assertion.used"
    title = "The assertion was used before"


async def issue_token(store: Store, federation_id: str, site: str, life_s: int) -> EnrolmentToken:
    """A token for one site; an earlier one that nobody used stops working."""
    token = new_secret()
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        _named(federation, site)
        if await tx.active_site(federation_id, site) is not None:
            raise AlreadyEnrolled(
                f"site {site} is enrolled; to let it enrol with another key, revoke it first: "
                f"POST /v1/federations/{federation_id}/sites/{site}/revoke"
            )
        expires_at = tx.now + timedelta(seconds=life_s)
        await tx.issue_enrolment_token(secret_hash(token), federation_id, site, expires_at)
        await tx.append(federation_id, "site.invited", site=site)
    return EnrolmentToken(site=site, token=token, expires_at=expires_at)


async def enrol(store: Store, enrolment: Enrolment) -> Enrolled:
    """Use the token up for this key; the same token with the same key gives the same answer again."""
    check_protocol(str(enrolment.protocol_version))
    if is_weak(enrolment.public_key):
        raise WeakKey(f"for the key {enrolment.public_key[:16]}... anybody can sign; make a new one")
    token_hash = secret_hash(enrolment.token)
    async with store.write() as tx:
        token = await tx.enrolment_token(token_hash)
        if token is None:
            raise EnrolmentRefused("the enrolment token is unknown or was replaced; ask the operator for a new one")
        await tx.federation(token.federation_id, lock=True)
        site = await _site_of(tx, token, enrolment.public_key)
    return Enrolled(site_id=site.id, federation_id=site.federation_id, site=site.name)


async def _site_of(tx: Transaction, stale: EnrolmentTokenRow, public_key: str) -> SiteRow:
    token = await tx.enrolment_token(stale.token_hash)  # as it is now that the federation is locked
    if token is None:
        raise EnrolmentRefused("the enrolment token was replaced; use the newer one")
    if token.used_by is not None:
        site = await tx.site(token.used_by)
        if site.public_key != public_key:
            raise EnrolmentRefused(
                f"the enrolment token of site {site.name} was used with another key, it works once; if that was not "
                "you, have the operator revoke the site, and ask for a new token"
            )
        return check_active(site)
    if token.expires_at <= tx.now:
        raise EnrolmentRefused(
            f"the enrolment token of site {token.site} expired at {token.expires_at.isoformat()}; ask for a new one"
        )
    site = await tx.add_site(token.federation_id, token.site, public_key)
    await tx.use_enrolment_token(token.token_hash, site.id)
    await tx.append(token.federation_id, "site.enrolled", site=site.name, site_id=site.id, public_key=site.public_key)
    return site


async def revoke(store: Store, federation_id: str, site: str) -> None:
    """From the commit on, none of the site's tokens works; a site that is not active stays so."""
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        _named(federation, site)
        if await tx.revoke_site(federation_id, site):
            await tx.append(federation_id, "site.revoked", site=site)
            await rounds.drop_site(tx, federation_id, site)
            await rounds.advance(tx, federation_id)


def _named(federation: FederationRow, site: str) -> None:
    if site not in federation.config.sites:
        raise SiteNotNamed(
            f"federation {federation.name} names {len(federation.config.sites)} sites and {site!r} is none of them: "
            f"{', '.join(federation.config.sites[:20])}"
        )


def check_active(site: SiteRow) -> SiteRow:
    if site.revoked_at is not None:
        raise SiteRevoked(
            f"site {site.name} was revoked at {site.revoked_at.isoformat()}; the operator can issue a new "
            "enrolment token"
        )
    return site


# ------------------------------------------------------------------------------------------------ assertions


@dataclass(frozen=True, slots=True)
class Assertion:
    site_id: str
    jti: str
    issued_at: float
    expires_at: float


async def accept_assertion(store: Store, assertion: str, skew_s: int) -> SiteRow:
    """Whose assertion it is; it works once."""
    claimed = _claimed_site(assertion)
    async with store.write() as tx:
        try:
            site = check_active(await tx.site(claimed))
        except SiteUnknown as error:
            raise AssertionRefused(f"there is no site {claimed}; enrol first") from error
        proved = _verified(assertion, site)
        _check_times(proved, tx.now, skew_s)
        kept_until = datetime.fromtimestamp(proved.expires_at, tx.now.tzinfo) + timedelta(seconds=skew_s)
        if not await tx.use_assertion(site.id, proved.jti, kept_until):
            raise AssertionUsed("an assertion works once (its jti is known); sign a new one")
        return site


def _claimed_site(assertion: str) -> str:
    """The issuer as written, to look up its key; nothing is proved yet."""
    try:
        claims: dict[str, Any] = jwt.decode(assertion, options={"verify_signature": False})
    except jwt.InvalidTokenError as error:
        raise AssertionRefused(f"the assertion is no JWT ({error}); sign iss, sub, aud, iat, exp and jti") from error
    claimed = claims.get("iss")
    if not (isinstance(claimed, str) and SITE_ID.fullmatch(claimed)):
        raise AssertionRefused("iss is no site id; sign iss = sub = the site_id that enrolment answered with")
    return claimed


def _verified(assertion: str, site: SiteRow) -> Assertion:
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(site.public_key))
    try:
        claims: dict[str, Any] = jwt.decode(
            assertion,
            key,
            algorithms=["EdDSA"],
            audience=ASSERTION_AUDIENCE,
            issuer=site.id,
            subject=site.id,
            options={
                "require": ["iss", "sub", "aud", "iat", "exp", "jti"],
                "verify_exp": False,  # checked below, with the offset between the clocks in the answer
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
        proved = Assertion(site.id, str(claims["jti"]), float(claims["iat"]), float(claims["exp"]))
    except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError) as error:
        raise AssertionRefused(f"the assertion of site {site.name} does not hold: {error}") from error
    if not JTI.fullmatch(proved.jti):
        raise AssertionRefused(f"jti has {len(proved.jti)} characters, 1 to 100 of printable ASCII are accepted")
    return proved


def _check_times(proved: Assertion, now: datetime, skew_s: int) -> None:
    life_s = proved.expires_at - proved.issued_at
    if not 0 < life_s <= MAX_ASSERTION_S:
        raise AssertionRefused(f"the assertion is valid for {life_s:.0f} s, more than 0 and at most {MAX_ASSERTION_S}")
    ahead_s = proved.issued_at - now.timestamp()
    if ahead_s > skew_s or now.timestamp() - proved.expires_at > skew_s:
        side = "ahead of" if ahead_s > 0 else "behind"
        raise ClockSkew(
            f"the assertion was made {abs(ahead_s):.0f} s {side} the coordinator's clock, which reads "
            f"{now.isoformat(timespec='seconds')}; at most {skew_s} s are tolerated: set the site's clock (NTP)"
        )
