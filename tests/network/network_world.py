"""A real coordinator with a federation whose round is collecting: what uploads over bad lines need, and no model."""

import random
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmkt.client import CoordinatorClient, RetryPolicy, SiteKey, StaticToken
from fedmkt.protocol import (
    FederationConfig,
    JobCompletion,
    LlmRegistration,
    MapResult,
    ModelCard,
    PublicSetConfig,
    Schedule,
    SiteModel,
    UploadReceipt,
)
from fedmkt.signing import new_key
from fedmkt_llm_server.queue import JobQueue
from live_coordinator import QUICK, TOKENS, LiveCoordinator, stories, until
from small_tokenizers import vocabulary

CARD = ModelCard(model_id="tiny", architecture="llama", parameters=1000)
PATIENT = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05, patience_s=60)


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that nothing on the way could compress."""
    return random.Random(seed).randbytes(size)


@dataclass
class UploadingSite:
    """An enrolled site in a round that is collecting. Adapters are opaque to the coordinator, so any bytes will do."""

    coordinator: LiveCoordinator
    federation_id: str
    site_id: str
    key: Ed25519PrivateKey
    round_id: str
    receipt_keys: tuple[str, ...]

    def client(self, url: str, **more: Any) -> CoordinatorClient:
        return CoordinatorClient(url, SiteKey(self.site_id, self.key), **{"retry": PATIENT, "timeout_s": 20.0, **more})

    def upload(self, client: CoordinatorClient, blob: bytes) -> UploadReceipt:
        return client.upload("adapter", self.round_id, blob, self.key, self.receipt_keys)

    def accepted(self) -> int:
        """How often the coordinator has counted an upload of this round."""
        with self.coordinator.client() as operator:
            events = operator.events(self.federation_id).items
        return sum(each.kind == "adapter.accepted" for each in events)


def uploading_site(coordinator: LiveCoordinator, name: str) -> UploadingSite:
    config = FederationConfig(
        name=name,
        scenario="homogeneous",
        sites=("north",),
        average_adapters=True,
        public_set=PublicSetConfig(slices=2, holdout_share=0.2),
        schedule=Schedule(quorum=1),
    )
    federation_id = coordinator.create(config, stories(0, 10))
    words, key = vocabulary("byte_level").to_bytes(), new_key()
    with coordinator.client("worker") as worker, coordinator.client() as operator:
        worker.register_llm(federation_id, LlmRegistration(vocabulary=worker.put_artifact(words), model=CARD))
        with CoordinatorClient(coordinator.url, retry=QUICK) as stranger:
            enrolled = stranger.enrol(coordinator.enrolment_token(federation_id, "north"), key)
            receipt_keys = stranger.keys().public_keys
        with CoordinatorClient(coordinator.url, SiteKey(enrolled.site_id, key), retry=QUICK) as site:
            site.put_vocabulary(words)
            site.put_model(SiteModel(model=CARD, private_samples=5))
        operator.request_rounds(federation_id)
        if operator.federation(federation_id).current_round is None:
            build_maps(worker)
        until(lambda: operator.federation(federation_id).current_round is not None)
        running = operator.federation(federation_id).current_round
    assert running is not None
    return UploadingSite(coordinator, federation_id, enrolled.site_id, key, running.round_id, receipt_keys)


def build_maps(worker: CoordinatorClient) -> None:
    """The one map of these federations, whose parties all have one vocabulary; its content matters to nobody here."""
    queue = JobQueue(worker.queue(), "test")
    found = []
    until(lambda: bool(found.append(queue.take(0.2)) or found[-1]))
    delivery = found[-1]
    assert delivery is not None
    job = worker.claim(delivery.job_id)
    queue.acknowledge(delivery)
    queue.close()
    result = MapResult(artifact=worker.put_artifact(b"a map"))
    worker.complete_job(job.job_id, JobCompletion(attempt=job.attempt, result=result))


def worker_at(url: str, **more: Any) -> CoordinatorClient:
    return CoordinatorClient(url, StaticToken(TOKENS["worker"]), **{"retry": PATIENT, "timeout_s": 20.0, **more})
