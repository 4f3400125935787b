"""Offering this server's LLM to every federation of the coordinator that has none yet."""

import logging

from fedmkt.client import CoordinatorClient
from fedmkt.errors import Refusal
from fedmkt.protocol import LlmRegistration, ModelCard
from fedmkt.stopping import StopFlag, Stopped
from fedmkt.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class Registrar:
    """Looks for new federations at an interval; runs in a thread of its own, so that no long job holds it up."""

    def __init__(self, client: CoordinatorClient, vocabulary: Vocabulary, card: ModelCard, stop: StopFlag) -> None:
        self._client = client
        self._vocabulary = vocabulary
        self._card = card
        self._stop = stop
        self._settled: set[str] = set()

    def run(self, interval_s: float) -> None:
        """Until the stop flag is set."""
        while True:
            try:
                self.register_new()
            except Stopped:
                return
            except Refusal as error:
                log.warning("registration.failed", extra={"code": error.code, "reason": error.detail})
            except Exception:
                log.exception("registration.failed")
            if self._stop.pause(interval_s):
                return

    def register_new(self) -> None:
        """Register with each federation that has no LLM; warn once about one that has another."""
        for federation in self._client.federations():
            if federation.federation_id in self._settled:
                continue
            fields = {"federation_id": federation.federation_id, "federation": federation.config.name}
            if federation.llm_vocabulary is None:
                artifact = self._client.put_artifact(self._vocabulary.to_bytes())
                registration = LlmRegistration(vocabulary=artifact, model=self._card)
                self._client.register_llm(federation.federation_id, registration)
                log.info("llm.registered", extra=fields)
            elif federation.llm_vocabulary != self._vocabulary.fingerprint:
                log.warning("llm.another_is_registered", extra={**fields, "vocabulary": federation.llm_vocabulary})
            self._settled.add(federation.federation_id)
