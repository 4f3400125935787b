"""One example of every message for the API's description. They are the wire models themselves, so they are valid.

Together they tell one story: federation `hospitals`, in whose first round the sites `north` and `south` teach the LLM.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel

from fedmkt import __version__, protocol
from fedmkt.protocol import PROTOCOL_VERSION

BEGAN = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
FEDERATION, SITE, ROUND = "fed_5b1f0c2a9e7d4c3b8a60", "site_0d9c8b7a6f5e4d3c2b1a", "round_1a2b3c4d5e6f708192a3"
UPLOAD, JOB, WEBHOOK = "upload_9f8e7d6c5b4a39281706", "job_00112233445566778899", "webhook_a1b2c3d4e5f60718293a"
PUBLIC_SET, KNOWLEDGE, LLM_KNOWLEDGE, ADAPTER, MAP, VOCABULARY, FINGERPRINT, LLM_FINGERPRINT, CHUNK = (
    digit * 64 for digit in "12345678a"
)
PUBLIC_KEY, SIGNATURE = "b" * 64, "c" * 128
WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BYTES = 700_123

CONFIG = protocol.FederationConfig(
    name="hospitals", sites=("north", "south"), schedule=protocol.Schedule(quorum=2, collect_timeout_s=7200)
)
CARD = protocol.ModelCard(
    model_id="Qwen/Qwen2.5-0.5B",
    architecture="Qwen2ForCausalLM",
    parameters=494_032_768,
    trainable_parameters=4_399_104,
)
BEFORE = {"all": protocol.Evaluation(bits_per_byte=1.52, accuracy=0.41, samples=120, bytes=48_230)}
AFTER = {"all": protocol.Evaluation(bits_per_byte=1.47, accuracy=0.43, samples=120, bytes=48_230)}
GATE = protocol.GateReport(decision="kept", before_bits_per_byte=1.52, after_bits_per_byte=1.47)
TRAINING = protocol.TrainingReport(steps=80, samples=1280, seconds=42.5, first_loss_nats=2.1, last_loss_nats=1.8)
SELECTION = protocol.SelectionReport(
    taught={"north": 410, "south": 320, "self": 270}, supervised_rows=98_000, rows=99_000
)
RESULT = protocol.DistillResult(
    knowledge=LLM_KNOWLEDGE,
    adapter=ADAPTER,
    selection=SELECTION,
    gate=GATE,
    before=BEFORE,
    after=AFTER,
    training=TRAINING,
)
REPORT = protocol.ApplyReport(
    selection=protocol.SelectionReport(taught={"llm": 610, "self": 390}, supervised_rows=98_000, rows=99_000),
    gate=GATE,
    before=BEFORE,
    after=AFTER,
    training=(TRAINING,),
    bytes_up=BYTES,
    bytes_down=2_400_000,
)
PROGRESS = protocol.SiteProgress(site="north", state="uploaded", upload_bytes=BYTES, uploaded_at=BEGAN)
ROUND_VIEW = protocol.RoundView(
    round_id=ROUND,
    federation_id=FEDERATION,
    number=1,
    slice_index=0,
    state="collecting",
    reason=None,
    started_at=BEGAN,
    finished_at=None,
    deadline=BEGAN + timedelta(hours=2),
    missing=("south",),
    sites=(PROGRESS, protocol.SiteProgress(site="south", state="expected")),
    llm_progress=None,
    llm_result=None,
    state_seconds={},
)
SITE_VIEW = protocol.SiteView(
    site_id=SITE,
    name="north",
    state="ready",
    model=CARD,
    vocabulary=FINGERPRINT,
    private_samples=5_000,
    last_seen_at=BEGAN,
)
FEDERATION_VIEW = protocol.FederationView(
    federation_id=FEDERATION,
    config=CONFIG,
    created_at=BEGAN - timedelta(days=1),
    public_set=PUBLIC_SET,
    public_samples=5_000,
    llm=CARD,
    llm_vocabulary=LLM_FINGERPRINT,
    sites=(SITE_VIEW, protocol.SiteView(site_id=None, name="south", state="awaited")),
    rounds_requested=1,
    rounds_finished=0,
    current_round=ROUND_VIEW,
    waits_for=(),
)
EVENT = protocol.Event(
    sequence=17,
    at=BEGAN,
    kind="round.state",
    federation_id=FEDERATION,
    round_id=ROUND,
    data={"number": 1, "before": "", "state": "collecting", "reason": None},
)
ADAPTER_VIEW = protocol.AdapterView(
    version=1,
    parent=0,
    round_id=ROUND,
    artifact=ADAPTER,
    created_at=BEGAN,
    promoted=True,
    evaluations=AFTER,
    knowledge={"north": KNOWLEDGE},
)
MAP_JOB = protocol.MapJob(
    federation_id=FEDERATION,
    teacher=FINGERPRINT,
    student=LLM_FINGERPRINT,
    teacher_artifact=VOCABULARY,
    student_artifact=VOCABULARY,
    method="retokenized",
)
JOB_VIEW = protocol.JobView(
    job_id=JOB,
    state="running",
    attempt=1,
    payload=MAP_JOB,
    lease_expires_at=BEGAN + timedelta(seconds=30),
    lease_s=30,
)
AUDIT_ENTRY = protocol.AuditEntry(
    sequence=1,
    at=BEGAN,
    federation_id=FEDERATION,
    role="operator",
    actor="0123456789abcdef",
    action="federation.created",
    target=FEDERATION,
    data={"name": "hospitals", "sites": 2},
    previous=protocol.FIRST_DIGEST,
    digest=CHUNK,
)
WEBHOOK_VIEW = protocol.WebhookView(
    webhook_id=WEBHOOK,
    federation_id=FEDERATION,
    url="https://hooks.example.org/fedmkt",
    kinds=("round.state",),
    state="active",
    reason=None,
    created_at=BEGAN,
    delivered=17,
    delivered_at=BEGAN,
    failures=0,
    failing_since=None,
    next_attempt_at=None,
)
MANIFEST = protocol.Manifest(round_id=ROUND, digest=KNOWLEDGE, size_bytes=BYTES, chunks=(CHUNK,), signature=SIGNATURE)
RECEIPT = protocol.UploadReceipt(
    upload_id=UPLOAD,
    round_id=ROUND,
    site="north",
    kind="knowledge",
    digest=KNOWLEDGE,
    size_bytes=BYTES,
    accepted_at=BEGAN,
    signature=SIGNATURE,
)
TASK = protocol.TrainAndUpload(
    round_id=ROUND, round_number=1, slice_index=0, upload_adapter=False, deadline=BEGAN + timedelta(hours=2)
)
PROBLEM_KIND = protocol.ProblemKind(
    code="round.closed",
    status=409,
    title="The round takes no more uploads",
    details=("round ... is ... since ..., uploads are taken while it is collecting; ...",),
)

_JWT = "eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJzaXRlXzAifQ.c2lnbmF0dXJl"
_MESSAGES: tuple[BaseModel, ...] = (
    CONFIG,
    FEDERATION_VIEW,
    ROUND_VIEW,
    ADAPTER_VIEW,
    JOB_VIEW,
    MANIFEST,
    RECEIPT,
    PROGRESS,
    REPORT,
    protocol.FederationPage(items=(FEDERATION_VIEW,), next_cursor=None),
    protocol.RoundPage(items=(ROUND_VIEW,), next_cursor="cm91bmRzOjE"),
    protocol.AdapterPage(items=(ADAPTER_VIEW,), next_cursor=None),
    protocol.EventPage(items=(EVENT,), next_cursor=None),
    protocol.WebhookPage(items=(WEBHOOK_VIEW,), next_cursor=None),
    protocol.AuditPage(items=(AUDIT_ENTRY,), next_cursor=None),
    protocol.AuditHead(sequence=1, digest=CHUNK, at=BEGAN, public_key=PUBLIC_KEY, signature=SIGNATURE),
    protocol.Version(version=__version__, protocol_version=PROTOCOL_VERSION),
    protocol.Health(status="ok", checks={"database": "ok", "artifacts": "ok", "redis": "ok"}),
    protocol.KeysView(public_keys=(PUBLIC_KEY,)),
    protocol.ProblemList(items=(PROBLEM_KIND,)),
    protocol.PublicSetReceipt(digest=PUBLIC_SET, samples=5_000),
    protocol.LlmRegistration(vocabulary=VOCABULARY, model=CARD),
    protocol.EnrolmentTokenRequest(site="north"),
    protocol.EnrolmentToken(site="north", token="d" * 64, expires_at=BEGAN + timedelta(days=7)),
    protocol.Enrolment(token="d" * 64, public_key=PUBLIC_KEY),
    protocol.Enrolled(site_id=SITE, federation_id=FEDERATION, site="north"),
    protocol.TokenRequest(assertion=_JWT),
    protocol.AccessToken(access_token=_JWT, expires_in_s=600),
    protocol.SiteSelf(
        federation_id=FEDERATION, site=SITE_VIEW, config=CONFIG, public_set=PUBLIC_SET, public_samples=5_000
    ),
    protocol.SiteModel(model=CARD, private_samples=5_000),
    protocol.VocabularyReceipt(fingerprint=FINGERPRINT, size=151_936, artifact=VOCABULARY),
    protocol.TaskEnvelope(task=TASK),
    protocol.RoundRequest(count=5),
    protocol.AdapterRollback(to_version=0),
    protocol.UploadState(upload_id=UPLOAD, missing=(0,), complete=False),
    protocol.ArtifactReceipt(digest=ADAPTER, size_bytes=BYTES, arrived_bytes=BYTES),
    protocol.WebhookRequest(url="https://hooks.example.org/fedmkt", kinds=("round.state",)),
    protocol.WebhookCreated(webhook=WEBHOOK_VIEW, secret=WHSEC),
    protocol.WebhookTrial(delivered=True, status=204, reason=None, seconds=0.12),
    protocol.WebhookMessage(type=EVENT.kind, timestamp=EVENT.at, data=EVENT),
    protocol.QueueView(redis_url="redis://redis:6379/0", stream="fedmkt:jobs", group="llm-servers"),
    protocol.Heartbeat(attempt=1, progress=protocol.LlmProgress(step="training", done=30, total=80)),
    protocol.HeartbeatReply(lease_expires_at=BEGAN + timedelta(seconds=30), cancelled=False),
    protocol.JobCompletion(attempt=1, result=RESULT),
    protocol.JobFailure(attempt=1, reason="CUDA out of memory", retry=True),
)
# By the model's name, as the description's schemas are called.
EXAMPLES: Mapping[str, Any] = {type(each).__name__: each.model_dump(mode="json") for each in _MESSAGES}
PARAMETERS: Mapping[str, Any] = {
    "federation_id": FEDERATION,
    "round_id": ROUND,
    "upload_id": UPLOAD,
    "job_id": JOB,
    "webhook_id": WEBHOOK,
    "name": "north",
    "digest": PUBLIC_SET,
    "index": 0,
    "version": 1,
}
RAW_BODIES: Mapping[str, str] = {
    "application/jsonl": '{"id": "q1", "prompt": "What is 2 plus 2?", "completion": " It is 4."}\n',
    "application/json": '{"...": "the bytes of Vocabulary.to_bytes()"}',
    "application/octet-stream": "bytes",
    "application/x-tar": "bytes",
    "text/plain": "bytes",
    "text/event-stream": f"id: {EVENT.sequence}\nevent: {EVENT.kind}\ndata: {EVENT.model_dump_json()}\n\n",
}
