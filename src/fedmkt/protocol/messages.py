"""What every message of the wire is made of: sizes, kinds of text and numbers, and the model that all extend."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
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


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return guarded(handler(source))
