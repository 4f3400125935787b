"""What a federation is made of: its configuration, public set, LLM, and each site's vocabulary and model."""

import asyncio

from fedmkt.errors import Refusal
from fedmkt.protocol import (
    MAX_VOCABULARY_BYTES,
    FederationConfig,
    LlmRegistration,
    PublicSetReceipt,
    SiteModel,
    VocabularyReceipt,
)
from fedmkt.vocabulary import MalformedVocabulary
from fedmkt_coordinator import rounds
from fedmkt_coordinator.artifacts import ArtifactStore
from fedmkt_coordinator.public_sets import PublicSets
from fedmkt_coordinator.readiness import order_maps
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import AdapterRow, FederationRow, SiteRow
from fedmkt_coordinator.vocabularies import Vocabularies, VocabularyFacts


class FederationExists(Refusal):
    status = 409
    code = "federation.exists"
    title = "A federation of that name exists"


class PublicSetFixed(Refusal):
    status = 409
    code = "public_set.fixed"
    title = "The public set can no longer change"


class LlmFixed(Refusal):
    status = 409
    code = "llm.fixed"
    title = "The LLM can no longer change"


class VocabularyInUse(Refusal):
    status = 409
    code = "vocabulary.in_use"
    title = "A round uses the site's vocabulary"


async def create(store: Store, config: FederationConfig) -> tuple[FederationRow, bool]:
    """The federation, and whether it is new; the same configuration again is the same federation."""
    async with store.write() as tx:
        federation, new = await tx.add_federation(config)
        if not new and federation.config != config:
            raise FederationExists(
                f"federation {config.name} is {federation.id} and has another configuration; choose another name"
            )
        if new:
            await tx.append(federation.id, "federation.created", name=config.name, sites=len(config.sites))
    return federation, new


async def put_public_set(
    store: Store, artifacts: ArtifactStore, public_sets: PublicSets, federation_id: str, source: bytes
) -> PublicSetReceipt:
    async with store.read() as tx:
        config = (await tx.federation(federation_id)).config
    public_set = await public_sets.parse(source, config)
    digest = await artifacts.put(await asyncio.to_thread(public_set.to_jsonl))
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        if federation.public_set != digest:
            begun = await tx.rounds_begun(federation_id)
            if begun:
                raise PublicSetFixed(
                    f"{begun} rounds were made on public set {federation.public_set}, this one is {digest}; "
                    "make another federation for it"
                )
            await tx.set_public_set(federation, digest, len(public_set))
            await tx.append(federation_id, "public_set.stored", digest=digest, samples=len(public_set))
            await rounds.advance(tx, federation_id)
    return PublicSetReceipt(digest=digest, samples=len(public_set))


async def register_llm(
    store: Store,
    artifacts: ArtifactStore,
    vocabularies: Vocabularies,
    federation_id: str,
    registration: LlmRegistration,
) -> None:
    """The LLM of the federation. Once a round has begun, its vocabulary and model stay."""
    size = await artifacts.size(registration.vocabulary)
    if size > MAX_VOCABULARY_BYTES:  # as a site's is refused before it is read
        raise MalformedVocabulary(f"the vocabulary has {size} bytes, at most {MAX_VOCABULARY_BYTES} expected")
    facts = await vocabularies.read(await artifacts.get(registration.vocabulary))
    model = registration.model
    async with store.write() as tx:
        federation = await tx.federation(federation_id, lock=True)
        _check_same_llm(federation, facts, model.model_id, await tx.rounds_begun(federation_id))
        await tx.add_vocabulary(facts.fingerprint, registration.vocabulary, facts.size)
        await tx.set_llm(federation, model, facts.fingerprint)
        await tx.add_adapter(_bare_model(federation_id, tx))
        if federation.llm != model or federation.llm_vocabulary != facts.fingerprint:
            await tx.append(federation_id, "llm.registered", model_id=model.model_id, vocabulary=facts.fingerprint)
        await _vocabularies_changed(tx, federation_id)


def _check_same_llm(federation: FederationRow, facts: VocabularyFacts, model_id: str, begun: int) -> None:
    if federation.llm is None or not begun:
        return
    if federation.llm_vocabulary != facts.fingerprint or federation.llm.model_id != model_id:
        raise LlmFixed(
            f"{begun} rounds were made with {federation.llm.model_id} and vocabulary {federation.llm_vocabulary}, "
            f"this is {model_id} with {facts.fingerprint}; make another federation for it"
        )


def _bare_model(federation_id: str, tx: Transaction) -> AdapterRow:
    """Version 0: the base model without any adapter."""
    return AdapterRow(
        federation_id=federation_id,
        version=0,
        parent=None,
        round_id=None,
        artifact=None,
        created_at=tx.now,
        promoted=True,
        evaluations={},
        knowledge={},
    )


async def put_vocabulary(
    store: Store, artifacts: ArtifactStore, vocabularies: Vocabularies, site: SiteRow, data: bytes
) -> VocabularyReceipt:
    facts = await vocabularies.read(data)
    digest = await artifacts.put(data)
    async with store.write() as tx:
        await tx.federation(site.federation_id, lock=True)
        kept = await tx.add_vocabulary(facts.fingerprint, digest, facts.size)
        now = await tx.site(site.id)
        if now.vocabulary != facts.fingerprint:
            await _check_unused(tx, now)
            await tx.set_site_vocabulary(now, facts.fingerprint)
            await tx.append(
                site.federation_id, "site.vocabulary", site=site.name, vocabulary=facts.fingerprint, size=facts.size
            )
        await _vocabularies_changed(tx, site.federation_id)
    return VocabularyReceipt(fingerprint=facts.fingerprint, size=facts.size, artifact=kept.artifact)


async def _check_unused(tx: Transaction, site: SiteRow) -> None:
    active = await tx.active_round(site.federation_id)
    if active is None or site.vocabulary is None:
        return
    if await tx.part(active.id, site.name) is not None:
        raise VocabularyInUse(
            f"round {active.number} counts on vocabulary {site.vocabulary} of site {site.name}; send another one when "
            "the round has ended"
        )


async def _vocabularies_changed(tx: Transaction, federation_id: str) -> None:
    """Order the maps that are missing, failed ones again, and begin a round if that was all it waited for."""
    await order_maps(tx, await tx.federation(federation_id), again=True)
    await rounds.advance(tx, federation_id)


async def put_model(store: Store, site: SiteRow, model: SiteModel) -> None:
    async with store.write() as tx:
        await tx.federation(site.federation_id, lock=True)
        now = await tx.site(site.id)
        if (now.model, now.private_samples) != (model.model, model.private_samples):
            await tx.set_site_model(now, model.model, model.private_samples)
            await tx.append(
                site.federation_id,
                "site.model",
                site=site.name,
                model_id=model.model.model_id,
                private_samples=model.private_samples,
            )
        await rounds.advance(tx, site.federation_id)
