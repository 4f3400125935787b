"""Joining a federation: once with the one-time token, then as often as the agent starts with its own key."""

import logging

from fedmkt.client import CoordinatorClient
from fedmkt.errors import Refusal
from fedmkt.protocol import ModelCard, SiteModel
from fedmkt.signing import load_key, new_key, save_key
from fedmkt.vocabulary import Vocabulary
from fedmkt_client_agent.store import AgentState, AgentStore

log = logging.getLogger(__name__)


class NotEnrolled(Refusal):
    status = 401
    code = "agent.not_enrolled"
    title = "The site is not enrolled"


class OtherCoordinator(Refusal):
    status = 409
    code = "agent.other_coordinator"
    title = "The state folder belongs to another coordinator"


def enrol_once(client: CoordinatorClient, store: AgentStore, state: AgentState, token: str | None) -> AgentState:
    """The state with a site id in it. The key is made here and never leaves; only its public half is sent.

    A start that was killed between the coordinator's answer and the commit repeats the request with the same key,
    which the coordinator answers as before.
    """
    url = client.session.base_url
    if state.site_id is not None:
        if state.coordinator_url != url:
            raise OtherCoordinator(
                f"this state folder was enrolled at {state.coordinator_url}, not at {url}: name another state folder, "
                "or edit coordinator_url in its state.json if the same coordinator moved"
            )
        return state
    if token is None:
        raise NotEnrolled("no enrolment token is given and the state folder is new: ask the operator for a token")
    if not store.key_file.exists():
        save_key(store.key_file, new_key())
    enrolled = client.enrol(token, load_key(store.key_file))
    log.info("site.enrolled", extra={"site": enrolled.site, "federation_id": enrolled.federation_id})
    return store.commit(
        state.model_copy(
            update={
                "coordinator_url": url,
                "site_id": enrolled.site_id,
                "federation_id": enrolled.federation_id,
                "site": enrolled.site,
                "receipt_keys": client.keys().public_keys,
            }
        )
    )


def introduce(client: CoordinatorClient, vocabulary: Vocabulary, card: ModelCard, private_samples: int) -> None:
    """Tell the coordinator which vocabulary and model this site has now. Repeating it changes nothing."""
    receipt = client.put_vocabulary(vocabulary.to_bytes())
    if receipt.fingerprint != vocabulary.fingerprint:
        raise VocabularyDiffers(
            f"the coordinator reads this vocabulary as {receipt.fingerprint[:12]}..., the agent as "
            f"{vocabulary.fingerprint[:12]}...: run the same version of the tokenizers library on both sides"
        )
    client.put_model(SiteModel(model=card, private_samples=private_samples))
    log.info("site.introduced", extra={"model": card.model_id, "vocabulary": vocabulary.fingerprint})


class VocabularyDiffers(Refusal):
    status = 409
    code = "agent.vocabulary_differs"
    title = "Coordinator and agent read the vocabulary differently"
