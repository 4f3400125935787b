"""Control arms: the same models, steps, slices and seeds, but nobody to learn from.

`public_only` trains on the public set's gold labels alone, `self_distillation` on gold labels and the party's own soft
targets. What a federation gains over both comes from the others. The phases are those of the services, and both rest
on `prepare_lesson` without teachers: a rule that wants a better teacher then leaves gold labels, the default rule
leaves the party itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from fedmkt.demo.workers import Progress
from fedmkt.knowledge import Knowledge
from fedmkt.lesson import Lesson, prepare_lesson
from fedmkt.ml.models import configure_torch, load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import (
    Evaluations,
    Teach,
    apply_phase,
    distil_phase,
    own_knowledge,
    private_epochs,
    private_phase,
    public_evaluations,
)
from fedmkt.private_set import read_private_set
from fedmkt.protocol import FederationConfig
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan

# What each arm changes in the federation's distillation. Gold labels alone get the whole weight of the loss.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "public_only": {"rule": "dual_min_ce", "gold_weight": 1.0},
    "self_distillation": {"rule": "best_or_self"},
}
FEDERATION = "fed_0000000000000000"  # headers carry an id; these never leave the process


@dataclass(frozen=True)
class Setting:
    """One party's part in the federation, as far as a control arm repeats it. `rounds`: (number, slice index)."""

    model: str
    revision: str | None
    public_file: Path
    config: FederationConfig
    rounds: tuple[tuple[int, int], ...]
    device: str = "auto"


@dataclass(frozen=True)
class RoundResult:
    """Held-out public quality at a round's start and end."""

    before: Evaluations
    after: Evaluations


History = list[RoundResult]


def llm_control(progress: Progress, setting: Setting) -> dict[str, History]:
    """The LLM through every arm; arm -> one result a round."""
    party = _party(setting)
    start = party.snapshot()
    steps = _Steps(progress, len(ARMS) * len(setting.rounds))
    histories: dict[str, History] = {}
    for arm in ARMS:
        party.restore(start)
        histories[arm] = []
        for plan in _plans(setting, arm):
            own = own_knowledge(party, plan, adapter_version=0, progress=steps.tick)
            learned = distil_phase(party, plan, own, _teach(party, plan), progress=steps.tick)
            kept = learned.gate is None or learned.gate.decision == "kept"
            histories[arm].append(RoundResult(learned.before, learned.after if kept else learned.before))
            steps.next()
    return histories


def site_control(
    progress: Progress, setting: Setting, private_file: Path, private_holdout_share: float
) -> dict[str, History]:
    """A site through every arm. Its first private training is the same in each, so it is done once."""
    party, config = _party(setting), setting.config
    private = read_private_set(private_file, private_holdout_share, config.public_set.chat_template)
    steps = _Steps(progress, len(ARMS) * len(setting.rounds) + 1)
    first = next(iter(_plans(setting, "public_only")))
    untrained = public_evaluations(party, first, steps.tick)
    private_phase(party, private.train, config, epochs=private_epochs(config, 0), progress=steps.tick)
    steps.next()
    start = party.snapshot()
    histories: dict[str, History] = {}
    for arm in ARMS:
        party.restore(start)
        histories[arm] = []
        for trained, plan in enumerate(_plans(setting, arm)):
            before = histories[arm][-1].after if trained else untrained
            if trained:
                epochs = private_epochs(config, trained)
                private_phase(party, private.train, plan.config, epochs=epochs, progress=steps.tick)
            applied = apply_phase(
                party,
                plan,
                None,
                _teach(party, plan),
                private=private.train,
                private_holdout=private.holdout,
                progress=steps.tick,
            )
            histories[arm].append(RoundResult(before, applied.after))
            steps.next()
    return histories


class _Steps:
    """Counts whole rounds, and passes every small step on so that the worker can be told to end."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def next(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)

    def tick(self, step: str, done: int, total: int, /) -> None:
        self._progress(self._done, self._total)


def _party(setting: Setting) -> Party:
    configure_torch(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own gap; it would draw over the demo's bars
    base = load_base(setting.model, revision=setting.revision, device=setting.device)
    return Party(base, setting.config.lora, seed=setting.config.seed)


def _plans(setting: Setting, arm: str) -> Sequence[RoundPlan]:
    distillation = setting.config.distillation.model_copy(update=dict(ARMS[arm]))
    config = setting.config.model_copy(update={"distillation": distillation})
    public_set = PublicSet.from_jsonl(setting.public_file.read_bytes(), config.public_set.chat_template)
    return [RoundPlan(FEDERATION, number, slice_index, config, public_set) for number, slice_index in setting.rounds]


def _teach(party: Party, plan: RoundPlan) -> Teach:
    """A lesson without teachers, from the plan's rule."""

    def teach(own: Knowledge) -> Lesson:
        return prepare_lesson(plan.public_set, own, party.vocabulary, [], plan.config.distillation, plan.max_tokens)

    return teach
