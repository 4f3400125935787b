"""Lessons that the product does not give, made of its own parts: teachers by domain, and the mean of all of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmkt.alignment import SparseTargets
from fedmkt.lesson import Lesson, Teacher
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.selection import recompute_cross_entropy
from fedmkt.tokenized_set import tokenize_set


def assigned(teachers: Sequence[Teacher], plan: RoundPlan, *, worst: bool) -> list[Teacher]:
    """Each domain's samples from one teacher alone: the site that works in it, or the one that knows them least.

    A teacher has the name of its site, which is that of its domain; domains without a site have no expert.
    """
    domains = np.array([plan.public_set.samples[index].domain for index in plan.samples])
    losses = np.array([_losses(teacher, plan) for teacher in teachers])  # nats a byte (teachers, samples)
    found = []
    for place, teacher in enumerate(teachers):
        mine = [
            domain
            for domain in dict.fromkeys(domains.tolist())
            if (losses[:, domains == domain].mean(axis=1).argmax() == place if worst else teacher.name == domain)
        ]
        positions = np.flatnonzero(np.isin(domains, mine))
        if positions.size:
            found.append(replace(teacher, knowledge=teacher.knowledge.take(positions)))
    return found


def _losses(teacher: Teacher, plan: RoundPlan) -> list[float]:
    samples = np.array(plan.samples, np.int32)
    rows = tokenize_set(teacher.vocabulary, plan.public_set, samples, plan.max_tokens)
    values: list[float] = recompute_cross_entropy(teacher.knowledge, rows).values.tolist()
    return values


def right_teachers(lesson: Lesson, public_set: PublicSet, sites: Sequence[str]) -> tuple[int, int]:
    """Of the samples that a site teaches in a domain which has a site: how many that one teaches, and all of them."""
    pairs = [
        (name, public_set.samples[index].domain)
        for name, index in zip(lesson.taught_by, lesson.samples.tolist(), strict=True)
    ]
    chosen = [(name, domain) for name, domain in pairs if name in sites and domain in sites]
    return sum(name == domain for name, domain in chosen), len(chosen)


def equal_mixture(lessons: Sequence[Lesson]) -> Lesson:
    """The mean of the teachers' distributions on the receiver's rows; a row counts whoever supervises it."""
    first = lessons[0]
    return replace(first, targets=mean_targets([lesson.targets for lesson in lessons]))


def mean_targets(targets: Sequence[SparseTargets]) -> SparseTargets:
    """Row by row the mean over the targets that supervise it. All have the same rows."""
    rows = len(targets[0].supervised)
    voices = np.sum([one.supervised for one in targets], axis=0)
    owners = np.concatenate([np.repeat(np.arange(rows), np.diff(one.splits)) for one in targets])
    ids, probs = (np.concatenate([getattr(one, name) for one in targets]) for name in ("ids", "probs"))
    width = int(ids.max(initial=0)) + 1
    keys, places = np.unique(owners.astype(np.int64) * width + ids, return_inverse=True)
    sums = np.bincount(places, probs, len(keys))
    found = keys // width
    share = np.maximum(voices, 1)
    return SparseTargets(
        row_splits=targets[0].row_splits,
        splits=np.concatenate([[0], np.cumsum(np.bincount(found, minlength=rows))]).astype(np.int32),
        ids=(keys % width).astype(np.int32),
        probs=(sums / share[found]).astype(np.float32),
        residual=(np.sum([one.residual for one in targets], axis=0) / share).astype(np.float32),
        supervised=voices > 0,
    )
