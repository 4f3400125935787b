"""Who asks, and whether they may. Every route names its roles with `Allow`; a test finds one that does not."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from fedmkt.errors import Refusal
from fedmkt.logs import bind
from fedmkt_coordinator.context import Context, context_of
from fedmkt_coordinator.enrolment import check_active
from fedmkt_coordinator.ids import secret_hash
from fedmkt_coordinator.keys import TokenInvalid
from fedmkt_coordinator.rate_limits import network
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.store.audit import Actor, acting
from fedmkt_coordinator.store.records import SiteRow

IDS = ("federation_id", "round_id", "job_id", "upload_id")
NAME_DIGITS = 16  # of a token's hash, by which the audit log calls its owner

Role = Literal["operator", "viewer", "worker", "site", "anyone"]


class TokenMissing(Refusal):
    status = 401
    code = "token.missing"
    title = "A token is needed"
    remedy = "Send the header, or set the token that the message asks for."


class RoleForbidden(Refusal):
    status = 403
    code = "role.forbidden"
    title = "The role may not do this"
    remedy = "Use the token of the role that the message names."


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a token belongs to. `site` is set exactly for the role 'site'."""

    role: Role
    name: str  # a site's id, the beginning of a token's hash, an address
    site: SiteRow | None = None
    token_hash: str | None = None  # of an operator, viewer or worker

    @property
    def actor(self) -> Actor:
        return Actor(self.role, self.name)


class Allow:
    """A dependency that lets these roles pass and hands out the principal."""

    def __init__(self, *roles: Role, costly: bool = False) -> None:
        """`costly`: what needs no credential but the database counts against the address that asks."""
        assert roles, "a route that all may call says so: Allow('anyone')"
        self.roles = roles
        self.costly = costly

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> Principal:
        context, address = context_of(request), network(request.client.host if request.client else "unknown")
        if self.roles == ("anyone",):
            if self.costly:
                context.rates.addresses.spend(address, f"address {address}")
            stranger = Principal("anyone", address)
            acting.set(stranger.actor)
            return stranger
        if bearer is None:
            raise TokenMissing(f"send Authorization: Bearer with a token of {_alternatives(self.roles)}")
        acting.set(Actor("anyone", address))
        try:
            principal = await authenticate(context, bearer.credentials)
        except Refusal:
            context.rates.addresses.spend(address, f"address {address}")
            raise
        admit(context, request, principal)
        if principal.role not in self.roles:
            raise RoleForbidden(
                f"{request.method} {request.url.path} is for {_alternatives(self.roles)}, "
                f"the token is of role {principal.role}"
            )
        return principal


def admit(context: Context, request: Request, principal: Principal) -> None:
    """Whoever asks is known, and has one request less."""
    acting.set(principal.actor)
    note(request, principal)
    _spend(context, principal)


def note(request: Request, principal: Principal) -> None:
    """Into every log line of the request: who asks, and what about. Ids of the address are those of its template."""
    site = principal.site
    of_site = {} if site is None else {"site": site.name, "federation_id": site.federation_id}
    of_path = {name: value for name in IDS if (value := request.path_params.get(name)) is not None}
    bind(role=principal.role, **{**of_site, **of_path})


async def authenticate(context: Context, token: str) -> Principal:
    """Staff tokens are looked up by their hash; a site's is verified, and its row asked whether it was revoked."""
    if token.count(".") == 2:
        site_id = context.key.site_id(token, context.clock())
        async with context.store.read() as tx:
            return Principal("site", site_id, site=check_active(await tx.site(site_id)))
    token_hash = secret_hash(token)
    async with context.store.read() as tx:
        credential = await tx.credential(token_hash)
    match credential.role if credential else None:
        case "operator" | "viewer" | "worker" as role:
            return Principal(role, token_hash[:NAME_DIGITS], token_hash=token_hash)
        case _:
            raise TokenInvalid("the token is unknown; credentials.json in the coordinator's folder holds those in use")


def _spend(context: Context, principal: Principal) -> None:
    if principal.site is not None:
        context.rates.sites.spend(principal.name, f"site {principal.site.name}")
    else:
        context.rates.staff.spend(principal.name, f"this {principal.role}'s token")


async def still_valid(tx: Transaction, principal: Principal) -> bool:
    """Whether a token that opened a long answer would open it now."""
    return principal.token_hash is None or await tx.credential(principal.token_hash) is not None


def _alternatives(roles: tuple[Role, ...]) -> str:
    return " or ".join(roles)


async def _site(principal: Annotated[Principal, Depends(Allow("site"))]) -> SiteRow:
    assert principal.site is not None
    return principal.site


Anyone = Depends(Allow("anyone"))
Stranger = Depends(Allow("anyone", costly=True))
Operator = Depends(Allow("operator"))
Worker = Depends(Allow("worker"))
READERS: tuple[Role, ...] = ("operator", "viewer", "worker")
Reader = Depends(Allow(*READERS))
Uploader = Depends(Allow("operator", "worker"))
Site = Annotated[SiteRow, Depends(_site)]
Downloader = Annotated[Principal, Depends(Allow("operator", "worker", "site"))]
