"""Enrolled sites."""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from fedmkt.errors import Refusal
from fedmkt.protocol import ModelCard
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.records import FederationRow, SiteRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import federations, rounds, sites, vocabularies, vocabulary_maps

_BY_ID = select(sites).where(sites.c.id == bindparam("key"))


class SiteUnknown(Refusal):
    status = 404
    code = "site.unknown"
    title = "No such site"


class Sites(Statements):
    async def add_site(self, federation_id: str, name: str, public_key: str) -> SiteRow:
        row = SiteRow(new_id("site"), federation_id, name, public_key, self.now, None, None, None, None, None)
        await self._insert(sites, row)
        return row

    async def site(self, site_id: str) -> SiteRow:
        found = await self._first(SiteRow, _BY_ID, key=site_id)
        if found is None:
            raise SiteUnknown(f"there is no site {site_id}; enrol with a token from the operator")
        return found

    async def sites(self, federation_id: str) -> list[SiteRow]:
        """Every row of the federation, revoked ones too, by name and then oldest first."""
        return await self.sites_of([federation_id])

    async def sites_of(self, federation_ids: Collection[str]) -> list[SiteRow]:
        """The same of several federations."""
        statement = select(sites).where(sites.c.federation_id.in_(federation_ids))
        return await self._all(SiteRow, statement.order_by(sites.c.name, sites.c.enrolled_at, sites.c.id))

    async def site_vocabularies(self, federation_id: str) -> list[str]:
        """Fingerprints of the vocabularies that its active sites have."""
        active = (sites.c.federation_id == federation_id) & sites.c.revoked_at.is_(None)
        statement = select(sites.c.vocabulary).where(active, sites.c.vocabulary.is_not(None)).distinct()
        return [str(row[0]) for row in await self._connection.execute(statement)]

    async def described_sites(self, federation_id: str) -> int:
        """How many sites have said all about themselves: `SiteRow.ready`, counted."""
        return int(await self._scalar(select(func.count()).where(_described(federation_id))))

    async def described_since(self, federation_id: str, count: int) -> datetime:
        """When the last of the first `count` of them enrolled; that many there are."""
        enrolled = select(sites.c.enrolled_at).where(_described(federation_id)).order_by(sites.c.enrolled_at)
        found = await self._scalar(enrolled.offset(count - 1).limit(1))
        assert isinstance(found, datetime)
        return found

    async def active_site(self, federation_id: str, name: str) -> SiteRow | None:
        statement = select(sites).where(_active(federation_id, name))
        return await self._first(SiteRow, statement)

    async def revoke_site(self, federation_id: str, name: str) -> bool:
        """False when no such site is active."""
        statement = update(sites).where(_active(federation_id, name)).values(revoked_at=self.now)
        return await self._count(statement) == 1

    async def set_site_model(self, site: SiteRow, model: ModelCard, private_samples: int | None) -> None:
        await self._change(
            update(sites)
            .where(sites.c.id == site.id, sites.c.revoked_at.is_(None))
            .values(model=model, private_samples=private_samples),
            f"site {site.name} was revoked",
        )

    async def set_site_vocabulary(self, site: SiteRow, fingerprint: str) -> None:
        await self._change(
            update(sites).where(sites.c.id == site.id, sites.c.revoked_at.is_(None)).values(vocabulary=fingerprint),
            f"site {site.name} was revoked",
        )

    async def saw_sites(self, site_ids: Collection[str]) -> None:
        await self._count(update(sites).where(sites.c.id.in_(sorted(site_ids))).values(last_seen_at=self.now))

    async def site_may_read(self, site: SiteRow, federation: FederationRow, digest: str) -> bool:
        """Whether the artifact was made for this site: public set, LLM's knowledge, vocabularies, maps to it."""
        of_round = select(rounds.c.id).where(
            rounds.c.federation_id == federation.id,
            or_(rounds.c.knowledge == digest, rounds.c.averaged_adapter == digest),
        )
        of_vocabulary = select(vocabularies.c.fingerprint).where(
            vocabularies.c.artifact == digest,
            vocabularies.c.fingerprint.in_([each for each in (federation.llm_vocabulary, site.vocabulary) if each]),
        )
        of_map = select(vocabulary_maps.c.job_id).where(
            vocabulary_maps.c.artifact == digest,
            vocabulary_maps.c.teacher == federation.llm_vocabulary,
            vocabulary_maps.c.student == site.vocabulary,
        )
        public = select(federations.c.id).where(federations.c.id == federation.id, federations.c.public_set == digest)
        for statement in (public, of_round, of_vocabulary, of_map):
            if await self._scalar(statement.limit(1)) is not None:
                return True
        return False


def _described(federation_id: str) -> ColumnElement[bool]:
    said = sites.c.revoked_at.is_(None) & sites.c.model.is_not(None) & sites.c.vocabulary.is_not(None)
    return (sites.c.federation_id == federation_id) & said


def _active(federation_id: str, name: str) -> ColumnElement[bool]:
    return (sites.c.federation_id == federation_id) & (sites.c.name == name) & sites.c.revoked_at.is_(None)
