"""What an operator of a site wants to know of private text before it is trained on. Nothing of it is sent anywhere.

A report holds numbers and places (line, row or file), never text, so that it can be shown to others.
"""

import hashlib
import json
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from fedmkt.errors import Refusal
from fedmkt.private_records import Problem
from fedmkt.private_set import PrivateSetTooSmall, split_private
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.tokenized_set import BATCH_TEXTS, response_rows
from fedmkt.vocabulary import Vocabulary

NAMED = 20  # places that a report lists of each kind
POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
# What bytes of UTF-8 look like that were read as Windows-1252 once: é as Ã©, £ as Â£, ’ as â€™.
GARBLED = re.compile("Ã[\u0080-\u00bf]|Â[\u00a0-\u00bf]|â€")
REPLACED = re.compile("\ufffd")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class ModelFolderUnreadable(Refusal):
    code = "private_check.model"
    title = "The model's folder cannot be read"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of all samples; the median and the 95th percentile are lengths that occur."""

    least: int
    median: int
    percentile_95: int
    most: int
    total: int


@dataclass(frozen=True, slots=True)
class Places:
    """How many records, and where the first NAMED of them are."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenReport:
    """`limit`: tokens that a sample may have. `cut`: samples with more. `with_response_rows`: samples whose response
    begins within the limit, the only ones that teach anything.
    """

    limit: int
    lengths: Lengths
    cut: int
    cut_share: float
    with_response_rows: int
    with_response_rows_share: float


@dataclass(frozen=True, slots=True)
class Overlap:
    """Private samples whose normalised text is in the public set."""

    public_samples: int
    shared: Places
    share: float


@dataclass(frozen=True, slots=True)
class Report:
    """`usable`: the agent takes this file. `train` and `holdout` are 0 where it would not."""

    usable: bool
    samples: int
    with_prompt: int
    train: int
    holdout: int
    problems: tuple[Problem, ...]
    problem_counts: dict[str, int]
    bytes: Lengths | None
    tokens: TokenReport | None
    repeats: Places
    overlap: Overlap | None
    garbled: Places
    replaced: Places
    control: Places
    advice: tuple[str, ...]


def check_private(
    found: Iterable[PublicSample | Problem],
    word: str,
    holdout_share: float,
    vocabulary: Vocabulary | None = None,
    limit: int = 0,
    public: PublicSet | None = None,
) -> Report:
    """Look at everything that `read_samples` gives; `word` names its records, `limit` is for `vocabulary`."""
    samples: list[PublicSample] = []
    problems: list[Problem] = []
    for each in found:
        if isinstance(each, Problem):
            problems.append(each)
        else:
            samples.append(each)
    train, holdout, too_small = _split(samples, holdout_share)
    hashes = [normalised_hash(sample.text) for sample in samples]
    report = Report(
        usable=not problems and not too_small,
        samples=len(samples),
        with_prompt=sum(sample.ends for sample in samples),
        train=train,
        holdout=holdout,
        problems=tuple(problems[:NAMED]),
        problem_counts=dict(Counter(problem.kind for problem in problems)),
        bytes=_lengths([len(sample.text.encode()) for sample in samples]) if samples else None,
        tokens=_tokens(samples, vocabulary, limit) if vocabulary is not None and samples else None,
        repeats=_places(samples, word, _repeated(hashes)),
        overlap=None if public is None else _overlap(samples, word, hashes, public),
        garbled=_matching(samples, word, GARBLED),
        replaced=_matching(samples, word, REPLACED),
        control=_matching(samples, word, CONTROL),
        advice=(),
    )
    return _with_advice(report, too_small)


def normalised_hash(text: str) -> bytes:
    """SHA-256 of the text in NFKC, without case, every run of white space one space: copies that differ in form."""
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()).digest()


def usable_tokens(folder: Path, max_tokens: int) -> int:
    """`max_tokens`, or the positions that the model's config.json states where those are fewer."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        config = config.get("text_config") or config
        positions = [config.get(key) for key in POSITION_KEYS]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelFolderUnreadable(
            f"{folder} has no config.json that can be read ({type(error).__name__}); name the folder of a model"
        ) from error
    stated = [each for each in positions if isinstance(each, int) and each > 0]
    return min([max_tokens, *stated[:1]])


# ------------------------------------------------------------------------------------------------ parts


def _split(samples: list[PublicSample], holdout_share: float) -> tuple[int, int, str]:
    try:
        private = split_private(tuple(samples), holdout_share)
    except PrivateSetTooSmall as refusal:
        return 0, 0, refusal.detail
    return len(private.train), len(private.holdout), ""


def _lengths(sizes: Sequence[int]) -> Lengths:
    ordered = sorted(sizes)
    rank = -(-95 * len(ordered) // 100) - 1  # nearest rank
    return Lengths(ordered[0], statistics.median_low(ordered), ordered[rank], ordered[-1], sum(ordered))


def _tokens(samples: list[PublicSample], vocabulary: Vocabulary, limit: int) -> TokenReport:
    sizes: list[int] = []
    taught = 0
    for start in range(0, len(samples), BATCH_TEXTS):
        batch = samples[start : start + BATCH_TEXTS]
        encodings = vocabulary.encode_batch(
            [sample.text for sample in batch], add_eos=[sample.ends for sample in batch]
        )
        for sample, encoding in zip(batch, encodings, strict=True):
            rows = response_rows(encoding, sample.response_start)
            taught += bool(np.any(rows < limit))
            sizes.append(len(encoding.ids))
    cut = sum(size > limit for size in sizes)
    return TokenReport(limit, _lengths(sizes), cut, cut / len(sizes), taught, taught / len(sizes))


def _repeated(hashes: list[bytes]) -> Iterator[int]:
    seen: set[bytes] = set()
    for index, each in enumerate(hashes):
        if each in seen:
            yield index
        seen.add(each)


def _overlap(samples: list[PublicSample], word: str, hashes: list[bytes], public: PublicSet) -> Overlap:
    there = {normalised_hash(sample.text) for sample in public.samples}
    shared = _places(samples, word, (index for index, each in enumerate(hashes) if each in there))
    return Overlap(len(public), shared, shared.count / len(samples) if samples else 0.0)


def _matching(samples: list[PublicSample], word: str, pattern: re.Pattern[str]) -> Places:
    return _places(samples, word, (index for index, sample in enumerate(samples) if pattern.search(sample.text)))


def _places(samples: list[PublicSample], word: str, indices: Iterator[int]) -> Places:
    first = [f"{word} {samples[index].id}" for index in islice(indices, NAMED)]
    return Places(len(first) + sum(1 for _ in indices), tuple(first))


# ------------------------------------------------------------------------------------------------ what to do


def _with_advice(report: Report, too_small: str) -> Report:
    given = [too_small] if too_small else []
    given += [make(report) for applies, make in ADVICE if applies(report)]
    return replace(report, advice=tuple(given))


def _cut(report: Report) -> bool:
    return report.tokens is not None and report.tokens.cut > 0


def _advise_cut(report: Report) -> str:
    assert report.tokens is not None
    tokens = report.tokens
    return (
        f"{tokens.cut} samples have more than {tokens.limit} tokens, and what exceeds is not learned: split them, or "
        "ask the operator of the federation for a larger knowledge.max_tokens (no model reads beyond its positions)"
    )


def _untaught(report: Report) -> bool:
    return report.tokens is not None and report.tokens.with_response_rows < report.samples


def _advise_untaught(report: Report) -> str:
    assert report.tokens is not None
    lost = report.samples - report.tokens.with_response_rows
    return f"{lost} samples teach nothing: no response within {report.tokens.limit} tokens; shorten their prompts"


def _shared(report: Report) -> bool:
    return report.overlap is not None and report.overlap.shared.count > 0


def _advise_shared(report: Report) -> str:
    assert report.overlap is not None
    return (
        f"{report.overlap.shared.count} samples are in the public set, which every party holds: if they should be "
        "private, tell the operator of the federation before taking part; if not, drop them here"
    )


ADVICE: tuple[tuple[Callable[[Report], bool], Callable[[Report], str]], ...] = (
    (
        lambda report: bool(report.problem_counts),
        lambda report: (
            f"mend or drop {sum(report.problem_counts.values())} records: the agent refuses the file with them"
        ),
    ),
    (_cut, _advise_cut),
    (_untaught, _advise_untaught),
    (_shared, _advise_shared),
    (
        lambda report: report.repeats.count > 0,
        lambda report: (
            f"{report.repeats.count} samples repeat an earlier one: drop them, for what is repeated is memorised first"
        ),
    ),
    (
        lambda report: report.garbled.count + report.replaced.count > 0,
        lambda report: (
            f"{report.garbled.count + report.replaced.count} samples hold letters that were garbled by a "
            "wrong encoding: export them again as UTF-8"
        ),
    ),
    (
        lambda report: report.control.count > 0,
        lambda report: f"{report.control.count} samples hold control characters: remove them",
    ),
)
