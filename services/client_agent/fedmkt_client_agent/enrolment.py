"""Joining a federation: once with the one-time token, then as often as the agent starts with its own key."""

import hashlib
import logging

from fedmkt.client import CoordinatorClient
from fedmkt.durable import write_atomically
from fedmkt.errors import Refusal
from fedmkt.protocol import Enrolled, Enrolment, ModelCard, SiteModel
from fedmkt.signing import load_key, new_key, public_hex, save_key
from fedmkt.vocabulary import Vocabulary
from fedmkt_client_agent.ledger import Ledger, sending
from fedmkt_client_agent.store import AgentState, AgentStore

log = logging.getLogger(__name__)


class NotEnrolled(Refusal):
    status = 401
    code = "agent.not_enrolled"
    title = "The site is not enrolled"
    remedy = "Put the operator's one-time token into the file that FEDMKT_ENROLMENT_TOKEN_FILE names, and start again."


class OtherCoordinator(Refusal):
    status = 409
    code = "agent.other_coordinator"
    title = "The state folder belongs to another coordinator"
    remedy = "Name another state folder; or edit coordinator_url in its state.json if the same coordinator moved."


class OtherFederation(Refusal):
    status = 409
    code = "agent.other_federation"
    title = "The enrolment token is for another federation"
    remedy = "One state folder for each federation: name another one with FEDMKT_STATE_DIR."


def enrol_once(
    client: CoordinatorClient, store: AgentStore, state: AgentState, token: str | None, ledger: Ledger
) -> AgentState:
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
    return _enrolled(client, store, state, token, ledger)


def enrol_again(
    client: CoordinatorClient, store: AgentStore, state: AgentState, token: str | None, ledger: Ledger
) -> AgentState | None:
    """After a revocation: with a token that was not used up yet, under a key of its own. None when there is none.

    What the site has learned stays; what it did in a round that goes on without it does not.
    """
    if token is None or _digest(token) == state.token_digest:
        return None
    fresh = state.model_copy(update={"key": f"key-{_digest(token)[:16]}.pem", "work": None})
    joined = _enrolled(client, store, fresh, token, ledger)
    if joined.key != state.key:
        store.key_of(state).unlink(missing_ok=True)
    return joined


def _enrolled(
    client: CoordinatorClient, store: AgentStore, state: AgentState, token: str, ledger: Ledger
) -> AgentState:
    key_file = store.key_of(state)
    if not key_file.exists():
        save_key(key_file, new_key())
    key = load_key(key_file)
    body = Enrolment(token=token, public_key=public_hex(key))
    enrolled: Enrolled = ledger.recorded(sending("enrolment", body), lambda: client.enrol(token, key))
    if state.federation_id not in (None, enrolled.federation_id):
        raise OtherFederation(
            f"the token lets the site into {enrolled.federation_id}, this state folder belongs to "
            f"{state.federation_id}: name another state folder, and ask the operator for another token"
        )
    log.info("site.enrolled", extra={"site": enrolled.site, "federation_id": enrolled.federation_id})
    return store.commit(
        state.model_copy(
            update={
                "coordinator_url": client.session.base_url,
                "site_id": enrolled.site_id,
                "federation_id": enrolled.federation_id,
                "site": enrolled.site,
                "receipt_keys": client.keys().public_keys,
                "token_digest": _digest(token),
            }
        )
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def introduce(
    client: CoordinatorClient,
    store: AgentStore,
    ledger: Ledger,
    vocabulary: Vocabulary,
    card: ModelCard,
    private_samples: int | None,
) -> None:
    """Tell the coordinator which vocabulary and model this site has now. Repeating it changes nothing.

    The vocabulary is kept beside, so that people can read what knowledge says.
    """
    data = vocabulary.to_bytes()
    write_atomically(store.vocabulary, data)
    receipt = ledger.recorded(sending("vocabulary", data), lambda: client.put_vocabulary(data))
    if receipt.fingerprint != vocabulary.fingerprint:
        raise VocabularyDiffers(
            f"the coordinator reads this vocabulary as {receipt.fingerprint[:12]}..., the agent as "
            f"{vocabulary.fingerprint[:12]}...: run the same version of the tokenizers library on both sides"
        )
    model = SiteModel(model=card, private_samples=private_samples)
    ledger.recorded(sending("model", model), lambda: client.put_model(model))
    log.info("site.introduced", extra={"model": card.model_id, "vocabulary": vocabulary.fingerprint})


class VocabularyDiffers(Refusal):
    status = 409
    code = "agent.vocabulary_differs"
    title = "Coordinator and agent read the vocabulary differently"
    remedy = "Install the coordinator's version of fedmkt, with its pinned tokenizers, at the site."
