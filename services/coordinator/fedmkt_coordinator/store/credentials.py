"""Secrets shared by replicas, staff tokens, enrolment tokens, used assertions, idempotency keys."""

from datetime import datetime, timedelta

from sqlalchemy import bindparam, delete, select, update

from fedmkt_coordinator.store.records import CredentialRow, EnrolmentTokenRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import assertions, credentials, enrolment_tokens, idempotency_keys, secrets

IDEMPOTENCY_KEPT = timedelta(days=2)


_BY_HASH = select(credentials).where(credentials.c.token_hash == bindparam("key"))


class Credentials(Statements):
    async def shared_secret(self, name: str, proposal: str) -> str:
        """The secret of that name: `proposal` if there was none, whoever else proposes at the same time."""
        await self._insert_new(secrets, {"name": name, "value": proposal})
        return str(await self._scalar(select(secrets.c.value).where(secrets.c.name == name)))

    async def set_credential(self, token_hash: str, role: str, origin: str) -> bool:
        """True when the token is new."""
        row = {"token_hash": token_hash, "role": role, "origin": origin, "created_at": self.now}
        return await self._insert_new(credentials, row)

    async def drop_credentials(self, role: str, origin: str, keep: str | None) -> int:
        """Forget the tokens of that role and origin, all but the one with hash `keep`; returns how many."""
        statement = delete(credentials).where(credentials.c.role == role, credentials.c.origin == origin)
        if keep is not None:
            statement = statement.where(credentials.c.token_hash != keep)
        return await self._count(statement)

    async def credential(self, token_hash: str) -> CredentialRow | None:
        return await self._first(CredentialRow, _BY_HASH, key=token_hash)

    async def issue_enrolment_token(self, token_hash: str, federation_id: str, site: str, expires_at: datetime) -> None:
        """Any unused token for the same site stops working."""
        table = enrolment_tokens
        await self._count(
            delete(table).where(table.c.federation_id == federation_id, table.c.site == site, table.c.used_by.is_(None))
        )
        row = EnrolmentTokenRow(token_hash, federation_id, site, self.now, expires_at, None)
        await self._insert(table, row)

    async def enrolment_token(self, token_hash: str) -> EnrolmentTokenRow | None:
        statement = select(enrolment_tokens).where(enrolment_tokens.c.token_hash == token_hash)
        return await self._first(EnrolmentTokenRow, statement)

    async def use_enrolment_token(self, token_hash: str, site_id: str) -> None:
        table = enrolment_tokens
        await self._change(
            update(table).where(table.c.token_hash == token_hash, table.c.used_by.is_(None)).values(used_by=site_id),
            "the enrolment token was used meanwhile",
        )

    async def use_assertion(self, site_id: str, jti: str, expires_at: datetime) -> bool:
        """True the first time."""
        return await self._insert_new(assertions, {"site_id": site_id, "jti": jti, "expires_at": expires_at})

    async def idempotent(self, scope: str, key: str, request_digest: str) -> str | None:
        """Remember the key; None when it is new, else the digest of the request that it came with before."""
        row = {"scope": scope, "key": key, "request_digest": request_digest, "created_at": self.now}
        if await self._insert_new(idempotency_keys, row):
            return None
        table = idempotency_keys
        return str(await self._scalar(select(table.c.request_digest).where(table.c.scope == scope, table.c.key == key)))

    async def forget_expired(self) -> None:
        """Drop assertions, enrolment tokens and idempotency keys that can no longer matter."""
        await self._count(delete(assertions).where(assertions.c.expires_at < self.now))
        await self._count(delete(idempotency_keys).where(idempotency_keys.c.created_at < self.now - IDEMPOTENCY_KEPT))
        table = enrolment_tokens
        await self._count(delete(table).where(table.c.expires_at < self.now - timedelta(days=30)))
