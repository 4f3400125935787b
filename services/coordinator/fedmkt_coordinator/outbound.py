"""HTTP to addresses that somebody else chose: only where it may go, only for so long, and no more read than a status.

The name is resolved here and the connection goes to the address that was checked, so that a name which resolves to
another address the next moment (DNS rebinding) gains nothing. Redirects are not followed, proxies not asked.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Mapping, Sequence

import httpx

from fedmkt.errors import Refusal

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
SCHEMES = ("http", "https")
RESOLVE_S = 5.0
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(Refusal):
    code = "webhook.address"
    title = "The coordinator does not send to this address"


class Outbound:
    """Sends POST requests. `allow_private` is for tests and for receivers beside the coordinator."""

    def __init__(self, *, allow_private: bool, timeout_s: float) -> None:
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            trust_env=False, follow_redirects=False, timeout=timeout_s, limits=httpx.Limits(max_keepalive_connections=0)
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """The answer's status. Raises AddressRefused, httpx.HTTPError or TimeoutError; nothing of the body is read."""
        async with asyncio.timeout(self._timeout_s):
            target = _parsed(url)
            addresses = await self.resolve(url)
            named = {**headers, "Host": target.netloc.decode("ascii")}
            # The certificate is checked against the name, whatever address the connection goes to.
            more = {"sni_hostname": target.host} if target.scheme == "https" else {}
            pinned = target.copy_with(host=str(addresses[0]))
            async with self._http.stream("POST", pinned, content=body, headers=named, extensions=more) as response:
                return response.status_code

    async def resolve(self, url: str) -> Sequence[IpAddress]:
        """The addresses behind the name, all of them allowed. Raises AddressRefused."""
        target = _parsed(url)
        port = target.port or (443 if target.scheme == "https" else 80)
        try:
            async with asyncio.timeout(RESOLVE_S):
                found = await asyncio.get_running_loop().getaddrinfo(target.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise AddressRefused(f"host {target.host} has no address ({error}); check its spelling") from error
        addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
        for address in addresses:
            if not (self._allow_private or is_public(address)):
                raise AddressRefused(
                    f"host {target.host} has the address {address}, which is private, local or reserved; webhooks go "
                    "to public addresses unless FEDMKT_WEBHOOK_ALLOW_PRIVATE is set"
                )
        return addresses


def is_public(address: IpAddress) -> bool:
    """Whether the address is out in the internet, also when it only wraps another one."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if wrapped is not None:
            return is_public(wrapped)
        if address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise AddressRefused(f"{url[:200]!r} is no address: {error}") from error
    if parsed.scheme not in SCHEMES or not parsed.host:
        raise AddressRefused(f"{url[:200]!r} is no absolute http or https address")
    if parsed.userinfo:
        raise AddressRefused("the address holds a user name or password; tell the receiver by the secret instead")
    return parsed
