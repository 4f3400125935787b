"""Vocabularies by fingerprint, and the maps between them."""

from collections.abc import Iterable

from sqlalchemy import bindparam, select, tuple_, update

from fedmkt_coordinator.store.records import MapRow, VocabularyRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import vocabularies, vocabulary_maps

_BY_FINGERPRINT = select(vocabularies).where(vocabularies.c.fingerprint == bindparam("key"))


class Vocabularies(Statements):
    async def add_vocabulary(self, fingerprint: str, artifact: str, size: int) -> VocabularyRow:
        """The vocabulary of that fingerprint; the first artifact that held it stays."""
        await self._insert_new(vocabularies, VocabularyRow(fingerprint, artifact, size, self.now))
        return await self.vocabulary(fingerprint)

    async def vocabulary(self, fingerprint: str) -> VocabularyRow:
        found = await self._first(VocabularyRow, _BY_FINGERPRINT, key=fingerprint)
        assert found is not None, f"vocabulary {fingerprint} is referred to and never deleted"
        return found

    async def vocabulary_in(self, artifact: str) -> VocabularyRow | None:
        """The vocabulary that these bytes are, if they are the ones that were kept for it."""
        return await self._first(VocabularyRow, select(vocabularies).where(vocabularies.c.artifact == artifact))

    async def add_map(self, row: MapRow) -> bool:
        """False when somebody asked for that map before."""
        return await self._insert_new(vocabulary_maps, row)

    async def maps(self, pairs: Iterable[tuple[str, str]]) -> list[MapRow]:
        """All maps, built or not, of these (teacher, student) pairs."""
        table = vocabulary_maps
        statement = select(table).where(tuple_(table.c.teacher, table.c.student).in_(sorted(set(pairs))))
        return await self._all(MapRow, statement.order_by(table.c.teacher, table.c.student, table.c.method))

    async def replace_map_job(self, row: MapRow, job_id: str) -> None:
        """Another job builds the map, because the earlier one failed."""
        table = vocabulary_maps
        await self._change(
            update(table).where(table.c.job_id == row.job_id, table.c.artifact.is_(None)).values(job_id=job_id),
            f"the map of job {row.job_id} has another job",
        )

    async def set_map(self, job_id: str, artifact: str) -> None:
        await self._change(
            update(vocabulary_maps).where(vocabulary_maps.c.job_id == job_id).values(artifact=artifact),
            f"no map waits for job {job_id}",
        )
