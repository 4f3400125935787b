"""The two things a site does in a round. Each part that is done is committed, so a killed agent takes up where it was.

What leaves this host is made in `_upload` and `_report` alone: knowledge of public samples, an adapter if the
federation averages them, and numbers.
"""

import logging
from pathlib import Path

from fedmkt.client import MAX_ARTIFACT_BYTES
from fedmkt.knowledge import Knowledge, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.knowledge_file import KnowledgeFileUnreadable, read_knowledge_file, write_knowledge_file
from fedmkt.lesson import Lesson, Teacher, TeacherSource, prepare_lesson
from fedmkt.ml.phases import (
    Applied,
    Clock,
    apply_phase,
    own_knowledge,
    private_epochs,
    private_phase,
    public_evaluations,
)
from fedmkt.ml.training import TrainingDiverged
from fedmkt.protocol import MAX_KNOWLEDGE_BYTES, MAX_VOCABULARY_BYTES, Apply, ApplyReport, TrainAndUpload
from fedmkt.round_plan import RoundPlan
from fedmkt.signing import UploadKind
from fedmkt.teachers import needed_map, read_teacher, read_vocabulary
from fedmkt_client_agent.site import Site
from fedmkt_client_agent.store import sync

log = logging.getLogger(__name__)

LLM = "llm"


def train_and_upload(site: Site, task: TrainAndUpload) -> None:
    """Train on private text, make knowledge of the round's samples, upload it; each part once."""
    site.begin_round(task.round_id)
    plan = site.plan(task.round_number, task.slice_index)
    if not site.work.trained:
        _train(site, plan)
    own = _own_knowledge(site, plan)
    if "knowledge" not in site.work.uploaded:
        _upload(site, "knowledge", encode(shared_knowledge(own, site.config.knowledge)))
    if task.upload_adapter and "adapter" not in site.work.uploaded:
        _upload(site, "adapter", site.party.adapter_bytes())


def apply(site: Site, task: Apply) -> None:
    """Learn from the LLM, keep it if the own text got no worse, report; learned once, reported until it counts."""
    site.begin_round(task.round_id)
    if site.work.report is None:
        _learn(site, task, site.plan(task.round_number, task.slice_index))
    if not site.work.reported:
        assert site.work.report is not None
        site.client.report(task.round_id, site.work.report)
        site.commit(reported=True)
        log.info("round.reported", extra=_fields(site, task))


# ------------------------------------------------------------------------------------------------ training


def _train(site: Site, plan: RoundPlan) -> None:
    clock, checkpoints = Clock(), site.checkpoints("private")
    _evaluate_start(site, plan, clock)
    epochs = private_epochs(site.config, site.state.rounds_trained)
    try:
        with clock.measure("private_training"):
            report = private_phase(
                site.party,
                site.private.train,
                site.config,
                epochs=epochs,
                checkpoints=checkpoints,
                progress=site.progress,
            )
    except TrainingDiverged as error:
        # The site is back where it was and can still teach and learn; the same training would only diverge again.
        log.warning("private.diverged", extra={"reason": error.detail})
        site.status.metrics.diverged()
        report = None
    site.commit_party(
        state={"rounds_trained": site.state.rounds_trained + 1},
        trained=True,
        training=() if report is None else (report,),
        seconds=clock.seconds,
    )
    checkpoints.clear()
    site.status.metrics.trained(report)
    if report is not None:
        log.info("private.trained", extra={"steps": report.steps, "seconds": round(report.seconds, 3)})


def _evaluate_start(site: Site, plan: RoundPlan, clock: Clock) -> None:
    if site.work.before is None:
        with clock.measure("evaluate"):
            before = public_evaluations(site.party, plan, site.progress)
        site.commit(before=before)


def _own_knowledge(site: Site, plan: RoundPlan) -> Knowledge:
    """The site's wide knowledge as first made in this round: what is uploaded and what is learned with are one."""
    if site.work.extracted:
        try:
            return read_knowledge_file(site.store.own_knowledge)
        except KnowledgeFileUnreadable as error:
            log.warning("knowledge.file_unreadable", extra={"reason": error.detail})
    clock = Clock()
    with clock.measure("own_knowledge"):
        own = own_knowledge(site.party, plan, adapter_version=site.state.party_number, progress=site.progress)
    write_knowledge_file(site.store.own_knowledge, own)
    sync(site.store.own_knowledge)
    site.commit(extracted=True, seconds=clock.seconds)
    log.info("knowledge.made", extra={"samples": len(own.samples), "rows": own.rows})
    return own


def _upload(site: Site, kind: UploadKind, blob: bytes) -> None:
    clock = Clock()
    site.progress(f"uploading {kind}", 0, len(blob))
    with clock.measure(f"upload_{kind}"):
        receipt = site.client.upload(kind, site.work.round_id, blob, site.key, site.state.receipt_keys)
    site.commit(uploaded=(*site.work.uploaded, kind), seconds=clock.seconds)
    log.info(
        f"{kind}.uploaded",
        extra={"round_id": receipt.round_id, "upload_id": receipt.upload_id, "size_bytes": receipt.size_bytes},
    )


# ------------------------------------------------------------------------------------------------ learning


def _learn(site: Site, task: Apply, plan: RoundPlan) -> None:
    clock, checkpoints = Clock(), site.checkpoints("lesson")
    _evaluate_start(site, plan, clock)
    own = _own_knowledge(site, plan)
    site.progress("fetching the LLM's knowledge", 0, 0)
    with clock.measure("download"):
        source = _llm(site, task, plan)
        averaged = None if task.averaged_adapter is None else _fetch(site, task.averaged_adapter).read_bytes()
    applied = apply_phase(
        site.party,
        plan,
        own,
        lambda own: _lesson(site, plan, own, source),
        private=site.private.train,
        private_holdout=site.private.holdout,
        averaged=averaged,
        adapter_version=site.state.party_number,
        checkpoints=checkpoints,
        clock=clock,
        progress=site.progress,
    )
    site.note(seconds=clock.seconds)
    site.status.metrics.trained(applied.training)
    if applied.gate.decision == "kept":
        site.commit_party(report=_account(site, applied))
    else:
        site.commit(report=_account(site, applied))
    checkpoints.clear()
    log.info(
        "round.applied",
        extra={**_fields(site, task), "decision": applied.gate.decision, "taught": applied.selection.taught},
    )
    for digest in (task.knowledge, task.averaged_adapter):
        if digest is not None:
            (site.store.artifacts / digest).unlink(missing_ok=True)


def _lesson(site: Site, plan: RoundPlan, own: Knowledge, source: TeacherSource) -> Lesson:
    lesson = prepare_lesson(
        plan.public_set, own, site.party.vocabulary, [source], plan.config.distillation, plan.max_tokens
    )
    for reason in lesson.refused_teachers.values():
        log.warning("knowledge.refused", extra={"teacher": LLM, "reason": reason})
    return lesson


def _llm(site: Site, task: Apply, plan: RoundPlan) -> TeacherSource:
    """The LLM as this round's teacher. Everything is fetched here: a line that breaks is no reason to refuse it."""
    knowledge = _fetch(site, task.knowledge, MAX_KNOWLEDGE_BYTES)
    vocabulary = _fetch(site, task.llm_vocabulary_artifact, MAX_VOCABULARY_BYTES)
    vocab_map = _fetch(site, needed_map(plan.config.distillation, task.vocabulary_maps))

    def load() -> Teacher:
        return read_teacher(
            LLM,
            plan,
            knowledge=knowledge.read_bytes(),
            vocabulary=read_vocabulary(vocabulary.read_bytes(), task.llm_vocabulary),
            vocab_map=vocab_map.read_bytes(),
        )

    return TeacherSource(LLM, load)


def _fetch(site: Site, digest: str, max_bytes: int = MAX_ARTIFACT_BYTES) -> Path:
    return site.client.fetch_artifact(digest, site.store.artifacts, max_bytes=max_bytes)


def _account(site: Site, applied: Applied) -> ApplyReport:
    work = site.work
    return ApplyReport(
        selection=applied.selection,
        gate=applied.gate,
        before=work.before or {},
        after=applied.after,
        training=(*work.training, *(() if applied.training is None else (applied.training,))),
        phase_seconds=work.phase_seconds,
        bytes_up=work.bytes_up,
        bytes_down=work.bytes_down,
    )


def _fields(site: Site, task: TrainAndUpload | Apply) -> dict[str, object]:
    return {"site": site.state.site, "round_id": task.round_id, "round_number": task.round_number}
