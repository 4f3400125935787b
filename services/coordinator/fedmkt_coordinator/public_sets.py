"""Public sets, parsed once and kept while they are in use."""

import asyncio
from collections import OrderedDict

from fedmkt.protocol import FederationConfig
from fedmkt.public_set import PublicSet
from fedmkt_coordinator.artifacts import ArtifactStore

KEPT = 4  # parsed sets in memory; more than that many federations at work at once read theirs again


class PublicSets:
    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts
        self._kept: OrderedDict[str, PublicSet] = OrderedDict()
        self._reading = asyncio.Lock()

    async def parse(self, source: bytes, config: FederationConfig) -> PublicSet:
        """Read a federation's public set and try the cut it asks for, off the event loop."""
        return await asyncio.to_thread(_parse, source, config)

    async def get(self, digest: str) -> PublicSet:
        async with self._reading:  # the first of several uploads parses, the others wait for it
            if digest not in self._kept:
                source = await self._artifacts.get(digest)
                self._kept[digest] = await asyncio.to_thread(PublicSet.from_jsonl, source)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(digest)
            return self._kept[digest]


def _parse(source: bytes, config: FederationConfig) -> PublicSet:
    public_set = PublicSet.from_jsonl(source, config.public_set.chat_template)
    public_set.parts(config.public_set.slices, config.public_set.holdout_share)
    return public_set
