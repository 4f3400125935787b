"""The two things a site does in a round. Each part that is done is committed, so a killed agent takes up where it was.

What leaves this host for a round is made in `_outgoing` and `_report` alone: knowledge of public samples, an adapter if
the federation averages them, and numbers. It lies in the outbox and stands in the ledger before it leaves, and the
site's policy is asked before.
"""

import logging
from dataclasses import replace
from pathlib import Path

from fedmkt.client import MAX_ARTIFACT_BYTES
from fedmkt.durable import sync
from fedmkt.knowledge import Knowledge
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
from fedmkt.privacy import BudgetSpent
from fedmkt.protocol import MAX_KNOWLEDGE_BYTES, MAX_VOCABULARY_BYTES, Apply, ApplyReport, TrainAndUpload
from fedmkt.round_plan import RoundPlan
from fedmkt.signing import UploadKind
from fedmkt.teachers import needed_map, read_teacher, read_vocabulary
from fedmkt_client_agent.disclosure import disclosed, made_with
from fedmkt_client_agent.ledger import Transfer, fetched, sending
from fedmkt_client_agent.site import Site

log = logging.getLogger(__name__)

LLM = "llm"


def train_and_upload(site: Site, task: TrainAndUpload) -> None:
    """Train on private text, make knowledge of the round's samples, upload it; each part once."""
    site.begin_round(task.round_id, task.round_number)
    site.consent.check_round(task.round_id, adapter=task.upload_adapter, agreed=site.config.average_adapters)
    plan = site.plan(task.round_number, task.slice_index)
    if not site.work.trained:
        _train(site, plan)
    outgoing = _outgoing(site, task, plan)
    for kind, blob in outgoing.items():
        if kind not in site.work.uploaded:
            _upload(site, task, kind, blob)


def apply(site: Site, task: Apply) -> None:
    """Learn from the LLM, keep it if the own text got no worse, report; learned once, reported until it counts."""
    site.begin_round(task.round_id, task.round_number)
    site.consent.check_round(task.round_id, adapter=False)
    if site.work.report is None:
        _learn(site, task, site.plan(task.round_number, task.slice_index))
    if not site.work.reported:
        _report(site, task)


# ------------------------------------------------------------------------------------------------ training


def _train(site: Site, plan: RoundPlan) -> None:
    clock, checkpoints = Clock(), site.checkpoints("private")
    _evaluate_start(site, plan, clock)
    epochs, budget = private_epochs(site.config, site.state.rounds_trained), site.budget
    try:
        with clock.measure("private_training"):
            report = private_phase(
                site.party,
                site.private.train,
                site.config,
                epochs=epochs,
                budget=site.budget,
                checkpoints=checkpoints,
                progress=site.progress,
            )
    except TrainingDiverged as error:
        # The site is back where it was and can still teach and learn; the same training would only diverge again.
        log.warning("private.diverged", extra={"reason": error.detail})
        site.status.metrics.diverged()
        report = None
    except BudgetSpent as error:
        log.warning("privacy.budget_spent", extra={"reason": error.detail})
        report, budget = None, None
    state: dict[str, object] = {"rounds_trained": site.state.rounds_trained + 1}
    if budget is not None and epochs > 0:
        state["privacy"] = budget.round_done()
    site.commit_party(
        state=state,
        trained=True,
        training=() if report is None else (report,),
        seconds=clock.seconds,
    )
    checkpoints.clear()
    site.status.metrics.trained(report)
    if report is not None:
        log.info("private.trained", extra={"steps": report.steps, "seconds": round(report.seconds, 3)})
    if site.budget is not None:
        site.status.update(privacy=site.budget.view)
        log.info("privacy.spent", extra=site.budget.view.model_dump())


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
    site.kept(lambda: _write(site.store.own_knowledge, own))
    site.commit(extracted=True, seconds=clock.seconds)
    log.info("knowledge.made", extra={"samples": len(own.samples), "rows": own.rows})
    return own


def _write(path: Path, own: Knowledge) -> None:
    write_knowledge_file(path, own)
    sync(path)


def _outgoing(site: Site, task: TrainAndUpload, plan: RoundPlan) -> dict[UploadKind, bytes]:
    """Everything that shall leave now, all of it in the outbox before any of it leaves."""
    outbox, policy = site.consent.outbox, site.consent.policy
    about, settings = outbox.begin(task.round_id, task.round_number), made_with(policy)
    blob = outbox.take(about, "knowledge", settings)
    if blob is None:
        blob = disclosed(_own_knowledge(site, plan), site.config.knowledge, policy)
        about = outbox.put(about, "knowledge", blob, settings)
    outgoing: dict[UploadKind, bytes] = {"knowledge": blob}
    if task.upload_adapter:
        outgoing["adapter"] = site.party.adapter_bytes()
        outbox.put(about, "adapter", outgoing["adapter"])
    return outgoing


def _upload(site: Site, task: TrainAndUpload, kind: UploadKind, blob: bytes) -> None:
    transfer = _allowed(site, sending(kind, blob, round_id=task.round_id, round_number=task.round_number))
    clock = Clock()
    site.progress(f"uploading {kind}", 0, len(blob))
    with clock.measure(f"upload_{kind}"):
        receipt = site.consent.ledger.recorded(
            transfer,
            lambda: site.client.upload(kind, task.round_id, blob, site.key, site.state.receipt_keys),
            lambda receipt: receipt.upload_id,
        )
    site.commit(uploaded=(*site.work.uploaded, kind), seconds=clock.seconds)
    log.info(
        f"{kind}.uploaded",
        extra={"round_id": receipt.round_id, "upload_id": receipt.upload_id, "size_bytes": receipt.size_bytes},
    )


def _report(site: Site, task: Apply) -> None:
    assert site.work.report is not None
    outbox = site.consent.outbox
    report = site.work.report if site.consent.policy.send_local_metrics else site.work.report.without_local_metrics()
    outbox.put(outbox.begin(task.round_id, task.round_number), "report", report.model_dump_json().encode())
    transfer = _allowed(site, sending("report", report, round_id=task.round_id, round_number=task.round_number))
    site.consent.ledger.recorded(transfer, lambda: site.client.report(task.round_id, report))
    site.commit(reported=True)
    log.info("round.reported", extra=_fields(site, task))


def _allowed(site: Site, transfer: Transfer) -> Transfer:
    """With the time of the approval, if one was needed. Raises Withheld."""
    return replace(transfer, approved_at=site.consent.check_sending(transfer))


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
        private=site.private.train if site.budget is None else None,
        private_holdout=site.private.holdout if site.budget is None else (),
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
    site.consent.check_open()
    return fetched(site.client, site.consent.ledger, site.store, digest, max_bytes, site.work.round_id)


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
