"""Who asks, and whether they may. Every route names its roles with `Allow`; a test finds one that does not."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from fedmkt.errors import Refusal
from fedmkt_coordinator.context import Context, context_of
from fedmkt_coordinator.enrolment import check_active
from fedmkt_coordinator.ids import secret_hash
from fedmkt_coordinator.keys import TokenInvalid
from fedmkt_coordinator.store.records import SiteRow

Role = Literal["operator", "viewer", "worker", "site", "anyone"]


class TokenMissing(Refusal):
    status = 401
    code = "token.missing"
    title = "A token is needed"


class RoleForbidden(Refusal):
    status = 403
    code = "role.forbidden"
    title = "The role may not do this"


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a token belongs to. `site` is set exactly for the role 'site'."""

    role: Role
    site: SiteRow | None = None


class Allow:
    """A dependency that lets these roles pass and hands out the principal."""

    def __init__(self, *roles: Role) -> None:
        assert roles, "a route that all may call says so: Allow('anyone')"
        self.roles = roles

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> Principal:
        if self.roles == ("anyone",):
            return Principal("anyone")
        if bearer is None:
            raise TokenMissing(f"send Authorization: Bearer with a token of {_alternatives(self.roles)}")
        principal = await authenticate(context_of(request), bearer.credentials)
        if principal.role not in self.roles:
            raise RoleForbidden(
                f"{request.method} {request.url.path} is for {_alternatives(self.roles)}, "
                f"the token is of role {principal.role}"
            )
        return principal


async def authenticate(context: Context, token: str) -> Principal:
    """Staff tokens are looked up by their hash; a site's is verified, and its row asked whether it was revoked."""
    if token.count(".") == 2:
        site_id = context.key.site_id(token, context.clock())
        async with context.store.read() as tx:
            return Principal("site", check_active(await tx.site(site_id)))
    async with context.store.read() as tx:
        credential = await tx.credential(secret_hash(token))
    match credential.role if credential else None:
        case "operator" | "viewer" | "worker" as role:
            return Principal(role)
        case _:
            raise TokenInvalid("the token is unknown; credentials.json in the coordinator's folder holds those in use")


def _alternatives(roles: tuple[Role, ...]) -> str:
    return " or ".join(roles)


async def _site(principal: Annotated[Principal, Depends(Allow("site"))]) -> SiteRow:
    assert principal.site is not None
    return principal.site


Anyone = Depends(Allow("anyone"))
Operator = Depends(Allow("operator"))
Worker = Depends(Allow("worker"))
Reader = Depends(Allow("operator", "viewer", "worker"))
Uploader = Depends(Allow("operator", "worker"))
Site = Annotated[SiteRow, Depends(_site)]
Downloader = Annotated[Principal, Depends(Allow("operator", "worker", "site"))]
