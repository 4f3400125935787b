"""The distil job: the LLM learns from what the sites uploaded. No HTTP: `fetch` and `publish` go by SHA-256."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from fedmkt.knowledge import Knowledge, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.lesson import Lesson, Teacher, TeacherSource, prepare_lesson
from fedmkt.ml.adapters import with_card
from fedmkt.ml.averaging import Contribution, average_adapters
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.model_card import adapter_card
from fedmkt.ml.party import Party
from fedmkt.ml.phases import (
    Clock,
    Distilled,
    distil_phase,
    own_knowledge,
    public_evaluations,
    undone_on_error,
)
from fedmkt.ml.team import TeamMisused
from fedmkt.protocol import DistillJob, DistillResult, SelectionReport, UploadedKnowledge
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.stopping import StopFlag
from fedmkt.teachers import needed_map, read_teacher, read_vocabulary
from fedmkt.vocabulary import Vocabulary
from fedmkt.vocabulary_process import VocabularyProcess
from fedmkt_llm_server.llm import Llm
from fedmkt_llm_server.state import LlmState

log = logging.getLogger(__name__)

KEPT_VOCABULARIES = 4  # parsed ones in memory: memory does not grow with the number of sites
MAX_REASON = 500

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Desk:
    """What a distil job works with. `fetch` gives a file of its own that stays until the job ends."""

    llm: Llm
    state: LlmState
    fetch: Callable[[str], Path]
    publish: Callable[[bytes], str]
    checkpoint_s: float = 300.0
    stop: StopFlag = field(default_factory=StopFlag)
    vocabularies: VocabularyProcess = field(default_factory=VocabularyProcess)


@dataclass(frozen=True)
class _Outcome:
    selection: SelectionReport
    refused: dict[str, str]
    distilled: Distilled | None  # None: the LLM only teaches


def distil(job: DistillJob, desk: Desk, report: Report) -> DistillResult:
    """Learn, evaluate, keep or roll back, publish the LLM's own knowledge. Repeated, it goes on or says the same."""
    ended = desk.state.ended_job(job, desk.llm.card.model_id)
    if ended is not None:
        log.info("distil.result_found", extra={"round_id": job.round_id})
        return ended
    clock = Clock()
    with clock.measure("fetch"):
        plan = _plan(job, desk, report)
        party = desk.llm.party(job.config, job.adapter, lambda: _read(desk, job.adapter))
        _check_team(job, party)
        sources = _sources(job, plan, desk, report) if job.config.llm_training else []
    with clock.measure("own_knowledge"):
        own = desk.state.own_knowledge(job.round_id, party.card.model_id, lambda: _own(party, plan, report))
    with desk.vocabularies, undone_on_error(party):  # what is not published did not happen
        if job.config.llm_training:
            outcome = _learn(job, plan, party, own, sources, desk, clock, report)
        else:
            outcome = _Outcome(SelectionReport(), {}, None)
        with clock.measure("publish"):
            result = _publish(job, plan, party, own, outcome, desk, report)
    result = result.model_copy(update={"phase_seconds": clock.rounded})
    desk.state.end_job(job, desk.llm.card.model_id, result, _only_here(job))
    return result


def _check_team(job: DistillJob, party: Party) -> None:
    if party.team.sharded and job.config.evaluation.rouge_samples:
        raise TeamMisused(
            f"evaluation.rouge_samples is {job.config.evaluation.rouge_samples}, and a sharded model gives no free "
            "answers; set it to 0, or leave shard out of the LLM server's settings"
        )


def _only_here(job: DistillJob) -> list[str]:
    """Artifacts that no other job reads."""
    found = [digest for upload in job.uploads for digest in (upload.knowledge, upload.adapter)]
    return [digest for digest in (*found, job.adapter) if digest is not None]


# ------------------------------------------------------------------------------------------------ what it starts from


def _plan(job: DistillJob, desk: Desk, report: Report) -> RoundPlan:
    report("reading the public set", 0, 0)
    public_set = PublicSet.from_jsonl(desk.fetch(job.public_set).read_bytes())
    return RoundPlan(job.federation_id, job.round_number, job.slice_index, job.config, public_set)


def _read(desk: Desk, digest: str | None) -> bytes:
    assert digest is not None, "asked for only where there is one"
    return desk.fetch(digest).read_bytes()


def _own(party: Party, plan: RoundPlan, report: Report) -> Knowledge:
    """The LLM's adapter version is the coordinator's to give; the round says how old the knowledge is."""
    return own_knowledge(party, plan, adapter_version=plan.round_number - 1, progress=report)


def _sources(job: DistillJob, plan: RoundPlan, desk: Desk, report: Report) -> list[TeacherSource]:
    """Every upload as a file first, since a line that breaks must not look like a bad upload; read one at a time."""

    @lru_cache(maxsize=KEPT_VOCABULARIES)
    def vocabulary(artifact: str, fingerprint: str) -> Vocabulary:
        return read_vocabulary(desk.fetch(artifact).read_bytes(), fingerprint, desk.vocabularies.read)

    def load(upload: UploadedKnowledge, knowledge: Path, vocab_map: Path) -> Teacher:
        return read_teacher(
            upload.site,
            plan,
            knowledge=knowledge.read_bytes(),
            vocabulary=vocabulary(upload.vocabulary_artifact, upload.vocabulary),
            vocab_map=vocab_map.read_bytes(),
        )

    sources = []
    for done, upload in enumerate(job.uploads):
        report("fetching the sites' knowledge", done, len(job.uploads))
        knowledge = desk.fetch(upload.knowledge)
        vocab_map = desk.fetch(needed_map(job.config.distillation, upload.vocabulary_maps))
        desk.fetch(upload.vocabulary_artifact)
        sources.append(TeacherSource(upload.site, partial(load, upload, knowledge, vocab_map)))
    return sources


# ------------------------------------------------------------------------------------------------ learning


def _learn(
    job: DistillJob,
    plan: RoundPlan,
    party: Party,
    own: Knowledge,
    sources: list[TeacherSource],
    desk: Desk,
    clock: Clock,
    report: Report,
) -> _Outcome:
    refused: dict[str, str] = {}
    checkpoints = Checkpoints(
        desk.state.checkpoint_file(job.round_id),
        f"{job.round_id} {job.adapter}",
        interval_s=desk.checkpoint_s,
        stop=desk.stop,
    )

    def teach(knowledge: Knowledge) -> Lesson:
        lesson = prepare_lesson(
            plan.public_set,
            knowledge,
            party.vocabulary,
            sources,
            job.config.distillation,
            plan.max_tokens,
            progress=lambda done, total: report("comparing and projecting the sites' knowledge", done, total),
        )
        refused.update({site: reason[:MAX_REASON] for site, reason in lesson.refused_teachers.items()})
        for site, reason in refused.items():
            log.warning("knowledge.refused", extra={"round_id": job.round_id, "site": site, "reason": reason})
        return lesson

    distilled = distil_phase(party, plan, own, teach, checkpoints=checkpoints, clock=clock, progress=report)
    return _Outcome(distilled.selection, refused, distilled)


# ------------------------------------------------------------------------------------------------ what comes out


def _publish(
    job: DistillJob,
    plan: RoundPlan,
    party: Party,
    own: Knowledge,
    outcome: _Outcome,
    desk: Desk,
    report: Report,
) -> DistillResult:
    if job.config.distillation.profile == "paper" and outcome.distilled is not None:
        own = _own(party, plan, report)  # algorithm 1 sends what the LLM knows after it learned
    report("publishing the LLM's knowledge", 0, 0)
    knowledge = desk.publish(encode(shared_knowledge(own, job.config.knowledge)))
    averaged, left_out = _averaged(job, desk, report)
    distilled = outcome.distilled
    if distilled is None:
        before = public_evaluations(party, plan, report)
        return DistillResult(
            knowledge=knowledge,
            averaged_adapter=averaged,
            selection=outcome.selection,
            gate=None,
            before=before,
            after=before,
            training=None,
            refused_sites=left_out,
        )
    adapter = None
    if distilled.tried is not None:
        adapter = desk.publish(with_card(distilled.tried, adapter_card(job, party, distilled, outcome.refused)))
    if adapter is not None and (distilled.gate is None or distilled.gate.decision == "kept"):
        desk.llm.committed(adapter)
    return DistillResult(
        knowledge=knowledge,
        adapter=adapter,
        averaged_adapter=averaged,
        selection=outcome.selection,
        gate=distilled.gate,
        before=distilled.before,
        after=distilled.after,
        training=distilled.training,
        refused_sites={**left_out, **outcome.refused},
    )


def _averaged(job: DistillJob, desk: Desk, report: Report) -> tuple[str | None, dict[str, str]]:
    """The sites' adapters as one, by the federation's rule, where it wants that; and who was left out, and why."""
    given = [upload for upload in job.uploads if upload.adapter is not None and upload.private_samples > 0]
    if not job.config.average_adapters or not given:
        return None, {}
    report("averaging the sites' adapters", 0, len(given))
    parts = [Contribution(upload.site, _read(desk, upload.adapter), upload.private_samples) for upload in given]
    average = average_adapters(parts, job.config.average_rule)
    for site, reason in average.left_out.items():
        log.warning("adapter.refused", extra={"round_id": job.round_id, "site": site, "reason": reason})
    left_out = {site: reason[:MAX_REASON] for site, reason in average.left_out.items()}
    return (None if average.blob is None else desk.publish(average.blob)), left_out
