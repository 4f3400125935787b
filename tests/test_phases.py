"""The phases of a round, on tiny real models: what is shared, what a gate keeps, what is undone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmkt.knowledge import Knowledge
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.knowledge_file import KnowledgeFileUnreadable, read_knowledge_file, write_knowledge_file
from fedmkt.lesson import Lesson, prepare_lesson
from fedmkt.ml.adapters import Adapter, pack_adapter, unpack_adapter
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.extraction import WIDE_TOP_K, WIDE_TOP_P, extract
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import (
    Clock,
    Progress,
    apply_phase,
    distil_phase,
    gate,
    own_knowledge,
    private_epochs,
    private_phase,
    public_evaluations,
    undone_on_error,
)
from fedmkt.ml.training import TrainingDiverged
from fedmkt.private_set import split_private
from fedmkt.protocol import (
    ApplyReport,
    DistillationConfig,
    Evaluation,
    GateConfig,
    GateReport,
    KnowledgeConfig,
    OptimizerConfig,
    PrivateConfig,
    PublicSetConfig,
    SelectionReport,
    TrainingReport,
)
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import NoSuchSlice, RoundPlan
from fedmkt.stopping import StopFlag
from live_coordinator import stories, tiny_config
from tiny_models import POSITIONS, save_tiny

PUBLIC = PublicSet.from_jsonl(stories(0, 20, domain="first") + stories(20, 20, domain="second"))
PRIVATE = split_private(PublicSet.from_jsonl(stories(100, 24)).samples, 0.1)
STRICT = GateConfig(max_regression_bits_per_byte=0.0)


def plan_of(**changes: object) -> RoundPlan:
    return RoundPlan("fed_0123456789abcdef", 3, 1, tiny_config(("north",), **changes), PUBLIC)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama")
    return folder


@pytest.fixture(scope="module")
def skilled(model: Path) -> bytes:
    """An adapter with which that model predicts these texts much better than chance: one that can get worse."""
    party = Party(load_base(model, device="cpu"), plan_of().config.lora, seed=5)
    config = plan_of(site_optimizer=OptimizerConfig(batch_size=8, learning_rate=1e-2)).config
    private_phase(party, PRIVATE.train, config, epochs=12)
    return party.adapter_bytes()


@pytest.fixture(scope="module")
def sure_party(tmp_path_factory: pytest.TempPathFactory) -> Party:
    """One whose tokens differ so much in probability that float32 knows no ties."""
    folder = save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2")
    return Party(load_base(folder, device="cpu"), plan_of().config.lora, seed=5)


@pytest.fixture
def party(model: Path) -> Party:
    return Party(load_base(model, device="cpu"), plan_of().config.lora, seed=5)


def spoil(party: Party) -> None:
    """All that was learned is forgotten, and no two steps can make that good."""
    with torch.no_grad():
        for weight in party.weights.values():
            weight.zero_()


class SpoilingTeach:
    """A lesson before which the party is spoilt, so that it gets worse for certain."""

    def __init__(self, plan: RoundPlan, party: Party) -> None:
        self._plan, self._party = plan, party

    def __call__(self, own: Knowledge) -> Lesson:
        spoil(self._party)
        return Teach(self._plan, self._party)(own)


class Teach:
    """A lesson of the party's own soft targets."""

    def __init__(self, plan: RoundPlan, party: Party) -> None:
        self._plan, self._party = plan, party

    def __call__(self, own: Knowledge) -> Lesson:
        config = self._plan.config.distillation
        return prepare_lesson(self._plan.public_set, own, self._party.vocabulary, [], config, self._plan.max_tokens)


# ---------------------------------------------------------------------------------------------------------- the plan


def test_a_round_uses_its_slice_and_nobody_trains_on_the_held_out_part() -> None:
    plan = plan_of(public_set=PublicSetConfig(slices=2, holdout_share=0.2))
    held = {sample.id for sample in plan.holdout}
    assert len(plan.samples) == 16
    assert len(held) == 8
    assert not held & {PUBLIC.samples[index].id for index in plan.samples}


def test_the_papers_profile_uses_all_that_is_not_held_out() -> None:
    paper = plan_of(distillation=DistillationConfig(profile="paper", rule="dual_min_ce", projection="mined"))
    slices = PUBLIC.parts(2, 0.2).slices
    assert paper.samples == tuple(sorted(slices[0] + slices[1]))
    assert len(paper.samples) == 32


@pytest.mark.parametrize("slice_index", [-1, 2])
def test_a_slice_that_does_not_exist_is_refused(slice_index: int) -> None:
    with pytest.raises(NoSuchSlice, match=f"slice {slice_index} of a public set that is cut into 2"):
        RoundPlan("fed_0123456789abcdef", 1, slice_index, tiny_config(("north",)), PUBLIC)


def test_a_site_trains_longer_before_its_first_upload() -> None:
    config = tiny_config(("north",), private=PrivateConfig(first_epochs=3, epochs=0.5))
    assert [private_epochs(config, trained) for trained in (0, 1, 7)] == [3, 0.5, 0.5]


# --------------------------------------------------------------------------------------------------------- knowledge


def test_wide_knowledge_is_never_narrower_than_what_is_shared(party: Party) -> None:
    wide = own_knowledge(party, plan_of(), adapter_version=4)
    assert (wide.header.top_k, wide.header.top_p, wide.header.adapter_version) == (WIDE_TOP_K, WIDE_TOP_P, 4)
    config = KnowledgeConfig(top_k=300, top_p=1.0, max_tokens=POSITIONS)
    wider = own_knowledge(party, plan_of(knowledge=config), adapter_version=0)
    assert (wider.header.top_k, wider.header.top_p) == (300, 1.0)
    assert np.diff(wider.entry_splits).max() == 300


@pytest.mark.parametrize(("top_k", "top_p"), [(16, 0.98), (1, 0.5), (200, 0.3), (5, 1.0), (64, 1e-9)])
def test_what_is_shared_is_what_a_narrow_extraction_gives(sure_party: Party, top_k: int, top_p: float) -> None:
    plan = plan_of(knowledge=KnowledgeConfig(top_k=top_k, top_p=top_p, max_tokens=POSITIONS))
    shared = shared_knowledge(own_knowledge(sure_party, plan, adapter_version=2), plan.config.knowledge)
    direct = extract(
        sure_party,
        PUBLIC,
        plan.samples,
        federation_id=plan.federation_id,
        round_number=3,
        slice_index=1,
        adapter_version=2,
        top_k=top_k,
        top_p=top_p,
        max_tokens=POSITIONS,
    )
    assert shared.equals(direct)


def test_what_is_shared_by_hand(party: Party) -> None:
    own = own_knowledge(party, plan_of(), adapter_version=0)
    config = KnowledgeConfig(top_k=8, top_p=0.6, max_tokens=POSITIONS)
    shared = shared_knowledge(own, config)
    for row in range(0, own.rows, 97):
        entries = slice(own.entry_splits[row], own.entry_splits[row + 1])
        ranked = sorted(zip(-own.logprobs[entries], own.token_ids[entries], strict=True))
        kept: list[int] = []
        mass = 0.0
        while ranked and len(kept) < 8 and mass < 0.6:
            logprob, token = ranked.pop(0)
            kept.append(int(token))
            mass += math.exp(-logprob)
        assert shared.token_ids[shared.entry_splits[row] : shared.entry_splits[row + 1]].tolist() == sorted(kept)


def test_wide_knowledge_survives_a_file_bit_for_bit(party: Party, tmp_path: Path) -> None:
    own = own_knowledge(party, plan_of(), adapter_version=1)
    write_knowledge_file(tmp_path / "own.safetensors", own)
    assert read_knowledge_file(tmp_path / "own.safetensors").equals(own)
    (tmp_path / "own.safetensors").write_bytes((tmp_path / "own.safetensors").read_bytes()[:-10])
    with pytest.raises(KnowledgeFileUnreadable, match=r"own\.safetensors does not read"):
        read_knowledge_file(tmp_path / "own.safetensors")


# -------------------------------------------------------------------------------------------------------------- gate


def rated(bits: float) -> dict[str, Evaluation]:
    return {"all": Evaluation(bits_per_byte=bits, accuracy=0.5, samples=8)}


@pytest.mark.parametrize(
    ("before", "after", "decision"),
    [(2.0, 1.5, "kept"), (2.0, 2.0, "kept"), (2.0, 2.25, "kept"), (2.0, 2.2501, "rolled_back")],
)
def test_the_gate_keeps_what_is_at_most_the_allowed_bit_worse(before: float, after: float, decision: str) -> None:
    report = gate(rated(before), rated(after), GateConfig(max_regression_bits_per_byte=0.25))
    assert report.decision == decision
    assert (report.before_bits_per_byte, report.after_bits_per_byte) == (before, after)
    assert bool(report.reason) == (decision == "rolled_back")


def test_a_gate_that_closes_says_by_how_much() -> None:
    report = gate(rated(2.0), rated(2.5), GateConfig(max_regression_bits_per_byte=0.125))
    assert report.reason == "0.5000 bits per byte worse on held-out text, at most 0.125 allowed"


# ----------------------------------------------------------------------------------------------------------- private


def test_private_training_learns_and_says_how_far_it_is(party: Party) -> None:
    seen: list[tuple[str, int, int]] = []
    before = party.adapter_bytes()
    report = private_phase(party, PRIVATE.train, plan_of().config, epochs=2, progress=lambda *step: seen.append(step))
    assert report is not None
    assert seen == [("training on private text", step, 4) for step in (1, 2, 3, 4)]
    assert (report.steps, party.steps) == (4, 4)
    assert party.adapter_bytes() != before


def test_no_epochs_are_no_training(party: Party) -> None:
    assert private_phase(party, PRIVATE.train, plan_of().config, epochs=0) is None
    assert party.steps == 0


def poison(party: Party) -> None:
    """From now on every loss is NaN."""
    with torch.no_grad():
        next(iter(party.weights.values())).fill_(float("nan"))


def test_a_private_training_that_diverges_leaves_the_party_as_it_was(party: Party) -> None:
    private_phase(party, PRIVATE.train, plan_of().config, epochs=1)
    before, steps = party.adapter_bytes(), party.steps
    with pytest.raises(TrainingDiverged):
        private_phase(party, PRIVATE.train, plan_of().config, epochs=2, progress=lambda *step: poison(party))
    assert (party.adapter_bytes(), party.steps) == (before, steps)


def test_an_interrupted_phase_leaves_the_party_as_it_was(party: Party) -> None:
    before = party.snapshot()

    def interrupt(step: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        private_phase(party, PRIVATE.train, plan_of().config, epochs=2, progress=interrupt)
    assert party.steps == before.steps
    assert all(bool((party.weights[name].cpu() == value).all()) for name, value in before.weights.items())


def test_what_goes_well_is_not_undone(party: Party) -> None:
    with undone_on_error(party):
        party.steps = 17
    assert party.steps == 17


# ------------------------------------------------------------------------------------------------------------- apply


def test_a_site_that_learned_keeps_it_and_reports_the_public_part(party: Party) -> None:
    plan, clock = plan_of(), Clock()
    before = party.adapter_bytes()
    applied = apply_phase(
        party,
        plan,
        None,
        Teach(plan, party),
        private=PRIVATE.train,
        private_holdout=PRIVATE.holdout,
        clock=clock,
    )
    assert applied.gate.decision == "kept"
    assert applied.training is not None
    assert applied.training.steps == 2
    assert party.adapter_bytes() != before
    assert set(applied.after) == {"all", "first", "second"}
    assert applied.after == public_evaluations(party, plan)
    assert applied.selection.taught == {"self": 16, "none": 0}
    assert list(clock.seconds) == ["evaluate", "own_knowledge", "lesson", "train"]


def test_a_site_that_got_worse_on_its_own_text_is_put_back_bit_for_bit(party: Party, skilled: bytes) -> None:
    plan = plan_of(gate=STRICT)
    party.load_adapter_bytes(skilled)
    private_phase(party, PRIVATE.train, plan_of().config, epochs=1)
    before, steps, public = party.adapter_bytes(), party.steps, public_evaluations(party, plan)
    applied = apply_phase(
        party, plan, None, SpoilingTeach(plan, party), private=PRIVATE.train, private_holdout=PRIVATE.holdout
    )
    assert applied.gate.decision == "rolled_back"
    assert applied.gate.before_bits_per_byte is not None
    assert applied.gate.after_bits_per_byte is not None
    assert applied.gate.after_bits_per_byte > applied.gate.before_bits_per_byte
    assert "worse on held-out text, at most 0 allowed" in applied.gate.reason
    assert (party.adapter_bytes(), party.steps) == (before, steps)
    assert applied.after == public, "what it ended up with, not what it tried"


def test_a_lesson_that_diverges_is_rolled_back_with_the_reason(party: Party) -> None:
    plan = plan_of()
    before = party.adapter_bytes()

    def teach(own: Knowledge) -> Lesson:
        poison(party)
        return Teach(plan, party)(own)

    applied = apply_phase(party, plan, None, teach, private=PRIVATE.train, private_holdout=PRIVATE.holdout)
    assert applied.gate.decision == "rolled_back"
    assert applied.gate.reason.startswith("training.nan: step 1: the loss is not finite")
    assert applied.training is None
    assert party.adapter_bytes() == before


def test_an_llm_whose_lesson_diverges_has_nothing_to_hand_over(party: Party) -> None:
    plan = plan_of()
    before = party.adapter_bytes()

    def teach(own: Knowledge) -> Lesson:
        poison(party)
        return Teach(plan, party)(own)

    distilled = distil_phase(party, plan, own_knowledge(party, plan, adapter_version=0), teach)
    assert distilled.gate is not None
    assert distilled.gate.reason.startswith("training.nan: ")
    assert distilled.tried is None
    assert distilled.after == distilled.before
    assert party.adapter_bytes() == before


def test_an_averaged_adapter_comes_first_and_knowledge_is_made_anew(party: Party) -> None:
    plan = plan_of()
    start = party.adapter_bytes()
    stale = own_knowledge(party, plan, adapter_version=0)
    private_phase(party, PRIVATE.train, plan.config, epochs=1)
    averaged = party.adapter_bytes()
    fresh = own_knowledge(party, plan, adapter_version=9)
    party.load_adapter_bytes(start)
    heard: list[Knowledge] = []

    def teach(own: Knowledge) -> Lesson:
        heard.append(own)
        return Teach(plan, party)(own)

    apply_phase(
        party,
        plan,
        stale,
        teach,
        private=PRIVATE.train,
        private_holdout=PRIVATE.holdout,
        averaged=averaged,
        adapter_version=9,
    )
    assert heard[0].equals(fresh)
    assert not heard[0].equals(stale)


def test_an_average_that_makes_a_site_worse_is_taken_back_with_the_adapter_it_replaced(
    party: Party, skilled: bytes
) -> None:
    plan = plan_of(gate=STRICT)
    party.load_adapter_bytes(skilled)
    good = unpack_adapter(skilled)
    spoilt = pack_adapter(Adapter(good.config, {name: 1000 * value for name, value in good.tensors.items()}))
    before, steps = party.adapter_bytes(), party.steps
    applied = apply_phase(
        party,
        plan,
        None,
        Teach(plan, party),
        private=PRIVATE.train,
        private_holdout=PRIVATE.holdout,
        averaged=spoilt,
    )
    assert applied.gate.decision == "rolled_back"
    assert (party.adapter_bytes(), party.steps) == (before, steps)


# ------------------------------------------------------------------------------------ apply with differential privacy


def test_without_private_text_nothing_is_replayed_and_the_public_part_decides(party: Party, skilled: bytes) -> None:
    plan = plan_of(gate=STRICT)
    party.load_adapter_bytes(skilled)
    before, public = party.adapter_bytes(), public_evaluations(party, plan)
    applied = apply_phase(party, plan, None, SpoilingTeach(plan, party), private=None, private_holdout=())
    assert applied.training is not None
    assert applied.training.samples == len(plan.samples), "with replay it would be twice as many"
    assert applied.gate.decision == "rolled_back"
    assert applied.gate.before_bits_per_byte == public["all"].bits_per_byte
    assert party.adapter_bytes() == before


def test_with_nothing_held_out_a_site_without_private_text_keeps_what_it_learned(party: Party) -> None:
    plan = plan_of(public_set=PublicSetConfig(slices=2, holdout_share=0.0))
    before = party.adapter_bytes()
    applied = apply_phase(party, plan, None, Teach(plan, party), private=None, private_holdout=())
    assert applied.gate == GateReport(decision="kept")
    assert party.adapter_bytes() != before

    def teach(own: Knowledge) -> Lesson:
        poison(party)
        return Teach(plan, party)(own)

    kept = party.adapter_bytes()
    applied = apply_phase(party, plan, None, teach, private=None, private_holdout=())
    assert applied.gate.decision == "rolled_back"
    assert applied.gate.reason.startswith("training.nan: ")
    assert (applied.gate.before_bits_per_byte, party.adapter_bytes()) == (None, kept)


def test_a_report_goes_without_the_figures_of_private_text() -> None:
    loss = TrainingReport(steps=4, samples=32, seconds=1.0, first_loss_nats=3.0, last_loss_nats=2.0)
    report = ApplyReport(
        selection=SelectionReport(taught={"llm": 3}),
        gate=gate(rated(2.0), rated(2.5), STRICT),
        before=rated(3.0),
        after=rated(2.9),
        training=(loss, loss),
        bytes_up=10,
        bytes_down=20,
    )
    bare = report.without_local_metrics()
    assert bare.gate == GateReport(decision="rolled_back")
    assert bare.training == (TrainingReport(steps=4, samples=32, seconds=1.0),) * 2
    assert (bare.before, bare.after, bare.selection) == (report.before, report.after, report.selection)
    assert ApplyReport.model_validate_json(bare.model_dump_json()) == bare


# ------------------------------------------------------------------------------------------------------------ distil


def test_the_llm_learns_and_hands_over_the_adapter_it_got(party: Party) -> None:
    plan = plan_of()
    distilled = distil_phase(party, plan, own_knowledge(party, plan, adapter_version=0), Teach(plan, party))
    assert distilled.gate is not None
    assert distilled.gate.decision == "kept"
    assert distilled.tried == party.adapter_bytes()
    assert distilled.after == public_evaluations(party, plan)
    assert distilled.before["all"].bits_per_byte == distilled.gate.before_bits_per_byte


def test_an_llm_that_got_worse_is_put_back_and_still_shows_what_it_tried(party: Party, skilled: bytes) -> None:
    plan = plan_of(gate=STRICT)
    party.load_adapter_bytes(skilled)
    before = party.adapter_bytes()
    distilled = distil_phase(party, plan, own_knowledge(party, plan, adapter_version=0), SpoilingTeach(plan, party))
    assert distilled.gate is not None
    assert distilled.gate.decision == "rolled_back"
    assert party.adapter_bytes() == before
    assert distilled.tried not in (None, before)
    assert distilled.after["all"].bits_per_byte == distilled.gate.after_bits_per_byte


def test_without_a_held_out_part_there_is_no_gate(party: Party) -> None:
    plan = plan_of(public_set=PublicSetConfig(slices=2, holdout_share=0.0))
    distilled = distil_phase(party, plan, own_knowledge(party, plan, adapter_version=0), Teach(plan, party))
    assert distilled.gate is None
    assert (distilled.before, distilled.after) == ({}, {})
    assert distilled.tried == party.adapter_bytes()


def test_a_lesson_that_cannot_be_prepared_changes_nothing(party: Party) -> None:
    plan = plan_of()

    def teach(own: Knowledge) -> Lesson:
        raise ConnectionError

    before = party.adapter_bytes()
    with pytest.raises(ConnectionError):
        distil_phase(party, plan, own_knowledge(party, plan, adapter_version=0), teach)
    assert party.adapter_bytes() == before


def test_the_clock_adds_up_what_happens_twice() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.measure("evaluate"):
            json.dumps("something")
    assert list(clock.rounded) == ["evaluate"]
    assert clock.seconds["evaluate"] > 0


# ------------------------------------------------------------------------------------------------------ checkpoints


class Killed(Exception):
    """The process ended here."""


def killed_after(steps: int) -> Progress:
    def progress(step: str, done: int, total: int, /) -> None:
        if step.startswith(("training", "learning")) and done == steps:
            raise Killed

    return progress


def checkpoints_in(folder: Path, key: str = "round_1 private") -> Checkpoints:
    return Checkpoints(folder / "jobs" / "checkpoint.safetensors", key, interval_s=0.0)


def test_a_private_training_that_was_killed_ends_where_an_unbroken_one_ends(
    party: Party, model: Path, tmp_path: Path
) -> None:
    config = plan_of().config
    private_phase(party, PRIVATE.train, config, epochs=3)
    broken = Party(load_base(model, device="cpu"), config.lora, seed=5)
    for steps in (1, 4):
        with pytest.raises(Killed):
            private_phase(
                broken,
                PRIVATE.train,
                config,
                epochs=3,
                checkpoints=checkpoints_in(tmp_path),
                progress=killed_after(steps),
            )
        assert broken.steps == 0, "in memory it is undone; the file has it"
    report = private_phase(broken, PRIVATE.train, config, epochs=3, checkpoints=checkpoints_in(tmp_path))
    assert report is not None
    assert report.steps == 2, "of six, four were done"
    assert (broken.adapter_bytes(), broken.steps) == (party.adapter_bytes(), party.steps)


def test_a_lesson_that_was_killed_ends_where_an_unbroken_one_ends(party: Party, model: Path, tmp_path: Path) -> None:
    plan = plan_of()
    expected = distil_phase(party, plan, own_knowledge(party, plan, adapter_version=0), Teach(plan, party))
    broken = Party(load_base(model, device="cpu"), plan.config.lora, seed=5)
    own = own_knowledge(broken, plan, adapter_version=0)
    with pytest.raises(Killed):
        distil_phase(
            broken,
            plan,
            own,
            Teach(plan, broken),
            checkpoints=checkpoints_in(tmp_path),
            progress=killed_after(1),
        )
    resumed = distil_phase(broken, plan, own, Teach(plan, broken), checkpoints=checkpoints_in(tmp_path))
    assert resumed.training is not None
    assert resumed.training.steps == 1
    assert resumed.tried == expected.tried
    assert (resumed.before, resumed.after) == (expected.before, expected.after)


def test_another_trainings_checkpoint_is_not_taken_up(party: Party, tmp_path: Path) -> None:
    config = plan_of().config
    with pytest.raises(Killed):
        private_phase(
            party, PRIVATE.train, config, epochs=1, checkpoints=checkpoints_in(tmp_path), progress=killed_after(1)
        )
    assert checkpoints_in(tmp_path, "round_2 private").resume(party) == 0
    party.steps = 1
    assert checkpoints_in(tmp_path).resume(party) == 0, "it began from another state"
    party.steps = 0
    assert checkpoints_in(tmp_path).resume(party) == 1
    checkpoints_in(tmp_path).clear()
    assert checkpoints_in(tmp_path).resume(party) == 0


def test_a_torn_checkpoint_is_left_aside(party: Party, tmp_path: Path) -> None:
    path = tmp_path / "jobs" / "checkpoint.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"\x10\x00\x00")
    assert checkpoints_in(tmp_path).resume(party) == 0


def test_a_checkpoint_is_written_when_the_program_is_told_to_stop_and_not_after_every_step(
    party: Party, tmp_path: Path
) -> None:
    stop = StopFlag()
    path = tmp_path / "checkpoint.safetensors"
    checkpoints = Checkpoints(path, "k", interval_s=3600, stop=stop)
    checkpoints.offer(party, 1, 3)
    assert not path.exists()
    stop.set()
    checkpoints.offer(party, 3, 3)
    assert not path.exists(), "all steps are done"
    checkpoints.offer(party, 2, 3)
    assert path.exists()
