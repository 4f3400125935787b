"""The fuzzed readers in the ordinary tests: their seeds, and what a fuzzer without feedback makes of them."""

import random
import time

import pytest

from fuzz.mutations import random_bytes
from fuzz.targets import TARGETS, Target

SECONDS = 1.5  # for each target, and at least
FEWEST_INPUTS = 100


@pytest.fixture(params=list(TARGETS.values()), ids=list(TARGETS))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr("fedmkt.cutting_speed.LENGTHS", (64,))
    found: Target = request.param
    return found


def test_every_seed_is_accepted(target: Target) -> None:
    assert all(target.run(seed) for seed in target.seeds())


def test_mutated_inputs_are_refused_or_read_alike_twice(target: Target) -> None:
    """Some must get past the checks and some not, or the mutations have lost touch with the format."""
    rng = random.Random(1)
    corpus = target.seeds()
    outcomes = {True: 0, False: 0}
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or outcomes[True] + outcomes[False] < FEWEST_INPUTS:
        data = target.mutate(rng.choice(corpus), rng, random_bytes(rng))
        accepted = target.run(data)
        outcomes[accepted] += 1
        if accepted and len(corpus) < 100:
            corpus.append(data)
    assert outcomes[True]
    assert outcomes[False]
