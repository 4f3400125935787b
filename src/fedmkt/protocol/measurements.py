"""What was measured before and after learning, and who taught whom."""

from typing import Annotated, Literal

from pydantic import Field

from fedmkt.protocol.messages import Count, Finite, Message, Seconds, Share


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
