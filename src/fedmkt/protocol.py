"""The wire contract between coordinator, LLM server, sites and dashboards.

Every message is a frozen pydantic model that forbids unknown fields and bounds its sizes. Times are UTC, durations are
seconds, losses are nats per byte unless the name says bits. The bytes of knowledge blobs are laid out in
`fedmkt.knowledge` and docs/protocol.md; here is only the JSON around them.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

from fedmkt.strict_numbers import guarded

PROTOCOL_VERSION = 1
PROTOCOL_HEADER = "FedMKT-Protocol"  # on every request of a program of this project, and on every answer
CHUNK_BYTES = 1 << 20  # one upload chunk; the last one may be shorter
MAX_KNOWLEDGE_BYTES = 1 << 30
MAX_VOCABULARY_BYTES = 64 << 20
MAX_ROUNDS_AT_ONCE = 10_000

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in lower-case hexadecimal")]
Name = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="lower-case name, at most 63 characters")
]
Id = Annotated[str, Field(pattern=r"^[a-z]+_[0-9a-f]{16,32}$", description="prefix and random hexadecimal digits")]
# No control characters and none that turn the direction of writing: what is shown must not steer a terminal.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
MapMethod = Literal["mined", "retokenized"]
SelectionRule = Literal["best_or_self", "dual_min_ce", "best_always"]
AverageRule = Literal["mean", "median", "trimmed_mean"]


def _storable(text: str) -> str:
    """PostgreSQL's text holds every character but one."""
    return text.replace("\x00", "\ufffd")


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return guarded(handler(source))


# ------------------------------------------------------------------------------------------------ configuration


class LoraConfig(Message):
    """LoRA adapters on every linear layer of the blocks (`targets` empty) or on the named modules."""

    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=(), max_length=64)


class OptimizerConfig(Message):
    """AdamW with a linear warm-up; state continues over rounds."""

    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=4096, description="samples per step")
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    warmup_steps: int = Field(default=10, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class KnowledgeConfig(Message):
    """What a party shares for each response row: at most `top_k` tokens, the fewest that reach `top_p`."""

    top_k: int = Field(default=64, ge=1, le=1024)
    top_p: float = Field(default=0.98, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=8, le=131072, description="longest sample in tokens; longer ones are cut")


class DistillationConfig(Message):
    """How a receiver learns from knowledge: paper sections 3.3 and 3.4, and the project's own default rule."""

    profile: Literal["default", "paper"] = Field(
        default="default",
        description="'paper' recomputes knowledge on the whole public set after training and aligns token strings; "
        "'default' works on fresh slices with byte-offset alignment",
    )
    rule: SelectionRule = "best_or_self"
    projection: Literal["prefix_buckets", "retokenized", "mined"] = "prefix_buckets"
    margin_nats_per_byte: float = Field(default=0.05, ge=0, le=10, description="how much better a teacher has to be")
    gold_weight: float = Field(default=0.5, ge=0, le=1, description="lambda: weight of the supervised term")
    temperature: float = Field(default=1.0, gt=0, le=100)
    residual_bucket: bool = True
    epochs: int = Field(default=1, ge=1, le=100, description="passes over the round's slice, per side")

    @model_validator(mode="after")
    def _as_printed(self) -> "DistillationConfig":
        if self.profile == "paper" and (self.rule, self.projection) != ("dual_min_ce", "mined"):
            raise ValueError(
                f"profile 'paper' means rule 'dual_min_ce' and projection 'mined', "
                f"here they are '{self.rule}' and '{self.projection}': set all three, or leave the profile at 'default'"
            )
        return self

    @property
    def map_method(self) -> MapMethod:
        """The vocabulary map this reads; prefix buckets fall back on re-tokenised tokens."""
        return "mined" if self.projection == "mined" else "retokenized"


class PrivateConfig(Message):
    """A site's training on its own text."""

    first_epochs: float = Field(default=2.0, ge=0, le=100, description="passes before the first upload")
    epochs: float = Field(default=1.0, ge=0, le=100, description="passes before every later upload")
    public_weight: float = Field(
        default=0.2, ge=0, le=1, description="weight of the public rows in a batch that also replays private rows"
    )


class GateConfig(Message):
    """After training, a party whose held-out loss grew by more than this goes back to where it was."""

    max_regression_bits_per_byte: float = Field(default=0.02, ge=0, le=100)


class PublicSetConfig(Message):
    """How the public set is cut: a held-out part for evaluation and gates, then slices, one a round."""

    slices: int = Field(default=4, ge=1, le=10_000)
    holdout_share: float = Field(default=0.1, ge=0, lt=1)
    chat_template: str = Field(default="{role}: {content}\n", max_length=2000)


class EvaluationConfig(Message):
    """What is measured on held-out samples beside the loss; samples with choices are always asked as questions."""

    rouge_samples: int = Field(
        default=0, ge=0, le=10_000, description="held-out prompts to answer freely and score by Rouge-L; takes long"
    )
    answer_tokens: int = Field(default=64, ge=1, le=4096, description="longest free answer")


class Schedule(Message):
    """Quorum and patience. A round never waits for ever.

    `every_s` and `rounds` are what a federation begins with; `POST .../rounds` asks for others later.
    """

    every_s: float | None = Field(
        default=None, ge=1, le=366 * 86400, description="a round every so many seconds, on one grid; null: on demand"
    )
    rounds: int | None = Field(default=None, ge=1, le=1_000_000, description="the schedule's rounds; null: no end")
    quorum: int = Field(default=1, ge=1, le=10_000)
    gather_timeout_s: float = Field(
        default=60, ge=0, le=30 * 86400, description="once a quorum is ready, how long a round waits for the others"
    )
    collect_timeout_s: float = Field(default=3600, gt=0, le=30 * 86400)
    distill_timeout_s: float = Field(default=3600, gt=0, le=30 * 86400)
    apply_timeout_s: float = Field(default=3600, gt=0, le=30 * 86400)

    @model_validator(mode="after")
    def _counts_something(self) -> "Schedule":
        if self.rounds is not None and self.every_s is None:
            raise ValueError(f"rounds is {self.rounds} but every_s is not set; set both, or ask for rounds on demand")
        return self


class FederationConfig(Message):
    """One LLM, one public set, one configuration, many sites; checked as a whole."""

    name: Name
    scenario: Literal["heterogeneous", "homogeneous", "one_to_one"] = "heterogeneous"
    sites: tuple[Name, ...] = Field(min_length=1, max_length=10_000, description="every site that may enrol")
    llm_training: bool = Field(default=True, description="false: the LLM only teaches")
    average_adapters: bool = Field(default=False, description="homogeneous only: sites go on from their adapters' mean")
    average_rule: AverageRule = Field(
        default="mean",
        description="'mean' is FedAvg by private sample count; 'median' and 'trimmed_mean' bear some sites that lie",
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    public_set: PublicSetConfig = PublicSetConfig()
    schedule: Schedule = Schedule()
    knowledge: KnowledgeConfig = KnowledgeConfig()
    distillation: DistillationConfig = DistillationConfig()
    private: PrivateConfig = PrivateConfig()
    lora: LoraConfig | None = Field(default=LoraConfig(), description="null trains every weight")
    llm_optimizer: OptimizerConfig = OptimizerConfig()
    site_optimizer: OptimizerConfig = OptimizerConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "FederationConfig":
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("a site is named twice in sites; name each once")
        if self.schedule.quorum > len(self.sites):
            raise ValueError(
                f"quorum is {self.schedule.quorum} but only {len(self.sites)} sites are named; 1 <= quorum <= sites"
            )
        if self.scenario == "one_to_one" and len(self.sites) != 1:
            raise ValueError(f"one_to_one has exactly one site, {len(self.sites)} are named")
        if self.average_adapters and self.scenario != "homogeneous":
            raise ValueError(f"average_adapters needs scenario 'homogeneous', it is '{self.scenario}'")
        if self.average_adapters and self.lora is None:
            raise ValueError("average_adapters needs lora: only adapters travel, never whole models")
        if self.average_rule != "mean" and not self.average_adapters:
            raise ValueError(f"average_rule is '{self.average_rule}' but average_adapters is off; switch it on")
        return self


# ------------------------------------------------------------------------------------------------ parties


class ModelCard(Message):
    """What a party says of its model. Shown, never trusted."""

    model_id: Line = Field(min_length=1, max_length=200)
    architecture: Line = Field(max_length=100)
    parameters: Count
    trainable_parameters: Count = 0
    device: Line = Field(default="cpu", max_length=100)


class EnrolmentTokenRequest(Message):
    site: Name = Field(description="one of the federation's named sites")


class EnrolmentToken(Message):
    site: Name
    token: str
    expires_at: datetime


class Enrolment(Message):
    token: str = Field(max_length=200)
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$", description="raw Ed25519 public key, hexadecimal")
    protocol_version: int = PROTOCOL_VERSION


class Enrolled(Message):
    site_id: Id
    federation_id: Id
    site: Name


class TokenRequest(Message):
    """RFC 7523 assertion: a JWT (EdDSA) with iss = sub = site id, aud = 'fedmkt', exp, iat and a single-use jti."""

    assertion: str = Field(max_length=4000)


class AccessToken(Message):
    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - the scheme's name, not a secret
    expires_in_s: int


class KeysView(Message):
    """The coordinator's raw Ed25519 public keys, hexadecimal, that sign receipts; the present one first."""

    public_keys: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(min_length=1)


class VocabularyReceipt(Message):
    fingerprint: Digest
    size: int
    artifact: Digest


class LlmRegistration(Message):
    """The LLM server's side of a federation: its model and, uploaded before as an artifact, its vocabulary."""

    vocabulary: Digest = Field(description="artifact: fedmkt.vocabulary.Vocabulary.to_bytes()")
    model: ModelCard


class SiteModel(Message):
    model: ModelCard
    private_samples: Count | None = Field(description="null: the site keeps it to itself")


class SiteView(Message):
    site_id: Id | None
    name: Name
    state: Literal["awaited", "enrolled", "ready", "revoked"]
    model: ModelCard | None = None
    vocabulary: Digest | None = Field(default=None, description="fingerprint")
    private_samples: Count | None = None
    last_seen_at: datetime | None = None


class SiteSelf(Message):
    """What a site may know of itself and its federation (`GET /v1/me`)."""

    federation_id: Id
    site: SiteView
    config: FederationConfig
    public_set: Digest | None = Field(description="artifact: the public set in canonical form")
    public_samples: Count


class PublicSetReceipt(Message):
    digest: Digest = Field(description="of the canonical form, which is also the artifact")
    samples: Count


class ArtifactReceipt(Message):
    digest: Digest
    size_bytes: Count
    arrived_bytes: Count = Field(description="less than size_bytes while parts are missing")


# ------------------------------------------------------------------------------------------------ measurements


class Evaluation(Message):
    """Held-out quality on one domain. bits_per_byte over response bytes; accuracy of the next token, teacher-forced.

    `choice_*` over the samples with choices, `rouge_l` over those answered freely; null where there are none.
    """

    bits_per_byte: Finite
    accuracy: Share
    samples: Count
    bytes: Count = 0
    choice_accuracy: Share | None = Field(default=None, description="questions whose right answer is the likeliest")
    choice_accuracy_per_byte: Share | None = Field(default=None, description="the same by log-likelihood per byte")
    choice_samples: Count = Field(default=0, description="questions with choices")
    rouge_l: Share | None = Field(default=None, description="mean Rouge-L F1 of free answers with the right ones")
    rouge_samples: Count = Field(default=0, description="questions answered freely")


Evaluations = Annotated[dict[str, Evaluation], Field(max_length=1000)]


class SelectionReport(Message):
    """Who taught how many public samples of the round's slice, by teacher name; 'self' and 'none' are reserved."""

    taught: dict[str, Count] = Field(default={}, max_length=10_002)
    offered: dict[str, Count] = Field(default={}, max_length=10_002, description="usable samples each teacher sent")
    better: dict[str, Count] = Field(
        default={}, max_length=10_002, description="samples on which each teacher beat the receiver"
    )
    refused: dict[str, Count] = Field(
        default={}, max_length=10_002, description="samples each teacher sent that failed verification"
    )
    supervised_rows: Count = 0
    rows: Count = 0
    transferred_gold: Finite = Field(
        default=0.0, description="gold transfer: share of supervised rows whose realised token kept its mass"
    )


class GateReport(Message):
    """Numbers are null where nothing was held out, or where a site keeps those of its private text to itself."""

    decision: Literal["kept", "rolled_back"]
    before_bits_per_byte: Finite | None = None
    after_bits_per_byte: Finite | None = None
    reason: str = Field(default="", max_length=500)


class TrainingReport(Message):
    steps: Count
    samples: Count
    seconds: Seconds
    first_loss_nats: Finite | None = None
    last_loss_nats: Finite | None = None


# ------------------------------------------------------------------------------------------------ tasks of a site


class TrainAndUpload(Message):
    kind: Literal["train_and_upload"] = "train_and_upload"
    round_id: Id
    round_number: int
    slice_index: int
    upload_adapter: bool = Field(description="homogeneous federations that average adapters")
    deadline: datetime


class Apply(Message):
    kind: Literal["apply"] = "apply"
    round_id: Id
    round_number: int
    slice_index: int
    knowledge: Digest = Field(description="artifact: the LLM's knowledge on the slice")
    llm_vocabulary: Digest = Field(description="fingerprint of the LLM's vocabulary")
    llm_vocabulary_artifact: Digest
    vocabulary_maps: dict[MapMethod, Digest] = Field(description="artifacts: LLM -> this site")
    averaged_adapter: Digest | None = None
    deadline: datetime


class Wait(Message):
    kind: Literal["wait"] = "wait"
    until: datetime = Field(description="ask again then at the latest; a long poll may ask again at once")
    reason: str = Field(max_length=500)


class Finished(Message):
    kind: Literal["finished"] = "finished"
    reason: str = Field(max_length=500)


Task = Annotated[TrainAndUpload | Apply | Wait | Finished, Field(discriminator="kind")]


class TaskEnvelope(Message):
    task: Task


# ------------------------------------------------------------------------------------------------ uploads


class Manifest(Message):
    """What a site is about to send for a round, signed with the key it enrolled with."""

    kind: Literal["knowledge", "adapter"] = "knowledge"
    round_id: Id
    digest: Digest
    size_bytes: int = Field(gt=0, le=MAX_KNOWLEDGE_BYTES)
    chunks: tuple[Digest, ...] = Field(min_length=1, max_length=MAX_KNOWLEDGE_BYTES // CHUNK_BYTES)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519 over signed_bytes()")

    def signed_bytes(self) -> bytes:
        """Canonical bytes under the signature: everything but the signature itself."""
        return manifest_bytes(self.kind, self.round_id, self.digest, self.size_bytes, self.chunks)

    @model_validator(mode="after")
    def _chunk_count(self) -> "Manifest":
        expected = -(-self.size_bytes // CHUNK_BYTES)
        if len(self.chunks) != expected:
            raise ValueError(
                f"{self.size_bytes} bytes are {expected} chunks of {CHUNK_BYTES}, the manifest lists {len(self.chunks)}"
            )
        return self


def manifest_bytes(kind: str, round_id: str, digest: str, size_bytes: int, chunks: tuple[str, ...]) -> bytes:
    """The signed form of a manifest: one field a line, chunk digests last."""
    return "\n".join(["fedmkt-manifest-1", kind, round_id, digest, str(size_bytes), *chunks]).encode()


class UploadState(Message):
    upload_id: Id
    missing: tuple[int, ...]
    complete: bool
    arrived: dict[str, Count] = Field(
        default={},
        max_length=MAX_KNOWLEDGE_BYTES // CHUNK_BYTES,
        description="missing chunk, its number as text -> how many of its first bytes are there; go on from these",
    )


class UploadReceipt(Message):
    """Proof that an upload counts, signed by the coordinator (`GET /v1/keys` serves its public key)."""

    upload_id: Id
    round_id: Id
    site: Name
    kind: Literal["knowledge", "adapter"]
    digest: Digest
    size_bytes: int
    accepted_at: datetime
    signature: str

    def signed_bytes(self) -> bytes:
        lines = [
            "fedmkt-receipt-1",
            self.upload_id,
            self.round_id,
            self.site,
            self.kind,
            self.digest,
            str(self.size_bytes),
        ]
        return "\n".join([*lines, self.accepted_at.isoformat()]).encode()


class ApplyReport(Message):
    """A site's account of a round, after it learned from the LLM."""

    selection: SelectionReport
    gate: GateReport
    before: Evaluations = Field(description="held-out public part, at the round's start")
    after: Evaluations
    training: tuple[TrainingReport, ...] = Field(default=(), max_length=10)
    phase_seconds: dict[str, Seconds] = Field(default={}, max_length=50)
    bytes_up: Count
    bytes_down: Count

    def without_local_metrics(self) -> "ApplyReport":
        """The report without any figure that private text had a part in: gate and training losses."""
        return self.model_copy(
            update={
                "gate": GateReport(decision=self.gate.decision),
                "training": tuple(
                    one.model_copy(update={"first_loss_nats": None, "last_loss_nats": None}) for one in self.training
                ),
            }
        )


# ------------------------------------------------------------------------------------------------ rounds


RoundState = Literal["collecting", "distilling", "applying", "completed", "failed", "cancelled"]
SiteRoundState = Literal["expected", "uploading", "uploaded", "applied", "missed"]


class SiteProgress(Message):
    site: Name
    state: SiteRoundState
    upload_bytes: Count = 0
    uploaded_at: datetime | None = None
    applied_at: datetime | None = None
    report: ApplyReport | None = None


class LlmProgress(Message):
    step: str = Field(default="", max_length=100, description="what the job does now, in words")
    done: Count = 0
    total: Count = 0


class DistillResult(Message):
    """What the LLM server hands in when a distil job is finished."""

    knowledge: Digest = Field(description="artifact: the LLM's own knowledge on the slice")
    adapter: Digest | None = Field(
        default=None, description="artifact: tar of the new PEFT folder; null when nothing was trained"
    )
    averaged_adapter: Digest | None = None
    selection: SelectionReport
    gate: GateReport | None
    before: Evaluations
    after: Evaluations
    training: TrainingReport | None
    phase_seconds: dict[str, Seconds] = Field(default={}, max_length=50)
    refused_sites: dict[str, str] = Field(default={}, description="site -> why its knowledge was left out")


class RoundView(Message):
    round_id: Id
    federation_id: Id
    number: int
    slice_index: int
    state: RoundState
    reason: str | None
    started_at: datetime
    finished_at: datetime | None
    deadline: datetime | None = Field(description="of the present state")
    missing: tuple[Name, ...] = Field(description="sites the present state still waits for")
    sites: tuple[SiteProgress, ...]
    llm_progress: LlmProgress | None
    llm_result: DistillResult | None
    state_seconds: dict[str, Seconds] = Field(
        description="time spent in each state that has ended; the present one began at started_at plus their sum"
    )


class RoundRequest(Message):
    """Rounds on demand, or with `every_s` a schedule, which takes the place of the one before."""

    count: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="on demand: rounds to run, one after the other (null: 1); scheduled: when to stop (null: no end)",
    )
    every_s: float | None = Field(
        default=None, ge=1, le=366 * 86400, description="begin a round every so many seconds; the first one now"
    )

    @model_validator(mode="after")
    def _bounded(self) -> "RoundRequest":
        if self.every_s is None and self.count is not None and self.count > MAX_ROUNDS_AT_ONCE:
            raise ValueError(f"{self.count} rounds are asked for at once, at most {MAX_ROUNDS_AT_ONCE}; set every_s")
        return self


class ScheduleView(Message):
    """A grid of times. At each a round is asked for, unless one runs or waits; a time that was missed counts once."""

    every_s: float
    next_round_at: datetime
    rounds_left: Count | None = Field(description="null: no end")


class FederationView(Message):
    federation_id: Id
    config: FederationConfig
    created_at: datetime
    public_set: Digest | None
    public_samples: Count
    llm: ModelCard | None
    llm_vocabulary: Digest | None
    sites: tuple[SiteView, ...]
    rounds_requested: Count
    rounds_finished: Count
    current_round: RoundView | None
    waits_for: tuple[str, ...] = Field(
        description="why the next round has not begun; empty when one runs or none is due"
    )
    schedule: ScheduleView | None = Field(default=None, description="null: rounds begin on demand")
    paused_at: datetime | None = Field(default=None, description="since when no round begins; null: not paused")


class RoundPage(Message):
    items: tuple[RoundView, ...]
    next_cursor: str | None


class FederationPage(Message):
    items: tuple[FederationView, ...]
    next_cursor: str | None


class Event(Message):
    """One committed fact, in order. `sequence` grows by commit and never repeats."""

    sequence: int
    at: datetime
    kind: str = Field(max_length=100, description="dotted, e.g. round.state")
    federation_id: Id
    round_id: Id | None = None
    site: Name | None = None
    data: dict[str, str | int | float | bool | None] = {}


class EventPage(Message):
    items: tuple[Event, ...]
    next_cursor: str | None


class AdapterView(Message):
    """One committed version of the LLM's adapter. Version 0 is the bare base model."""

    version: int = Field(ge=0)
    parent: int | None
    round_id: Id | None
    artifact: Digest | None
    created_at: datetime
    promoted: bool
    evaluations: Evaluations
    knowledge: dict[str, Digest] = Field(default={}, description="site -> knowledge it learned from")


class AdapterRollback(Message):
    to_version: int | None = Field(default=None, ge=0, le=2**31 - 1, description="null: the parent")


class AdapterPage(Message):
    items: tuple[AdapterView, ...]
    next_cursor: str | None


# ------------------------------------------------------------------------------------------------ jobs


class UploadedKnowledge(Message):
    site: Name
    knowledge: Digest
    vocabulary: Digest = Field(description="fingerprint")
    vocabulary_artifact: Digest
    vocabulary_maps: dict[MapMethod, Digest] = Field(description="artifacts: site -> LLM")
    adapter: Digest | None = None
    private_samples: Count = 0


class DistillJob(Message):
    kind: Literal["distill"] = "distill"
    federation_id: Id
    round_id: Id
    round_number: int
    slice_index: int
    config: FederationConfig
    public_set: Digest
    adapter: Digest | None = Field(
        description="artifact: the promoted adapter to start from; null for the bare base model"
    )
    uploads: tuple[UploadedKnowledge, ...]
    traceparent: str | None = Field(default=None, description="W3C trace context of what ordered the job")


class MapJob(Message):
    kind: Literal["vocabulary_map"] = "vocabulary_map"
    federation_id: Id
    teacher: Digest
    student: Digest
    teacher_artifact: Digest
    student_artifact: Digest
    method: MapMethod
    traceparent: str | None = Field(default=None, description="W3C trace context of what ordered the job")


class MapResult(Message):
    artifact: Digest


class JobView(Message):
    job_id: Id
    state: Literal["queued", "running", "done", "failed"]
    attempt: int
    payload: Annotated[DistillJob | MapJob, Field(discriminator="kind")]
    lease_expires_at: datetime | None
    lease_s: float
    progress: LlmProgress | None = None
    reason: str | None = None


class Heartbeat(Message):
    attempt: int = Field(description="the attempt that was claimed; another one means that the lease was lost")
    progress: LlmProgress | None = None


class HeartbeatReply(Message):
    lease_expires_at: datetime
    cancelled: bool


class JobCompletion(Message):
    attempt: int
    result: DistillResult | MapResult


class JobFailure(Message):
    attempt: int
    reason: Annotated[str, AfterValidator(_storable)] = Field(min_length=1, max_length=2000)
    retry: bool = True


class QueueView(Message):
    """Where a worker finds the queue that carries job ids."""

    redis_url: str
    stream: str
    group: str


# ------------------------------------------------------------------------------------------------ audit log


FIRST_DIGEST = "0" * 64  # what the first row of an audit log follows


class AuditEntry(Message):
    """One act. `digest` is SHA-256 over `chained_bytes()`, which name the digest of the row before."""

    sequence: int = Field(ge=1, description="1, 2, 3, ... without a gap")
    at: datetime
    federation_id: Id | None = None
    role: str = Field(max_length=16, description="operator, viewer, worker, site, anyone, or system")
    actor: str = Field(max_length=64, description="a site's id, the beginning of a token's SHA-256, or an address")
    action: str = Field(max_length=100, description="dotted, e.g. site.revoked")
    target: str = Field(max_length=200, description="what it was done to: an id or a name")
    data: dict[str, str | int | float | bool | None] = {}
    previous: Digest
    digest: Digest

    def chained_bytes(self) -> bytes:
        """Canonical bytes under the digest: JSON with sorted keys, no spaces, ASCII, everything but the digest."""
        fields = self.model_dump(exclude={"digest"}) | {
            "at": self.at.astimezone(UTC).isoformat(timespec="microseconds")
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def audit_digest(entry: AuditEntry) -> str:
    return hashlib.sha256(entry.chained_bytes()).hexdigest()


class AuditPage(Message):
    items: tuple[AuditEntry, ...]
    next_cursor: str | None


class AuditHead(Message):
    """The signed end of the audit log: who keeps one sees later whether the rows up to it are still there."""

    sequence: Count = Field(description="of the last row; 0 when there is none")
    digest: Digest
    at: datetime
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$", description="one of GET /v1/keys")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519 over signed_bytes()")

    def signed_bytes(self) -> bytes:
        at = self.at.astimezone(UTC).isoformat(timespec="microseconds")
        return "\n".join(["fedmkt-audit-head-1", str(self.sequence), self.digest, at]).encode()


# ------------------------------------------------------------------------------------------------ webhooks


EventKind = Annotated[
    str, Field(pattern=r"^[a-z_]{1,40}\.[a-z_]{1,40}$", description="kind of an event, e.g. round.state")
]


class WebhookRequest(Message):
    """Where to send a federation's events, and which."""

    url: str = Field(max_length=2000, pattern=r"^https?://[!-~]+$", description="absolute http or https address")
    kinds: tuple[EventKind, ...] = Field(default=(), max_length=50, description="events to send; all if empty")


class WebhookView(Message):
    webhook_id: Id
    federation_id: Id
    url: str
    kinds: tuple[EventKind, ...]
    state: Literal["active", "disabled"]
    reason: str | None = Field(description="why the last delivery failed, or why it is disabled")
    created_at: datetime
    delivered: Count = Field(description="sequence up to which events were delivered, or passed over by `kinds`")
    delivered_at: datetime | None = Field(description="last success")
    failures: Count = Field(description="attempts that failed since the last success")
    failing_since: datetime | None
    next_attempt_at: datetime | None = Field(description="null unless a failed delivery waits to be tried again")


class WebhookCreated(Message):
    webhook: WebhookView
    secret: str = Field(description="whsec_ and base64: the key of the HMAC-SHA256 in webhook-signature")


class WebhookPage(Message):
    items: tuple[WebhookView, ...]
    next_cursor: str | None


class WebhookTrial(Message):
    """What came of one test message."""

    delivered: bool
    status: int | None = Field(description="of the answer, if one came")
    reason: str | None = Field(description="why it counts as not delivered")
    seconds: Seconds


class WebhookMessage(Message):
    """What is sent: signed as Standard Webhooks asks, with `data` as GET .../events would show it."""

    type: str
    timestamp: datetime
    data: Event


# ------------------------------------------------------------------------------------------------ operations


class Version(Message):
    version: str
    protocol_version: int


class Health(Message):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = {}


class Problem(BaseModel):
    """RFC 9457 problem details with a stable code."""

    model_config = ConfigDict(frozen=True)

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str | None = None
    request_id: str | None = Field(default=None, description="names the request in the coordinator's log")


class ProblemKind(Message):
    """One code that `Problem.code` can have."""

    code: str
    status: int = Field(ge=400, le=599)
    title: str
    details: tuple[str, ...] = Field(description="what the coordinator says and advises; '...' stands for the facts")


class ProblemList(Message):
    items: tuple[ProblemKind, ...]
