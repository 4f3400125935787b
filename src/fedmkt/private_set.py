"""The site's own text: read once, cut into a part for training and a held-out part for the gate.

Nothing in this module is ever sent, and its refusals name lines, never what stands in them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedmkt.errors import Refusal
from fedmkt.private_formats import AS_THEY_ARE, Columns, PrivateSetRefused
from fedmkt.private_records import Problem, read_samples
from fedmkt.public_set import PublicSample

MIN_HOLDOUT = 8  # fewer say nothing about a regression
HASH_SPACE = 1 << 64


class PrivateSetTooSmall(Refusal):
    code = "private_set.too_small"
    title = "The private file has too few samples"
    remedy = "Add private text, or let less be held out: FEDMKT_PRIVATE_HOLDOUT_SHARE."


@dataclass(frozen=True)
class PrivateSet:
    """Samples in file order; `train` and `holdout` share no text."""

    train: tuple[PublicSample, ...]
    holdout: tuple[PublicSample, ...]

    def __repr__(self) -> str:
        return f"PrivateSet(train={len(self.train)}, holdout={len(self.holdout)})"


def read_private_set(
    path: Path, holdout_share: float, chat_template: str, columns: Columns = AS_THEY_ARE
) -> PrivateSet:
    """Read any format of `fedmkt.private_formats`. Raises PrivateSetRefused, which names the first bad record."""
    samples: list[PublicSample] = []
    for found in read_samples(path, chat_template, columns):
        if isinstance(found, Problem):
            raise PrivateSetRefused(f"private file: {found.place} {found.reason}; `fedmkt data check` lists all")
        samples.append(found)
    return split_private(tuple(samples), holdout_share)


def split_private(samples: tuple[PublicSample, ...], holdout_share: float) -> PrivateSet:
    """The samples whose text hashes lowest are held out: `holdout_share` of them, at least MIN_HOLDOUT.

    The choice depends on the text alone, so it stays when the file is sorted or grows, and a text that occurs twice
    is on one side.
    """
    places = [int.from_bytes(hashlib.sha256(sample.text.encode()).digest()[:8], "big") for sample in samples]
    distinct = sorted(set(places))
    if len(distinct) < 2 * MIN_HOLDOUT:
        raise PrivateSetTooSmall(
            f"{len(distinct)} different private samples, at least {2 * MIN_HOLDOUT} needed: "
            f"{MIN_HOLDOUT} are held out to see whether a round made the model worse"
        )
    share = sum(place < holdout_share * HASH_SPACE for place in distinct)
    bound = distinct[min(max(share, MIN_HOLDOUT), len(distinct) - MIN_HOLDOUT)]
    train = tuple(sample for sample, place in zip(samples, places, strict=True) if place >= bound)
    holdout = tuple(sample for sample, place in zip(samples, places, strict=True) if place < bound)
    return PrivateSet(train, holdout)
