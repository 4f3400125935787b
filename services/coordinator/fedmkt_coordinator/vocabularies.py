"""Reading the vocabularies that arrive: in a process of their own, each once, and few at the same time."""

import asyncio
import hashlib
from dataclasses import dataclass

from fedmkt.vocabulary_process import Bounds, VocabularyProcess
from fedmkt_coordinator.store import Store

AT_ONCE = 2  # whoever sends what takes long to read holds up others that enrol, and nothing else
BOUNDS = Bounds(cpu_s=30.0)  # the largest real ones take three


@dataclass(frozen=True, slots=True)
class VocabularyFacts:
    """What the database keeps."""

    fingerprint: str
    size: int


class Vocabularies:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def read(self, data: bytes) -> VocabularyFacts:
        """Check a vocabulary; bytes that were accepted before are known. Raises the refusals of `VocabularyProcess`."""
        digest = (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
        async with self._store.read() as tx:
            known = await tx.vocabulary_in(digest)
        if known is not None:
            return VocabularyFacts(known.fingerprint, known.size)
        async with self._turn:
            return await asyncio.to_thread(_read, data)


def _read(data: bytes) -> VocabularyFacts:
    process = VocabularyProcess(BOUNDS)
    try:
        found = process.read(data)
    finally:
        process.close()
    return VocabularyFacts(found.fingerprint, found.size)
