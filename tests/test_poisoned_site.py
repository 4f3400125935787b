"""What one lying site of four does to the LLM, on small real models and the product's own way from wire to weights.

`pytest -m long` takes more seeds and more rounds. `python tests/poison.py 3 2` prints the figures of docs/security.md.
"""

import numpy as np
import pytest

from fedmkt.lesson import Teacher, prepare_lesson
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import own_knowledge
from fedmkt.protocol import DistillationConfig, GateConfig
from poison import (
    BLUNT,
    LIAR,
    PUBLIC,
    SITES,
    Outcome,
    Rows,
    SmallFederation,
    _rows,
    boasting,
    change,
    one_wrong_token,
    random_rows,
    right_with,
)

LONG = [
    pytest.param((seed, 6), marks=[pytest.mark.long, pytest.mark.timeout(1800)], id=f"seed {seed}, six rounds")
    for seed in (0, 1, 2)
]
PROMISED = 0.01  # how much a poisoned quarter of the sites may change the LLM's held-out loss


@pytest.fixture(scope="module", params=[pytest.param((0, 2), id="seed 0, two rounds"), *LONG])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallFederation:
    seed, rounds = request.param
    return SmallFederation(tmp_path_factory.mktemp("federation"), seed, rounds)


@pytest.fixture(scope="module")
def without(federation: SmallFederation) -> Outcome:
    """The liar left out: what the others teach, which is not little."""
    outcome = federation.run({}, without=[LIAR])
    assert outcome.bits_per_byte[-1] < 0.95 * outcome.bits_per_byte[0]
    assert sum(sum(each.taught[name] for name in SITES if name != LIAR) for each in outcome.selections) > 20
    return outcome


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lie", BLUNT)
def test_a_quarter_of_the_sites_that_lies_changes_the_llm_by_at_most_one_percent(
    federation: SmallFederation, without: Outcome, lie: str
) -> None:
    """Random distributions, inverted ones, and random ones that claim to be right: none is ever chosen to teach."""
    poisoned = federation.run({LIAR: BLUNT[lie]})
    assert abs(change(poisoned, without)) <= PROMISED
    assert poisoned.taught_by_liar == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lie", ["random", "inverted"])
def test_the_same_holds_with_the_default_margin(federation: SmallFederation, lie: str) -> None:
    distillation = federation.with_margin(DistillationConfig().margin_nats_per_byte)
    without = federation.run({}, without=[LIAR], distillation=distillation)
    poisoned = federation.run({LIAR: BLUNT[lie]}, distillation=distillation)
    assert abs(change(poisoned, without)) <= PROMISED
    assert poisoned.taught_by_liar == 0


def test_a_claim_about_the_realised_token_that_its_row_does_not_bear_is_refused(federation: SmallFederation) -> None:
    """Forged cross-entropies: the loss is recomputed from the rows, and a row that contradicts itself refused."""
    poisoned = federation.run({LIAR: boasting})
    assert poisoned.refused_of_liar == sum(each.offered["north"] for each in poisoned.selections)
    assert all(each.offered[LIAR] == 0 for each in poisoned.selections)


def test_sure_of_a_wrong_label_wins_no_sample(federation: SmallFederation, without: Outcome) -> None:
    """Nearly all mass on the token before the right one: only mass on the text itself wins."""

    def shifted(rows: Rows, rng: np.random.Generator) -> object:
        honest, gold = rows
        wrong = (gold + 1) % honest.header.vocabulary_size
        ids = np.stack([wrong, (wrong + 1) % honest.header.vocabulary_size], axis=1).astype(np.int32)
        return _rows(honest, ids, np.tile([0.99, 0.009], (gold.size, 1)), gold)

    poisoned = federation.run({LIAR: shifted})  # type: ignore[dict-item] # numpy's arrays are not told apart
    assert poisoned.taught_by_liar == 0
    assert poisoned.bits_per_byte == without.bits_per_byte


def test_the_lie_would_do_harm_if_it_were_believed(federation: SmallFederation, without: Outcome) -> None:
    """So that the tests above mean something: the same rows, taught by a rule that asks nobody."""
    believed = federation.run(
        dict.fromkeys(SITES, random_rows),
        gate=GateConfig(max_regression_bits_per_byte=100),
        distillation=DistillationConfig(rule="best_always", gold_weight=0.0),
    )
    assert sum(each.taught[name] for name in SITES for each in believed.selections) > 40
    assert change(believed, without) > 0.2


def test_the_gate_takes_back_a_lesson_that_did_harm(federation: SmallFederation) -> None:
    """Were every site a liar and every lie believed, the LLM would stay as it is."""
    rule = DistillationConfig(rule="best_always", gold_weight=0.0)
    outcome = federation.run(dict.fromkeys(SITES, random_rows), distillation=rule)
    assert set(outcome.gates) == {"rolled_back"}
    assert len(set(outcome.bits_per_byte)) == 1


# ------------------------------------------------------------------------------------------------ subtler poison


def test_right_on_the_text_and_wrong_beside_it_wins_only_with_as_much_mass_as_the_best_honest_site(
    federation: SmallFederation, without: Outcome
) -> None:
    """The bound of what a liar can put on wrong tokens: it must beat the best honest loss, so its mass beside the text
    is no more than an honest teacher's. With less on the text it teaches nothing.
    """
    for timid in (right_with(0.5), one_wrong_token(0.5)):
        outcome = federation.run({LIAR: timid})
        assert outcome.taught_by_liar == 0
        assert outcome.bits_per_byte == without.bits_per_byte


def test_what_a_liar_that_is_right_on_the_text_can_do_is_bounded_and_measured(
    federation: SmallFederation, without: Outcome
) -> None:
    """It is not within one percent, and docs/security.md says so: one wrong token everywhere costs most."""
    outcome = federation.run({LIAR: one_wrong_token(0.9)})
    assert outcome.taught_by_liar > 0
    assert 0 < change(outcome, without) < 0.05 * federation.rounds, "it adds up over rounds"
    limit = federation.config.gate.max_regression_bits_per_byte
    steps = np.diff(outcome.bits_per_byte)
    assert (steps <= limit).all(), "the gate bounds every round"


def test_rows_of_which_one_lies_are_refused_as_a_sample(federation: SmallFederation) -> None:
    """A liar cannot be honest on all rows but one: the sample is not offered."""
    llm = Party(load_base(federation._llm, device="cpu"), federation.config.lora, seed=federation.seed)
    plan = federation.plan(1, federation.config)

    def one_row(rows: Rows, rng: np.random.Generator) -> object:
        honest, _ = rows
        stated = honest.gold_logprobs.copy()
        starts, stops = honest.entry_splits[:-1], honest.entry_splits[1:]
        unsure = int(np.argmin(stated))
        stated[unsure] = honest.logprobs[starts[unsure] : stops[unsure]].max()
        changed = {name: getattr(honest, name) for name in honest.__dataclass_fields__}
        return type(honest)(**{**changed, "gold_logprobs": stated})

    teacher: Teacher = federation.teacher(LIAR, 1, llm.vocabulary, one_row)  # type: ignore[arg-type]
    own = own_knowledge(llm, plan, adapter_version=0)
    lesson = prepare_lesson(PUBLIC, own, llm.vocabulary, [teacher], plan.config.distillation, plan.max_tokens)
    assert lesson.report.refused == {LIAR: 1}
    assert lesson.report.offered == {LIAR: len(plan.samples) - 1}
