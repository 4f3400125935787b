"""The LLM server's jobs without HTTP: artifacts are files, sites are tiny models whose uploads are real knowledge."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_tensors

from fedmkt.knowledge import Knowledge, decode, encode, quantised
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.ml.adapters import Adapter, pack_adapter, unpack_adapter
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import own_knowledge, private_phase
from fedmkt.ml.team import Team, TeamMisused
from fedmkt.protocol import (
    DistillationConfig,
    DistillJob,
    DistillResult,
    EvaluationConfig,
    FederationConfig,
    GateConfig,
    MapJob,
    OptimizerConfig,
    UploadedKnowledge,
)
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.stopping import Stopped
from fedmkt.teachers import MapMissing, OtherVocabulary
from fedmkt.vocab_map import VocabMap, build_vocab_map
from fedmkt_llm_server.distil import Desk, distil
from fedmkt_llm_server.llm import Llm
from fedmkt_llm_server.maps import build_map
from fedmkt_llm_server.state import LlmState
from live_coordinator import stories, tiny_config
from tiny_models import save_tiny

FEDERATION = "fed_0123456789abcdef"
PUBLIC = PublicSet.from_jsonl(stories(0, 20, domain="first") + stories(20, 20, domain="second"))
SITES = {"north": ("gpt2", 100), "south": ("qwen2", 200)}
CONFIG = tiny_config(("north", "south"))


def silent(step: str, done: int, total: int) -> None:
    """A report that nobody reads."""


@dataclass
class Models:
    """The LLM's folder, and the sites' parties after their private training."""

    llm: Path
    sites: dict[str, Party]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    sites = {}
    for seed, (site, (architecture, first)) in enumerate(SITES.items()):
        party = Party(
            load_base(save_tiny(folder / site, architecture, seed=seed), device="cpu"), CONFIG.lora, seed=CONFIG.seed
        )
        private_phase(party, PublicSet.from_jsonl(stories(first, 24)).samples, CONFIG, epochs=2)
        sites[site] = party
    return Models(save_tiny(folder / "llm", "llama"), sites)


@dataclass
class Server:
    """An LLM server's desk over two folders: the coordinator's artifacts, and the server's own state."""

    models: Models
    folder: Path
    loads: int = 0
    published: list[str] = field(default_factory=list)
    publish_fails: bool = False

    def __post_init__(self) -> None:
        (self.folder / "store").mkdir(parents=True, exist_ok=True)
        self.restart()

    def restart(self) -> None:
        """As a new process would: nothing but the state folder is kept."""
        state = LlmState(self.folder / "state")
        self.llm = Llm(self._load, state, gradient_checkpointing=False)
        self.desk = Desk(self.llm, state, self._fetch, self._publish)

    def _load(self) -> Any:
        self.loads += 1
        return load_base(self.models.llm, device="cpu")

    def _fetch(self, digest: str) -> Path:
        copy = self.folder / "state" / "artifacts" / digest
        copy.write_bytes((self.folder / "store" / digest).read_bytes())
        return copy

    def _publish(self, data: bytes) -> str:
        if self.publish_fails:
            raise ConnectionError("the line is cut")
        digest = self.store(data)
        self.published.append(digest)
        return digest

    def store(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "store" / digest).write_bytes(data)
        return digest

    def read(self, digest: str) -> bytes:
        return (self.folder / "store" / digest).read_bytes()

    # ---------------------------------------------------------------------------------------------- jobs

    def plan(self, config: FederationConfig = CONFIG, number: int = 1) -> RoundPlan:
        return RoundPlan(FEDERATION, number, (number - 1) % 2, config, PUBLIC)

    def upload(self, party_of: str, plan: RoundPlan, *, blob: bytes | None = None, **more: Any) -> UploadedKnowledge:
        party = self.models.sites[party_of]
        if blob is None:
            blob = encode(shared_knowledge(own_knowledge(party, plan, adapter_version=1), plan.config.knowledge))
        method = plan.config.distillation.map_method
        values: dict[str, Any] = {
            "site": party_of,
            "knowledge": self.store(blob),
            "vocabulary": party.vocabulary.fingerprint,
            "vocabulary_artifact": self.store(party.vocabulary.to_bytes()),
            "vocabulary_maps": {
                method: self.store(build_vocab_map(party.vocabulary, self.llm.vocabulary, method).to_bytes())
            },
            "private_samples": 24,
            **more,
        }
        return UploadedKnowledge(**values)

    def job(
        self,
        config: FederationConfig = CONFIG,
        number: int = 1,
        adapter: str | None = None,
        uploads: list[UploadedKnowledge] | None = None,
    ) -> DistillJob:
        plan = self.plan(config, number)
        return DistillJob(
            federation_id=FEDERATION,
            round_id=f"round_{number:020x}",
            round_number=number,
            slice_index=plan.slice_index,
            config=config,
            public_set=self.store(PUBLIC.to_jsonl()),
            adapter=adapter,
            uploads=tuple(uploads if uploads is not None else [self.upload(site, plan) for site in SITES]),
        )

    def run(self, job: DistillJob, report: Callable[[str, int, int], None] = silent) -> DistillResult:
        return distil(job, self.desk, report)

    def knowledge(self, result: DistillResult) -> Knowledge:
        return decode(self.read(result.knowledge))

    def present_party(self, config: FederationConfig = CONFIG, adapter: str | None = None) -> Party:
        return self.llm.party(config, adapter, lambda: self.read(adapter or ""))


@pytest.fixture
def server(models: Models, tmp_path: Path) -> Server:
    return Server(models, tmp_path)


def assert_holds(artifact: bytes, party: Party) -> None:
    """The artifact is the party's adapter, and a card behind it."""
    found, expected = unpack_adapter(artifact), unpack_adapter(party.adapter_bytes())
    assert found.config == expected.config
    assert save_tensors(found.tensors) == save_tensors(expected.tensors)


def fresh_knowledge(models: Models, plan: RoundPlan) -> Knowledge:
    """What the bare LLM knows of the round's samples, as a receiver decodes it."""
    party = Party(load_base(models.llm, device="cpu"), plan.config.lora, seed=plan.config.seed)
    return quantised(shared_knowledge(own_knowledge(party, plan, adapter_version=0), plan.config.knowledge))


# ---------------------------------------------------------------------------------------------------------- learning


def test_the_llm_learns_from_two_sites_and_publishes_what_it_knew_before(server: Server, models: Models) -> None:
    steps: list[str] = []
    result = server.run(server.job(), lambda step, done, total: steps.append(step))
    assert result.selection.offered == {"north": 16, "south": 16}
    assert sum(result.selection.taught.values()) == 16
    assert result.refused_sites == {}
    assert result.gate is not None
    assert result.gate.decision == "kept"
    assert set(result.before) == set(result.after) == {"all", "first", "second"}
    assert result.training is not None
    assert result.training.steps == 2
    assert server.knowledge(result).equals(fresh_knowledge(models, server.plan()))
    assert result.adapter is not None
    assert_holds(server.read(result.adapter), server.present_party(adapter=result.adapter))
    assert list(dict.fromkeys(steps)) == [
        "reading the public set",
        "fetching the sites' knowledge",
        "making knowledge",
        "evaluating on the held-out public part",
        "preparing the lesson",
        "comparing and projecting the sites' knowledge",
        "learning from the others",
        "publishing the LLM's knowledge",
    ]
    assert {"fetch", "own_knowledge", "evaluate", "lesson", "train", "publish"} == set(result.phase_seconds)


def test_an_llm_that_only_teaches_publishes_knowledge_and_nothing_else(server: Server, models: Models) -> None:
    config = CONFIG.model_copy(update={"llm_training": False})
    result = server.run(server.job(config))
    assert server.knowledge(result).equals(fresh_knowledge(models, server.plan(config)))
    assert (result.adapter, result.gate, result.training) == (None, None, None)
    assert result.before == result.after != {}
    assert server.published == [result.knowledge]


def test_the_papers_profile_publishes_what_the_llm_knows_after_it_learned(server: Server, models: Models) -> None:
    paper = DistillationConfig(profile="paper", rule="dual_min_ce", projection="mined", gold_weight=0.9)
    config = CONFIG.model_copy(update={"distillation": paper})
    result = server.run(server.job(config))
    published = server.knowledge(result)
    assert len(published.samples) == 32, "everything that is not held out"
    before = fresh_knowledge(models, server.plan(config))
    assert np.array_equal(published.samples, before.samples)
    assert not np.array_equal(published.gold_logprobs, before.gold_logprobs)
    assert published.gold_logprobs.sum() > before.gold_logprobs.sum(), "it has learned these texts"


def test_the_next_round_goes_on_from_the_adapter_before(server: Server) -> None:
    first = server.run(server.job(number=1))
    second = server.run(server.job(number=2, adapter=first.adapter))
    assert first.after == second.before
    assert server.present_party(adapter=second.adapter).steps == 4
    assert server.loads == 1, "the base model stayed where it was"


# ------------------------------------------------------------------------------------------------------ bad uploads


def test_a_site_whose_upload_is_bad_is_left_out_and_told_why(server: Server) -> None:
    plan, wrong = server.plan(), server.plan(number=2)
    uploads = [server.upload("north", plan), server.upload("south", wrong)]
    result = server.run(server.job(uploads=uploads))
    assert result.refused_sites == {"south": "round_number is 2, expected 1; make knowledge for the round that is open"}
    assert result.selection.offered == {"north": 16}


@pytest.mark.parametrize("blob", [b"", b"\x00" * 100, b'{"pickle": 1}'])
def test_bytes_that_are_no_knowledge_cost_only_their_sender(server: Server, blob: bytes) -> None:
    uploads = [server.upload("north", server.plan(), blob=blob), server.upload("south", server.plan())]
    result = server.run(server.job(uploads=uploads))
    assert set(result.refused_sites) == {"north"}
    assert result.selection.offered == {"south": 16}


def test_a_vocabulary_that_is_not_the_announced_one_costs_only_its_sender(server: Server) -> None:
    bad = server.upload("north", server.plan(), vocabulary="0" * 64)
    result = server.run(server.job(uploads=[bad, server.upload("south", server.plan())]))
    assert "000000000000... was announced" in result.refused_sites["north"]


def test_a_round_without_any_usable_upload_is_self_distillation(server: Server) -> None:
    result = server.run(server.job(uploads=[server.upload("north", server.plan(), blob=b"no")]))
    assert result.selection.taught == {"self": 16, "none": 0}


def test_a_map_that_the_job_does_not_name_is_a_fault_of_the_job(server: Server) -> None:
    upload = server.upload("north", server.plan(), vocabulary_maps={})
    with pytest.raises(MapMissing, match="'retokenized' is needed"):
        server.run(server.job(uploads=[upload]))


def test_a_sharded_model_is_not_asked_for_free_answers(server: Server) -> None:
    team = Team()
    team.sharded = True
    server.present_party().team = team
    config = CONFIG.model_copy(update={"evaluation": EvaluationConfig(rouge_samples=5)})
    with pytest.raises(TeamMisused, match="rouge_samples is 5, and a sharded model gives no free answers"):
        server.run(server.job(config))


# ------------------------------------------------------------------------------------------------ going back, again


def test_a_training_that_made_it_worse_is_shown_and_not_kept(server: Server) -> None:
    eager = CONFIG.model_copy(
        update={
            "distillation": DistillationConfig(epochs=10),
            "llm_optimizer": OptimizerConfig(batch_size=8, learning_rate=1e-2),
        }
    )
    first = server.run(server.job(eager, number=1))
    config = CONFIG.model_copy(update={"gate": GateConfig(max_regression_bits_per_byte=0)})
    party = server.present_party(adapter=first.adapter)

    def forget_all(step: str, done: int, total: int) -> None:
        if step == "learning from the others":
            with torch.no_grad():
                for weight in party.weights.values():
                    weight.zero_()

    second = server.run(server.job(config, number=2, adapter=first.adapter), forget_all)
    assert second.gate is not None
    assert second.gate.decision == "rolled_back"
    assert second.adapter not in (None, first.adapter), "an operator may look at what was tried"
    assert second.after["all"].bits_per_byte > second.before["all"].bits_per_byte
    assert server.present_party(adapter=first.adapter) is party
    assert_holds(server.read(first.adapter or ""), party)
    third = server.run(server.job(number=2, adapter=first.adapter))
    assert third.before == first.after


def test_a_stopped_job_leaves_the_llm_as_it_was_and_does_not_repeat_its_knowledge(server: Server) -> None:
    undisturbed = Server(server.models, server.folder / "other")
    expected = undisturbed.run(undisturbed.job())

    def stop(step: str, done: int, total: int) -> None:
        if step == "learning from the others":
            raise Stopped

    with pytest.raises(Stopped):
        server.run(server.job(), stop)
    seen: list[str] = []
    again = server.run(server.job(), lambda step, done, total: seen.append(step))
    assert "making knowledge" not in seen
    assert (again.knowledge, again.adapter) == (expected.knowledge, expected.adapter)


def test_what_cannot_be_published_did_not_happen(server: Server) -> None:
    before = server.present_party().adapter_bytes()
    server.publish_fails = True
    with pytest.raises(ConnectionError):
        server.run(server.job())
    assert server.present_party().adapter_bytes() == before
    assert server.present_party().steps == 0


def test_files_of_a_job_go_when_it_is_done(server: Server) -> None:
    job = server.job()
    server.run(job)
    state = server.folder / "state"
    assert [path.name for path in (state / "jobs").rglob("*") if path.is_file()] == ["result.json"]
    kept = {path.name for path in (state / "artifacts").iterdir()}
    assert kept.isdisjoint({upload.knowledge for upload in job.uploads})
    assert job.public_set in kept


def test_a_result_that_did_not_reach_the_coordinator_is_found_by_the_next_attempt(server: Server) -> None:
    """Killed after hours of training, before the answer: the next process hands in the same, and the LLM goes on."""
    unbroken = Server(server.models, server.folder / "other")
    first = unbroken.run(unbroken.job(number=1))
    expected = unbroken.run(unbroken.job(number=2, adapter=first.adapter))
    result = server.run(server.job(number=1))
    server.restart()
    server.published.clear()
    seen: list[str] = []
    assert server.run(server.job(number=1), lambda step, done, total: seen.append(step)) == result
    assert (seen, server.published) == ([], [])
    assert server.run(server.job(number=2, adapter=result.adapter)).adapter == expected.adapter


def test_a_result_is_that_of_its_own_job_and_of_a_file_that_reads(server: Server) -> None:
    job = server.job()
    server.run(job)
    other = job.model_copy(update={"uploads": job.uploads[:1]})
    assert set(server.run(other).selection.offered) == {"north"}
    (kept,) = (server.folder / "state" / "jobs").rglob("result.json")
    kept.write_text("{")
    server.published.clear()
    assert set(server.run(other).selection.offered) == {"north"}
    assert server.published != []


# ------------------------------------------------------------------------------------------------------- optimizer


def test_the_optimizer_goes_on_over_a_restart(server: Server) -> None:
    unbroken = Server(server.models, server.folder / "other")
    first = unbroken.run(unbroken.job(number=1))
    expected = unbroken.run(unbroken.job(number=2, adapter=first.adapter))
    assert server.run(server.job(number=1)).adapter == first.adapter
    server.restart()
    assert server.run(server.job(number=2, adapter=first.adapter)).adapter == expected.adapter


def test_an_adapter_that_another_server_made_begins_with_a_fresh_optimizer(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    other = Server(server.models, server.folder / "other")
    first = other.run(other.job(number=1))
    assert first.adapter is not None
    server.store(other.read(first.adapter))
    caplog.set_level(logging.INFO)
    second = server.run(server.job(number=2, adapter=first.adapter))
    assert second.before == first.after
    assert [record.__dict__["adapter"] for record in caplog.records if record.message == "optimizer.fresh"] == [
        first.adapter
    ]


def test_federations_with_other_lora_settings_take_turns(server: Server) -> None:
    assert CONFIG.lora is not None
    other = CONFIG.model_copy(update={"lora": CONFIG.lora.model_copy(update={"rank": 2})})
    first = server.run(server.job(number=1))
    between = server.run(server.job(other, number=1, uploads=[]))
    second = server.run(server.job(number=2, adapter=first.adapter))
    assert between.before == first.before
    assert second.before == first.after
    assert server.loads == 3
    assert server.present_party(adapter=second.adapter).steps == 4, "the first one's optimizer was kept on disk"


# ------------------------------------------------------------------------------------------------------- averaging


def averaging() -> FederationConfig:
    return CONFIG.model_copy(update={"average_adapters": True, "scenario": "homogeneous"})


def site_adapters(server: Server, models: Models) -> list[bytes]:
    """Two adapters of one site model: as it is, and after more training."""
    party = models.sites["north"]
    start = party.snapshot()
    first = party.adapter_bytes()
    private_phase(party, PublicSet.from_jsonl(stories(300, 24)).samples, CONFIG, epochs=1)
    second = party.adapter_bytes()
    party.restore(start)
    return [first, second]


def test_site_adapters_are_averaged_by_private_samples(server: Server, models: Models) -> None:
    plan, blobs = server.plan(averaging()), site_adapters(server, models)
    uploads = [
        server.upload("north", plan, adapter=server.store(blobs[0]), private_samples=30),
        server.upload("north", plan, site="south", adapter=server.store(blobs[1]), private_samples=10),
    ]
    result = server.run(server.job(averaging(), uploads=uploads))
    assert result.averaged_adapter is not None
    first, second, mean = (unpack_adapter(blob).tensors for blob in (*blobs, server.read(result.averaged_adapter)))
    for name, tensor in mean.items():
        np.testing.assert_allclose(tensor, 0.75 * first[name] + 0.25 * second[name], rtol=1e-6, atol=1e-8)


def test_an_adapter_that_does_not_read_is_left_out_of_the_average(server: Server, models: Models) -> None:
    plan, blobs = server.plan(averaging()), site_adapters(server, models)
    uploads = [
        server.upload("north", plan, adapter=server.store(b"no tar"), private_samples=30),
        server.upload("north", plan, site="south", adapter=server.store(blobs[1]), private_samples=10),
    ]
    result = server.run(server.job(averaging(), uploads=uploads))
    assert result.averaged_adapter is not None
    assert server.read(result.averaged_adapter) == blobs[1]
    assert result.refused_sites["north"].startswith("its adapter: ")
    assert result.selection.offered == {"north": 16, "south": 16}, "its knowledge is another matter"


def test_the_federations_rule_keeps_a_poisoned_adapter_out_and_one_that_is_not_finite_is_named(
    server: Server, models: Models
) -> None:
    config = averaging().model_copy(update={"average_rule": "median"})
    plan, blobs = server.plan(config), site_adapters(server, models)
    good = unpack_adapter(blobs[1])
    huge, broken = (
        pack_adapter(Adapter(good.config, {name: value * factor for name, value in good.tensors.items()}))
        for factor in (np.float32(1000), np.float32("nan"))
    )
    given = {"north": blobs[1], "south": huge, "east": blobs[1], "west": broken}
    uploads = [
        server.upload("north", plan, site=site, adapter=server.store(blob), private_samples=10)
        for site, blob in given.items()
    ]
    result = server.run(server.job(config, uploads=uploads))
    assert result.averaged_adapter is not None
    assert server.read(result.averaged_adapter) == blobs[1]
    assert set(result.refused_sites) == {"west"}
    assert "not finite" in result.refused_sites["west"]


def test_sites_without_private_samples_weigh_nothing(server: Server, models: Models) -> None:
    plan, blobs = server.plan(averaging()), site_adapters(server, models)
    upload = server.upload("north", plan, adapter=server.store(blobs[0]), private_samples=0)
    assert server.run(server.job(averaging(), uploads=[upload])).averaged_adapter is None


# -------------------------------------------------------------------------------------------------------------- maps


def test_a_map_job_builds_the_map_between_two_vocabularies(server: Server, models: Models) -> None:
    teacher, student = models.sites["north"].vocabulary, server.llm.vocabulary
    seen: list[str] = []
    job = MapJob(
        federation_id=FEDERATION,
        teacher=teacher.fingerprint,
        student=student.fingerprint,
        teacher_artifact=server.store(teacher.to_bytes()),
        student_artifact=server.store(student.to_bytes()),
        method="mined",
    )
    result = build_map(job, server.read, server.store, lambda step, done, total: seen.append(step))
    made = VocabMap.from_bytes(server.read(result.artifact))
    assert np.array_equal(made.best_ids, build_vocab_map(teacher, student, "mined").best_ids)
    assert f"mapping {teacher.size} tokens to {student.size}" in seen


def test_a_map_job_with_another_vocabulary_than_announced_is_refused(server: Server, models: Models) -> None:
    teacher, student = models.sites["north"].vocabulary, server.llm.vocabulary
    job = MapJob(
        federation_id=FEDERATION,
        teacher="1" * 64,
        student=student.fingerprint,
        teacher_artifact=server.store(teacher.to_bytes()),
        student_artifact=server.store(student.to_bytes()),
        method="mined",
    )
    with pytest.raises(OtherVocabulary, match=f"{teacher.fingerprint[:12]}..., 111111111111... was announced"):
        build_map(job, server.read, server.store, silent)


def test_results_are_wire_messages(server: Server) -> None:
    result = server.run(server.job(uploads=[]))
    assert DistillResult.model_validate(json.loads(result.model_dump_json())) == result
