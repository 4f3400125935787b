"""One round as all its parties see it: which public samples knowledge is made of, and which are held out."""

from dataclasses import dataclass
from functools import cached_property

from fedmkt.errors import Refusal
from fedmkt.protocol import FederationConfig
from fedmkt.public_set import PublicParts, PublicSample, PublicSet


class NoSuchSlice(Refusal):
    code = "round.no_such_slice"
    title = "The public set has no such slice"
    remedy = "Number slices from 0 to one less than slices in the configuration."


@dataclass(frozen=True)
class RoundPlan:
    federation_id: str
    round_number: int
    slice_index: int
    config: FederationConfig
    public_set: PublicSet

    def __post_init__(self) -> None:
        slices = self.config.public_set.slices
        if not 0 <= self.slice_index < slices:
            raise NoSuchSlice(f"slice {self.slice_index} of a public set that is cut into {slices}, counted from 0")

    @cached_property
    def _parts(self) -> PublicParts:
        return self.public_set.parts(self.config.public_set.slices, self.config.public_set.holdout_share)

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """Public samples that knowledge is made of: the slice; in the paper's profile all that is not held out."""
        if self.config.distillation.profile == "paper":
            return tuple(sorted(index for part in self._parts.slices for index in part))
        return self._parts.slices[self.slice_index]

    @cached_property
    def holdout(self) -> tuple[PublicSample, ...]:
        """Samples that nobody trains on."""
        return tuple(self.public_set.samples[index] for index in self._parts.holdout)

    @property
    def max_tokens(self) -> int:
        return self.config.knowledge.max_tokens
