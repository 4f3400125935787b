"""The one thing that a site should do now."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fedmkt.protocol.configuration import MapMethod
from fedmkt.protocol.messages import Digest, Id, Message


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
