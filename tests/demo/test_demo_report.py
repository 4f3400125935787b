"""The report: what the rounds said, in DESIGN.md's form, and honest words about the control arms."""

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from fedmkt.demo.controls import RoundResult
from fedmkt.demo.report import (
    DemoReport,
    control_reports,
    party_reports,
    round_reports,
    show,
    traffic,
    verdicts,
)
from fedmkt.protocol import (
    ApplyReport,
    DistillResult,
    Evaluation,
    FederationConfig,
    GateReport,
    RoundView,
    SelectionReport,
    SiteProgress,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "a" * 64
KEPT = GateReport(decision="kept", before_bits_per_byte=2.0, after_bits_per_byte=1.9)
ROLLED_BACK = GateReport(decision="rolled_back", before_bits_per_byte=2.0, after_bits_per_byte=2.4, reason="worse")


def quality(**bits: float) -> dict[str, Evaluation]:
    return {domain: Evaluation(bits_per_byte=value, accuracy=0.25, samples=4) for domain, value in bits.items()}


def applied(before: dict[str, Evaluation], after: dict[str, Evaluation], **taught: int) -> ApplyReport:
    return ApplyReport(
        selection=SelectionReport(taught=taught),
        gate=KEPT,
        before=before,
        after=after,
        phase_seconds={"train": 3.5},
        bytes_up=1000,
        bytes_down=200,
    )


def one_round(number: int, **changes: Any) -> RoundView:
    result = DistillResult(
        knowledge=DIGEST,
        selection=SelectionReport(taught={"clinic": 5, "self": 3, "none": 0}),
        gate=KEPT,
        before=quality(all=2.0, clinic=2.0, other=2.0),
        after=quality(all=1.9, clinic=1.8, other=2.0),
        training=None,
        phase_seconds={"train": 7.0},
    )
    clinic = SiteProgress(
        site="clinic",
        state="applied",
        upload_bytes=900,
        report=applied(quality(clinic=2.0, other=3.0), quality(clinic=1.5, other=2.75), llm=6, self=2),
    )
    values: dict[str, Any] = {
        "round_id": f"rnd_{number:016x}",
        "federation_id": "fed_0123456789abcdef",
        "number": number,
        "slice_index": number - 1,
        "state": "completed",
        "reason": None,
        "started_at": START,
        "finished_at": START + timedelta(seconds=30),
        "deadline": None,
        "missing": (),
        "sites": (clinic, SiteProgress(site="absent", state="missed", upload_bytes=50)),
        "llm_progress": None,
        "llm_result": result,
        "state_seconds": {"collecting": 10.0, "distilling": 12.5, "applying": 8.0},
    }
    return RoundView(**{**values, **changes})


ROUNDS = (one_round(1), one_round(2))
DOMAINS = {"clinic": "clinic", "absent": None}


def report(rounds: tuple[RoundView, ...] = ROUNDS, **arms: float) -> DemoReport:
    """Arms: name -> what the clinic ends with on its own domain; the LLM ends 0.1 above, the other domain at 2.75."""
    histories = {
        party: {
            arm: [RoundResult(quality(clinic=2.0, other=2.0), quality(clinic=value + extra, other=other))] * len(rounds)
            for arm, value in arms.items()
        }
        for party, extra, other in (("llm", 0.1, 2.0), ("clinic", 0.0, 2.75))
    }
    return DemoReport(
        federation_id="fed_0123456789abcdef",
        config=FederationConfig(name="demo", sites=("clinic", "absent")),
        rounds=round_reports(rounds),
        parties=party_reports(rounds, DOMAINS, {}),
        controls=control_reports(histories, [each.number for each in rounds], DOMAINS),
        traffic=traffic(rounds),
        seconds={"total": 61.0},
        restarts={},
    )


def test_a_round_tells_its_seconds_and_who_taught_whom() -> None:
    (first, _) = round_reports(ROUNDS)
    assert (first.number, first.state, first.reason, first.seconds) == (1, "completed", None, 30.5)
    assert first.phase_seconds["llm"] == {"train": 7.0}
    assert first.phase_seconds["clinic"] == {"train": 3.5}
    assert first.phase_seconds["round"]["distilling"] == 12.5
    assert first.selection["llm"].taught == {"clinic": 5, "self": 3, "none": 0}
    assert first.selection["clinic"].taught == {"llm": 6, "self": 2}


def test_a_party_goes_from_its_first_before_to_its_last_after() -> None:
    llm, clinic = party_reports(ROUNDS, DOMAINS, {})
    assert (llm.name, llm.role, llm.domain) == ("llm", "llm", None)
    assert (clinic.name, clinic.role, clinic.domain) == ("clinic", "site", "clinic")
    assert clinic.before["clinic"].bits_per_byte == 2.0
    assert clinic.after["clinic"].bits_per_byte == 1.5
    assert clinic.after["clinic"].accuracy == 0.25
    assert [each.round for each in clinic.history] == [1, 2]


def test_what_the_gate_took_back_did_not_change_the_llm() -> None:
    worse = one_round(1).llm_result
    assert worse is not None
    taken_back = one_round(1, llm_result=worse.model_copy(update={"gate": ROLLED_BACK}))
    (llm, _) = party_reports([taken_back], DOMAINS, {})
    assert llm.after == llm.before


def test_a_failed_round_without_results_is_reported_with_its_reason() -> None:
    sites = (SiteProgress(site="clinic", state="missed"),)
    failed = one_round(3, state="failed", reason="1 of 2 uploads", llm_result=None, sites=sites)
    found = report((*ROUNDS, failed))
    assert (found.rounds[2].state, found.rounds[2].reason) == ("failed", "1 of 2 uploads")
    assert not found.completed
    assert report().completed


def test_bytes_of_all_rounds_are_added_up() -> None:
    found = traffic(ROUNDS)
    assert (found["clinic"].up, found["clinic"].down) == (2000, 400)
    assert (found["absent"].up, found["absent"].down) == (100, 0)  # it uploaded and never reported


def test_controls_have_the_form_of_the_parties() -> None:
    found = json.loads(report(public_only=1.6).model_dump_json())
    assert set(found) >= {"rounds", "parties", "controls", "traffic"}
    assert set(found["rounds"][0]) >= {"number", "state", "reason", "seconds", "selection"}
    assert [party["name"] for party in found["controls"]["public_only"]] == ["llm", "clinic"]
    assert found["controls"]["public_only"][1].keys() == found["parties"][1].keys()
    assert found["controls"]["public_only"][1]["after"]["clinic"]["bits_per_byte"] == 1.6


def test_the_verdict_names_gains_losses_and_ties() -> None:
    lines = list(verdicts(report(public_only=1.6, self_distillation=1.4992)))
    assert lines == [
        # LLM ends with 1.8 and 2.0; the arm with 1.7 and 2.0
        "LLM, FedMKT against public_only: better in 0, worse in 1, equal within 0.002 in 1 of 2 domains; "
        "mean difference +0.0500 bits per byte",
        # the clinic ends with 1.5 and 2.75; the arm with 1.6 and 2.75
        "sites, FedMKT against public_only: better in 1, worse in 0, equal within 0.002 in 1 of 2 domains; "
        "mean difference -0.0500 bits per byte",
        "LLM, FedMKT against self_distillation: better in 0, worse in 1, equal within 0.002 in 1 of 2 domains; "
        "mean difference +0.1004 bits per byte",
        "sites, FedMKT against self_distillation: better in 0, worse in 0, equal within 0.002 in 2 of 2 domains; "
        "mean difference +0.0004 bits per byte",
    ]


@pytest.fixture
def shown() -> str:
    out = io.StringIO()
    show(report(public_only=1.6, self_distillation=1.4), Console(file=out, width=160))
    return out.getvalue()


def test_the_table_says_where_fedmkt_is_better_and_where_not(shown: str) -> None:
    own = next(line for line in shown.splitlines() if "clinic (own)" in line)
    expected = "clinic clinic (own) 2.000 1.500 1.600 better 1.400 worse 25.0% -> 25.0%"
    assert own.split() == expected.split()
    other = next(line for line in shown.splitlines() if line.split()[:1] == ["other"] and "2.750" in line)
    assert other.split()[3:7] == ["2.750", "same", "2.750", "same"]


def test_the_table_says_who_taught_whom(shown: str) -> None:
    first = next(line for line in shown.splitlines() if line.strip().startswith("1 "))
    assert first.split() == ["1", "completed", "30", "s", "clinic", "5,", "self", "3", "clinic", "6"]


def test_a_report_without_controls_has_no_verdict() -> None:
    assert list(verdicts(report())) == []
    show(report(), Console(file=io.StringIO()))
