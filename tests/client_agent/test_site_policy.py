"""The site's policy: the file, the hours, and what each line of it holds back; and the site's own cut of knowledge."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fedmkt.knowledge import Knowledge, WrongSettings, check_header, decode, encode
from fedmkt.outbox import NothingPending, Outbox
from fedmkt.protocol import KnowledgeConfig
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.approval import OtherRound, approve_pending
from fedmkt_client_agent.consent import Consent, EndOfWork
from fedmkt_client_agent.disclosure import coarser, disclosed
from fedmkt_client_agent.ledger import Ledger, Transfer, sending
from fedmkt_client_agent.policy import Policy, PolicyFile, PolicyUnreadable
from fedmkt_client_agent.withheld import AdapterForbidden, NotApproved, OutsideHours, OverBudget
from random_knowledge import random_header, random_knowledge

ROUND = "rnd_0123456789abcdef"
NIGHT = 'hours = "20:00-06:00"\ntime_zone = "Europe/Berlin"\n'


def at(hour: int, minute: int = 0, month: int = 1) -> datetime:
    return datetime(2026, month, 15, hour, minute, tzinfo=UTC)


NOON = at(12)


def consent(folder: Path, policy: str, now: datetime = NOON) -> Consent:
    file = folder / "policy.toml"
    file.write_text(policy)
    return Consent(PolicyFile(file), Ledger(folder), Outbox(folder), clock=lambda: now)


def knowledge_of(size: int, round_id: str = ROUND, number: int = 3) -> Transfer:
    return sending("knowledge", bytes(size), round_id=round_id, round_number=number)


# ------------------------------------------------------------------------------------------------ the file


def test_no_file_limits_nothing() -> None:
    assert PolicyFile(None).now == Policy()
    assert Policy().open_at(at(3))


def test_the_example_in_the_module_is_a_policy(tmp_path: Path) -> None:
    from fedmkt_client_agent import policy

    lines = [line[4:] for line in (policy.__doc__ or "").splitlines() if line.startswith("    ")]
    read = consent(tmp_path, "\n".join(lines)).policy
    assert set(read.model_fields_set) == set(Policy.model_fields), "every line of it, and no other"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_rounds = -1", "max_rounds: Input should be greater than or equal to 0"),
        ("max_round = 1", "max_round: Extra inputs are not permitted"),
        ('require_approval = "no"', "require_approval: Input should be a valid boolean"),
        ('hours = "8-17"\ntime_zone = "UTC"', "hours is '8-17', expected HH:MM-HH:MM"),
        ('hours = "08:00-17:00"', "hours and time_zone belong together"),
        ('hours = "08:00-17:00"\ntime_zone = "Mars/Olympus"', "time_zone is 'Mars/Olympus'"),
        ("max_rounds = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named_and_allows_nothing(tmp_path: Path, text: str, complaint: str) -> None:
    asked = consent(tmp_path, text)
    with pytest.raises(PolicyUnreadable, match="nothing is sent") as refused:
        asked.check_round(ROUND, adapter=False)
    assert complaint in refused.value.detail
    assert str(tmp_path) not in refused.value.detail
    assert not asked.is_open()


def test_a_file_is_read_again_when_it_changes_and_one_that_goes_away_forbids_everything(tmp_path: Path) -> None:
    asked = consent(tmp_path, "max_rounds = 1")
    assert asked.policy.max_rounds == 1
    (tmp_path / "policy.toml").write_text("max_rounds = 22")
    assert asked.policy.max_rounds == 22
    (tmp_path / "policy.toml").unlink()
    with pytest.raises(PolicyUnreadable, match="No such file or directory"):
        _ = asked.policy
    (tmp_path / "policy.toml").write_text("max_rounds = 22")
    assert asked.policy.max_rounds == 22


# ------------------------------------------------------------------------------------------------ hours


@pytest.mark.parametrize(
    ("hours", "local", "is_open"),
    [
        ("08:00-17:00", (8, 0), True),
        ("08:00-17:00", (7, 59), False),
        ("08:00-17:00", (17, 0), False),
        ("20:00-06:00", (23, 30), True),
        ("20:00-06:00", (5, 59), True),
        ("20:00-06:00", (6, 0), False),
        ("00:00-00:00", (12, 0), True),
    ],
)
def test_hours_may_run_over_midnight(hours: str, local: tuple[int, int], is_open: bool) -> None:
    assert Policy(hours=hours, time_zone="UTC").open_at(at(*local)) is is_open


def test_hours_are_those_of_the_named_place_summer_time_too() -> None:
    night = Policy(hours="20:00-06:00", time_zone="Europe/Berlin")
    assert night.open_at(at(19, 0, month=1))  # 20:00 in winter
    assert not night.open_at(at(17, 59, month=7))
    assert night.open_at(at(18, 0, month=7))  # 20:00 in summer


def test_outside_the_hours_nothing_begins_and_a_training_is_told_to_save_itself(tmp_path: Path) -> None:
    closed = consent(tmp_path, NIGHT, NOON)
    with pytest.raises(OutsideHours, match="works and sends 20:00-06:00 Europe/Berlin; it is 12:00 UTC"):
        closed.check_round(ROUND, adapter=False)
    with pytest.raises(OutsideHours):
        closed.check_sending(knowledge_of(1))
    assert EndOfWork(StopFlag(), closed).is_set
    assert not EndOfWork(StopFlag(), consent(tmp_path, NIGHT, at(22))).is_set


# ------------------------------------------------------------------------------------------------ budgets


def test_uploads_are_limited_one_by_one_and_all_together(tmp_path: Path) -> None:
    asked = consent(tmp_path, "max_upload_bytes = 100\nmax_total_bytes = 250")
    with pytest.raises(OverBudget, match="knowledge has 101 bytes, max_upload_bytes is 100"):
        asked.check_sending(knowledge_of(101))
    for number in range(1, 3):
        transfer = knowledge_of(100, f"rnd_{number:016x}")
        asked.check_sending(transfer)
        asked.ledger.begin(transfer)
    with pytest.raises(OverBudget, match="has 100 bytes, 200 were sent before, max_total_bytes is 250"):
        asked.check_sending(knowledge_of(100, "rnd_" + "3" * 16))
    asked.check_sending(knowledge_of(50, "rnd_" + "3" * 16))
    asked.check_sending(knowledge_of(100, f"rnd_{1:016x}"))  # the same bytes once more, after a restart


def test_rounds_are_counted_over_restarts_and_one_that_was_begun_may_end(tmp_path: Path) -> None:
    asked = consent(tmp_path, "max_rounds = 1")
    asked.check_round(ROUND, adapter=False)
    asked.ledger.begin(knowledge_of(10))
    again = consent(tmp_path, "max_rounds = 1")
    again.check_round(ROUND, adapter=False)
    with pytest.raises(OverBudget, match="has taken part in 1 rounds, max_rounds is 1"):
        again.check_round("rnd_" + "4" * 16, adapter=False)


def test_weights_are_not_sent_where_the_policy_forbids_it(tmp_path: Path) -> None:
    with pytest.raises(AdapterForbidden, match="send_adapter is false"):
        consent(tmp_path, "send_adapter = false").check_round(ROUND, adapter=True)
    consent(tmp_path, "send_adapter = false").check_round(ROUND, adapter=False)


def test_weights_are_not_sent_to_a_federation_that_never_said_it_wants_them(tmp_path: Path) -> None:
    asked = consent(tmp_path, "")
    asked.check_round(ROUND, adapter=True, agreed=True)
    asked.check_round(ROUND, adapter=False, agreed=False)
    with pytest.raises(AdapterForbidden, match="configuration does not average adapters"):
        asked.check_round(ROUND, adapter=True, agreed=False)


# ------------------------------------------------------------------------------------------------ approval


def test_an_approval_is_for_these_bytes_of_this_round(tmp_path: Path) -> None:
    asked = consent(tmp_path, "require_approval = true")
    transfer = knowledge_of(10)
    about = asked.outbox.put(asked.outbox.begin(ROUND, 3), "knowledge", bytes(10))
    with pytest.raises(NotApproved, match="round 3: 10 bytes of knowledge wait for approval"):
        asked.check_sending(transfer)
    with pytest.raises(OtherRound, match="round 3 waits, not 2"):
        approve_pending(tmp_path, 2)
    approved = approve_pending(tmp_path, 3)
    assert asked.check_sending(transfer) == approved.at
    with pytest.raises(NotApproved, match="was made anew after the approval"):
        asked.check_sending(knowledge_of(11))
    report = sending("report", b"{}", round_id=ROUND, round_number=3)
    assert asked.check_sending(report) == approved.at, "the report of an approved round needs no second one"
    with pytest.raises(NotApproved):
        asked.check_sending(knowledge_of(10, "rnd_" + "5" * 16))
    assert asked.outbox.approved(about)
    assert asked.outbox.approved(asked.outbox.put(about, "report", b"{}"))
    assert not asked.outbox.approved(asked.outbox.put(about, "knowledge", bytes(11)))
    assert about.items["knowledge"].digest == hashlib.sha256(bytes(10)).hexdigest()


def test_an_approval_changes_what_the_agent_waits_for(tmp_path: Path) -> None:
    asked = consent(tmp_path, "require_approval = true")
    asked.outbox.put(asked.outbox.begin(ROUND, 3), "knowledge", bytes(10))
    before = asked.signature()
    assert asked.signature() == before
    approve_pending(tmp_path, None)
    assert asked.signature() != before


def test_nothing_can_be_approved_where_nothing_waits(tmp_path: Path) -> None:
    with pytest.raises(NothingPending, match="the agent makes knowledge when a round begins"):
        approve_pending(tmp_path, None)


def test_an_outbox_gives_back_only_what_is_whole_and_made_with_these_settings(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    about = outbox.put(outbox.begin(ROUND, 3), "knowledge", b"one", "k=1")
    assert outbox.take(about, "knowledge", "k=1") == b"one"
    assert outbox.take(about, "knowledge", "k=2") is None
    assert Outbox(tmp_path).begin(ROUND, 3) == about
    (tmp_path / "outbox" / "knowledge").write_bytes(b"on")
    assert outbox.take(about, "knowledge", "k=1") is None
    (tmp_path / "outbox" / "about.json").write_text("{")
    assert outbox.about() is None
    assert outbox.begin("rnd_" + "6" * 16, 4).items == {}
    assert not (tmp_path / "outbox" / "knowledge").exists(), "another round's files go"


# ------------------------------------------------------------------------------------------------ disclosure


def row(logprobs: list[float], gold: float) -> Knowledge:
    """One row of one sample, token ids 0, 1, 2, ..."""
    return Knowledge(
        header=random_header(),
        samples=np.array([0], np.int32),
        row_splits=np.array([0, 1], np.int32),
        context_ends=np.array([5], np.int32),
        gold_logprobs=np.array([gold], np.float32),
        entry_splits=np.array([0, len(logprobs)], np.int32),
        token_ids=np.arange(len(logprobs), dtype=np.int32),
        logprobs=np.array(logprobs, np.float32),
    )


def test_distances_become_whole_steps_and_the_kept_mass_stays() -> None:
    # 0.6 and 0.3: ln 2 = 0.693 nats apart, which rounds to one step of 0.5. Shares 1 : e^-0.5 of the mass 0.9.
    coarse = coarser(row([np.log(0.6), np.log(0.3)], np.log(0.3)), 0.5)
    first = 0.9 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(np.exp(coarse.logprobs), [first, 0.9 - first], rtol=1e-6)
    np.testing.assert_allclose(coarse.gold_logprobs[0], coarse.logprobs[1], rtol=1e-6)


def test_a_realised_token_that_was_cut_stays_below_the_kept_ones_and_within_the_tail() -> None:
    coarse = coarser(row([np.log(0.6), np.log(0.3)], np.log(0.09)), 3.0)  # one step of 3 nats is nothing here
    assert np.exp(coarse.logprobs).tolist() == pytest.approx([0.45, 0.45])
    assert np.exp(coarse.gold_logprobs[0]) <= 0.1 * 1.0001


@pytest.mark.parametrize("step", [0.05, 0.25, 1.0])
def test_coarser_knowledge_is_still_knowledge_with_every_rows_mass(step: float) -> None:
    fine = random_knowledge(7, samples=20)
    coarse = coarser(fine, step)
    starts = fine.entry_splits[:-1]
    mass = [np.add.reduceat(np.exp(each.logprobs.astype(np.float64)), starts) for each in (fine, coarse)]
    np.testing.assert_allclose(mass[0], mass[1], rtol=1e-5)
    below = np.repeat(np.maximum.reduceat(coarse.logprobs, starts), np.diff(fine.entry_splits)) - coarse.logprobs
    np.testing.assert_allclose(below / step, np.rint(below / step), atol=1e-4)
    assert decode(encode(coarse)).rows == fine.rows
    assert coarser(fine, 0.0) is fine


def test_the_sites_own_cap_cuts_what_leaves_and_the_header_says_so() -> None:
    own = random_knowledge(3, top_k=128, top_p=0.999)
    config = KnowledgeConfig(top_k=64)
    whole, cut = (decode(disclosed(own, config, policy)) for policy in (Policy(), Policy(max_top_k=4)))
    assert (whole.header.top_k, cut.header.top_k) == (64, 4)
    assert np.diff(cut.entry_splits).max() == 4
    assert set(cut.token_ids.tolist()) <= set(whole.token_ids.tolist())
    assert decode(disclosed(own, config, Policy(max_top_k=900))).header.top_k == 64, "a cap widens nothing"


@pytest.mark.parametrize(("top_k", "fits"), [(1, True), (64, True), (65, False)])
def test_a_receiver_takes_a_smaller_k_than_the_federations_and_no_larger_one(top_k: int, fits: bool) -> None:
    header = replace(random_header(), top_k=top_k)
    expected = {name: getattr(header, name) for name in ("federation_id", "round_number", "slice_index")}
    settings = KnowledgeConfig(top_k=64, top_p=header.top_p, max_tokens=header.max_tokens)

    def check() -> None:
        check_header(
            header,
            **expected,
            public_set_digest=header.public_set_digest,
            vocabulary_fingerprint=header.vocabulary_fingerprint,
            vocabulary_size=header.vocabulary_size,
            settings=settings,
        )

    if fits:
        check()
    else:
        with pytest.raises(WrongSettings, match="top_k is 65, at most 64 expected"):
            check()


def test_a_policy_file_is_read_without_surprises_from_json_like_values() -> None:
    assert Policy.model_validate(json.loads('{"round_logprobs_nats": 1}')).round_logprobs_nats == 1.0
