"""Whole rounds with real processes: the scenarios, processes that die, and the real pre-trained models."""

import gzip
import json
from pathlib import Path

import pytest

from federation import Processes, SiteFiles, jsonl, small_config
from fedmkt.protocol import FederationConfig, KnowledgeConfig, RoundView, Schedule

pytestmark = [pytest.mark.e2e, pytest.mark.services, pytest.mark.timeout(420)]


def federation(folder: Path, llm: Path, sites: dict[str, SiteFiles], names: list[str]) -> Processes:
    return Processes(folder, llm, {name: sites[name] for name in names})


def missing(running: Processes) -> tuple[str, ...]:
    current = running.view().current_round
    return current.missing if current is not None else ()


def taught(finished: RoundView, learner: str) -> dict[str, int]:
    """How many samples each teacher taught `learner` ('llm' or a site) in this round."""
    if learner == "llm":
        assert finished.llm_result is not None
        return finished.llm_result.selection.taught
    report = next(site.report for site in finished.sites if site.site == learner)
    assert report is not None
    return report.selection.taught


def test_four_unlike_sites_and_the_llm_teach_each_other(
    tmp_path: Path, tiny_llm: Path, tiny_sites: dict[str, SiteFiles], public_set: bytes
) -> None:
    names = list(tiny_sites)
    with federation(tmp_path, tiny_llm, tiny_sites, names) as running:
        running.begin(small_config(names), public_set, rounds=2)
        rounds = running.wait_for_rounds(2, timeout_s=300)
        with running.client() as operator:
            versions = operator.adapters(running.federation_id).items
    assert [(one.number, one.state) for one in rounds] == [(1, "completed"), (2, "completed")]
    for finished in rounds:
        assert finished.llm_result is not None
        assert set(finished.llm_result.before) == set(finished.llm_result.after) == {"all", "first", "second"}
        assert sum(taught(finished, "llm").values()) == 16, "every sample of the slice has one teacher, or none"
        for site in finished.sites:
            assert site.state == "applied"
            assert site.upload_bytes > 0
            assert sum(taught(finished, site.site).values()) == 16
            assert set(taught(finished, site.site)) <= {"llm", "self", "none"}
    assert sorted(version.round_id for version in versions if version.round_id) == sorted(
        one.round_id for one in rounds
    )
    kept = [one for one in rounds if one.llm_result and one.llm_result.gate and one.llm_result.gate.decision == "kept"]
    (promoted,) = [version for version in versions if version.promoted]
    assert promoted.round_id == (kept[-1].round_id if kept else None)
    private = [json.loads(line)["text"] for line in tiny_sites["north"].private.read_text().splitlines()]
    said = "".join(log.read_text(errors="replace") for log in (tmp_path / "logs").iterdir())
    assert not [text for text in private if text in said], "private text is in a log"


@pytest.mark.parametrize(
    ("names", "architectures", "changes"),
    [
        (["north"], None, {"scenario": "one_to_one"}),
        (["north", "south"], "north", {"scenario": "homogeneous", "average_adapters": True}),
        (["south", "west"], None, {"llm_training": False}),
    ],
    ids=["one-to-one", "homogeneous with averaged adapters", "the LLM only teaches"],
)
def test_scenario_is_a_matter_of_configuration(
    names: list[str],
    architectures: str | None,
    changes: dict[str, object],
    tmp_path: Path,
    tiny_llm: Path,
    tiny_sites: dict[str, SiteFiles],
    public_set: bytes,
) -> None:
    sites = {name: SiteFiles(tiny_sites[architectures or name].model, tiny_sites[name].private) for name in names}
    with Processes(tmp_path, tiny_llm, sites) as running:
        running.begin(small_config(names, **changes), public_set, rounds=2)
        rounds = running.wait_for_rounds(2, timeout_s=240)
        view = running.view()
    assert [one.state for one in rounds] == ["completed", "completed"]
    results = [one.llm_result for one in rounds if one.llm_result is not None]
    assert len(results) == 2
    assert all((result.averaged_adapter is not None) == bool(changes.get("average_adapters")) for result in results)
    assert all((result.training is None) == (not view.config.llm_training) for result in results)


def test_killed_site_is_named_missing_and_joins_the_next_round(
    tmp_path: Path, tiny_llm: Path, tiny_sites: dict[str, SiteFiles], public_set: bytes
) -> None:
    names = ["north", "south"]
    patience = Schedule(quorum=1, collect_timeout_s=45, distill_timeout_s=120, apply_timeout_s=60)
    with federation(tmp_path, tiny_llm, tiny_sites, names) as running:
        running.gather(small_config(names, schedule=patience), public_set)
        running.freeze("south")
        running.request(2)
        running.wait_for_state(1, "collecting", timeout_s=60)
        running.kill("south")
        running.until(lambda: missing(running) == ("south",), "south alone is missing", timeout_s=60)
        (first,) = running.wait_for_rounds(1, timeout_s=180)[:1]
        assert first.state == "completed"
        assert {site.site: site.state for site in first.sites} == {"north": "applied", "south": "missed"}
        running.start("south")
        second = running.wait_for_rounds(2, timeout_s=240)[1]
    assert second.state == "completed"
    assert {site.site: site.state for site in second.sites} == {"north": "applied", "south": "applied"}


def test_round_under_quorum_fails_and_names_who_was_missing(
    tmp_path: Path, tiny_llm: Path, tiny_sites: dict[str, SiteFiles], public_set: bytes
) -> None:
    names = ["north", "south"]
    patience = Schedule(quorum=2, collect_timeout_s=15, distill_timeout_s=120, apply_timeout_s=60)
    with federation(tmp_path, tiny_llm, tiny_sites, names) as running:
        running.gather(small_config(names, schedule=patience), public_set)
        running.freeze("south")
        running.request(1)
        running.wait_for_state(1, "collecting", timeout_s=60)
        running.kill("south")
        (only,) = running.wait_for_rounds(1, timeout_s=120)
    assert only.state == "failed"
    assert only.reason is not None
    assert "south" in only.reason
    assert "quorum" in only.reason


@pytest.mark.parametrize("state", ["collecting", "distilling", "applying"])
def test_coordinator_killed_in_any_state_finishes_the_rounds_after_its_restart(
    state: str, tmp_path: Path, tiny_llm: Path, tiny_sites: dict[str, SiteFiles], public_set: bytes
) -> None:
    names = ["north", "south"]
    with federation(tmp_path, tiny_llm, tiny_sites, names) as running:
        running.gather(small_config(names), public_set)
        running.freeze(*names)  # whoever the present state waits for is frozen, so it cannot pass unseen
        running.request(2)
        running.wait_for_state(1, "collecting", timeout_s=60)
        if state != "collecting":
            running.freeze("llm-server")
            running.thaw(*names)
            running.wait_for_state(1, "distilling", timeout_s=60)
        if state == "applying":
            running.freeze(*names)
            running.thaw("llm-server")
            running.wait_for_state(1, "applying", timeout_s=60)
        running.kill("coordinator")
        running.thaw("llm-server", *names)
        running.start("coordinator")
        rounds = running.wait_for_rounds(2, timeout_s=300)
        with running.client() as operator:
            versions = operator.adapters(running.federation_id).items
    assert [(one.number, one.state) for one in rounds] == [(1, "completed"), (2, "completed")]
    assert all(site.state == "applied" for one in rounds for site in one.sites)
    numbers = [version.version for version in versions]
    assert len(numbers) == len(set(numbers)), "a round committed twice"


@pytest.mark.data
def test_three_real_pretrained_models_run_two_rounds(tmp_path: Path, data_dir: Path) -> None:
    with gzip.open(data_dir / "datasets" / "text" / "grimms_fairy_tales.txt.gz", "rt") as file:
        texts = file.read()
    pieces = ["".join(character for character in piece if character.isascii()) for piece in texts.split("\n\n")]
    pieces = [" ".join(piece.split()) for piece in pieces if 150 < len(piece) < 400]
    records = [{"id": f"g{at}", "text": piece} for at, piece in enumerate(pieces[:160])]
    names = ["stories260k", "babyllama-105"]
    sites = {}
    for at, (name, model) in enumerate(zip(names, ["stories260K", "babyllama-105"], strict=True)):
        private = tmp_path / f"{name}.jsonl"
        private.write_bytes(jsonl(records[60 + 50 * at : 110 + 50 * at]))
        sites[name] = SiteFiles(data_dir / "models" / model, private)
    config = small_config(names, knowledge=KnowledgeConfig(max_tokens=256))
    assert isinstance(config, FederationConfig)
    with Processes(tmp_path / "run", data_dir / "models" / "babyllama-361", sites) as running:
        running.begin(config, jsonl(records[:60]), rounds=2)
        rounds = running.wait_for_rounds(2, timeout_s=360)
    assert [one.state for one in rounds] == ["completed", "completed"]
    for finished in rounds:
        assert finished.llm_result is not None
        assert finished.llm_result.refused_sites == {}
        assert 0.3 < finished.llm_result.after["all"].bits_per_byte < 8
        assert all(site.state == "applied" for site in finished.sites)
