"""The phases of a round for one party, without HTTP: what the LLM server, the agents and the demo's control arms share.

A phase that trains either ends well or leaves the party as it found it, bit for bit. Where a lesson comes from is the
caller's business (`teach`), so that a control arm can pass gold labels only, or its own soft targets only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedmkt.errors import Refusal
from fedmkt.knowledge import Knowledge
from fedmkt.lesson import Lesson
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.evaluation import ALL, NO_FREE_ANSWERS, EvaluationNotFinite, evaluate
from fedmkt.ml.extraction import WIDE_TOP_K, WIDE_TOP_P, extract
from fedmkt.ml.party import Party
from fedmkt.ml.training import TrainingDiverged, train_on_lesson, train_private
from fedmkt.protocol import (
    Evaluation,
    EvaluationConfig,
    FederationConfig,
    GateConfig,
    GateReport,
    OptimizerConfig,
    SelectionReport,
    TrainingReport,
)
from fedmkt.public_set import PublicSample
from fedmkt.round_plan import RoundPlan

if TYPE_CHECKING:
    from fedmkt.ml.private_budget import PrivacyBudget

Evaluations = dict[str, Evaluation]
Teach = Callable[[Knowledge], Lesson]  # from the party's own wide knowledge to what it shall learn


class Progress(Protocol):
    """Called between the steps of a phase. May raise to end it; the party is then as it was before the phase."""

    def __call__(self, step: str, done: int, total: int, /) -> None: ...


def silent(step: str, done: int, total: int, /) -> None:
    """A progress that nobody looks at."""


@dataclass
class Clock:
    """Seconds spent by phase, in the order they began."""

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rounded(self) -> dict[str, float]:
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began


# ------------------------------------------------------------------------------------------------ looking


def public_evaluations(party: Party, plan: RoundPlan, progress: Progress = silent) -> Evaluations:
    """Quality on the held-out public part, by domain and under 'all'; empty when nothing is held out."""
    if not plan.holdout:
        return {}
    step = "evaluating on the held-out public part"
    return _evaluated(party, plan.holdout, plan, step, progress, plan.config.evaluation)


def _evaluated(
    party: Party,
    samples: Sequence[PublicSample],
    plan: RoundPlan,
    step: str,
    progress: Progress,
    questions: EvaluationConfig = NO_FREE_ANSWERS,
) -> Evaluations:
    return evaluate(
        party,
        samples,
        max_tokens=plan.max_tokens,
        questions=questions,
        progress=lambda done, total: progress(step, done, total),
    )


def own_knowledge(party: Party, plan: RoundPlan, *, adapter_version: int, progress: Progress = silent) -> Knowledge:
    """The party's wide knowledge on the round's samples with its present weights: for itself, never sent.

    At least as wide as what is shared, so that `knowledge_cut.shared_knowledge` needs no second pass through the model.
    """
    return extract(
        party,
        plan.public_set,
        plan.samples,
        federation_id=plan.federation_id,
        round_number=plan.round_number,
        slice_index=plan.slice_index,
        adapter_version=adapter_version,
        top_k=max(WIDE_TOP_K, plan.config.knowledge.top_k),
        top_p=max(WIDE_TOP_P, plan.config.knowledge.top_p),
        max_tokens=plan.max_tokens,
        progress=lambda done, total: progress("making knowledge", done, total),
    )


# ------------------------------------------------------------------------------------------------ training


@contextmanager
def undone_on_error(party: Party) -> Iterator[None]:
    """Whatever is raised inside, the party is put back to where it was."""
    before = party.snapshot()
    try:
        yield
    except BaseException:
        party.restore(before)
        raise


def private_phase(
    party: Party,
    samples: Sequence[PublicSample],
    config: FederationConfig,
    *,
    epochs: float,
    budget: "PrivacyBudget | None" = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> TrainingReport | None:
    """Train on a site's own samples; None when `epochs` is 0. With `checkpoints`, an interrupted one is taken up.

    With a `budget`, by DP-SGD and on its account. Raises TrainingDiverged and BudgetSpent, among others; the party is
    then as it was, and what was spent remains spent.
    """
    if epochs == 0:
        return None
    with undone_on_error(party):
        steps_done = 0 if checkpoints is None else checkpoints.resume(party)
        told = _stepwise(party, "training on private text", checkpoints, progress)
        max_tokens = config.knowledge.max_tokens
        if budget is not None:
            from fedmkt.ml.private_training import train_with_noise  # Opacus is in an extra of its own

            return train_with_noise(
                party,
                samples,
                budget,
                optimizer=config.site_optimizer,
                epochs=epochs,
                later_epochs=config.private.epochs,
                max_tokens=max_tokens,
                steps_done=steps_done,
                progress=told,
            )
        return train_private(
            party,
            samples,
            optimizer=config.site_optimizer,
            epochs=epochs,
            seed=config.seed,
            max_tokens=max_tokens,
            steps_done=steps_done,
            progress=told,
        )


def _stepwise(
    party: Party, step: str, checkpoints: Checkpoints | None, progress: Progress
) -> Callable[[int, int, float], None]:
    """What a training calls after each of its steps: first save, then tell, since telling may end it."""

    def after(done: int, total: int, loss_nats: float) -> None:
        if checkpoints is not None:
            checkpoints.offer(party, done, total)
        progress(step, done, total)

    return after


def private_epochs(config: FederationConfig, rounds_trained: int) -> float:
    """Passes over the private text before an upload: more before the first one."""
    return config.private.first_epochs if rounds_trained == 0 else config.private.epochs


def gate(before: Evaluations, after: Evaluations, config: GateConfig) -> GateReport:
    """Kept unless held-out bits per byte ('all') grew by more than the federation allows."""
    was, now = before[ALL].bits_per_byte, after[ALL].bits_per_byte
    limit = config.max_regression_bits_per_byte
    kept = now - was <= limit
    reason = "" if kept else f"{now - was:.4f} bits per byte worse on held-out text, at most {limit:g} allowed"
    return GateReport(
        decision="kept" if kept else "rolled_back", before_bits_per_byte=was, after_bits_per_byte=now, reason=reason
    )


def _diverged(before: Evaluations, error: Refusal) -> GateReport:
    """The gate of a training that came to no usable end: back to where it was."""
    was = before[ALL].bits_per_byte if before else None
    reason = f"{error.code}: {error.detail}"[:500]
    return GateReport(decision="rolled_back", before_bits_per_byte=was, after_bits_per_byte=was, reason=reason)


def _learn(
    party: Party,
    plan: RoundPlan,
    lesson: Lesson,
    optimizer: OptimizerConfig,
    replay: Sequence[PublicSample] | None,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> TrainingReport:
    distillation = plan.config.distillation
    return train_on_lesson(
        party,
        plan.public_set,
        lesson,
        gold_weight=distillation.gold_weight,
        temperature=distillation.temperature,
        residual_bucket=distillation.residual_bucket,
        optimizer=optimizer,
        epochs=distillation.epochs,
        seed=plan.config.seed,
        max_tokens=plan.max_tokens,
        replay=replay,
        public_weight=plan.config.private.public_weight,
        steps_done=0 if checkpoints is None else checkpoints.resume(party),
        progress=_stepwise(party, "learning from the others", checkpoints, progress),
    )


# ------------------------------------------------------------------------------------------------ a site's round


def _own_evaluations(
    party: Party, private_holdout: Sequence[PublicSample], plan: RoundPlan, progress: Progress
) -> Evaluations:
    """What a site's gate looks at."""
    if not private_holdout:
        return public_evaluations(party, plan, progress)
    return _evaluated(party, private_holdout, plan, "evaluating on held-out private text", progress)


@dataclass(frozen=True)
class Applied:
    """A site after it learned from the LLM. `after`: held-out public part with the weights it ended up with."""

    selection: SelectionReport
    gate: GateReport
    after: Evaluations
    training: TrainingReport | None


def apply_phase(
    party: Party,
    plan: RoundPlan,
    own: Knowledge | None,
    teach: Teach,
    *,
    private: Sequence[PublicSample] | None,
    private_holdout: Sequence[PublicSample],
    averaged: bytes | None = None,
    adapter_version: int = 0,
    checkpoints: Checkpoints | None = None,
    clock: Clock | None = None,
    progress: Progress = silent,
) -> Applied:
    """Learn a lesson with replay of private text, and keep it only if the site's own held-out text got no worse.

    A site with differential privacy, whose private text may have a part in nothing but its noisy training, passes
    None and none: no replay, and the held-out public part decides; where there is none, everything finite is kept.

    `own`: the site's wide knowledge on the round's samples with its present weights; None makes it now. `averaged`: the
    federation's averaged adapter, which replaces the site's before the lesson; knowledge is then made anew.
    """
    clock = clock or Clock()
    snapshot = party.snapshot()
    with undone_on_error(party):
        with clock.measure("evaluate"):
            before = _own_evaluations(party, private_holdout, plan, progress)
        if averaged is not None:
            party.load_adapter_bytes(averaged)
        if own is None or averaged is not None:
            with clock.measure("own_knowledge"):
                own = own_knowledge(party, plan, adapter_version=adapter_version, progress=progress)
        progress("preparing the lesson", 0, 0)
        with clock.measure("lesson"):
            lesson = teach(own)
        training, after = None, before
        try:
            with clock.measure("train"):
                training = _learn(party, plan, lesson, plan.config.site_optimizer, private, checkpoints, progress)
            with clock.measure("evaluate"):
                after = _own_evaluations(party, private_holdout, plan, progress)
            decision = gate(before, after, plan.config.gate) if before else GateReport(decision="kept")
        except (TrainingDiverged, EvaluationNotFinite) as error:
            decision = _diverged(before, error)
        if decision.decision == "rolled_back":
            party.restore(snapshot)
        with clock.measure("evaluate"):
            public = public_evaluations(party, plan, progress)
    return Applied(lesson.report, decision, public, training)


# ------------------------------------------------------------------------------------------------ the LLM's round


@dataclass(frozen=True)
class Distilled:
    """The LLM after it learned from the sites.

    `after` is what the training gave, even where the gate then took it back; `tried` the adapter that it gave. Without
    training, both evaluations are the same and `tried` is None.
    """

    selection: SelectionReport
    gate: GateReport | None
    before: Evaluations
    after: Evaluations
    training: TrainingReport | None
    tried: bytes | None


def distil_phase(
    party: Party,
    plan: RoundPlan,
    own: Knowledge,
    teach: Teach,
    *,
    checkpoints: Checkpoints | None = None,
    clock: Clock | None = None,
    progress: Progress = silent,
) -> Distilled:
    """Learn a lesson on the round's samples, and keep it only if the held-out public part got no worse.

    `own`: the LLM's wide knowledge on the round's samples with its present weights.
    """
    clock = clock or Clock()
    snapshot = party.snapshot()
    with undone_on_error(party):
        with clock.measure("evaluate"):
            before = public_evaluations(party, plan, progress)
        progress("preparing the lesson", 0, 0)
        with clock.measure("lesson"):
            lesson = teach(own)
        training, after, decision = None, before, None
        try:
            with clock.measure("train"):
                training = _learn(party, plan, lesson, plan.config.llm_optimizer, None, checkpoints, progress)
            with clock.measure("evaluate"):
                after = public_evaluations(party, plan, progress)
            if before:
                decision = gate(before, after, plan.config.gate)
        except (TrainingDiverged, EvaluationNotFinite) as error:
            if not before:
                raise
            decision = _diverged(before, error)
        tried = party.adapter_bytes() if training is not None else None
        if decision is not None and decision.decision == "rolled_back":
            party.restore(snapshot)
    return Distilled(lesson.report, decision, before, after, training, tried)
