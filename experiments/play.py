"""One arm of one seed, round after round, by the phases that the services use; what it gave, as lines.

A site trains, makes knowledge and sends it; the LLM learns and sends its own; the site learns. What is sent is encoded,
decoded and checked as on the wire, and its bytes are counted.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from experiments.arms import Arm
from experiments.lines import Account, Line, commit, line_of
from experiments.starts import Seed, Start
from experiments.teaching import assigned, equal_mixture, right_teachers
from fedmkt.demo.workers import Progress
from fedmkt.knowledge import Knowledge, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.lesson import Lesson, Teacher, prepare_lesson
from fedmkt.ml.averaging import Contribution, average_adapters
from fedmkt.ml.evaluation import evaluate
from fedmkt.ml.party import Party
from fedmkt.ml.phases import Teach, apply_phase, distil_phase, own_knowledge, private_epochs, private_phase
from fedmkt.protocol import FederationConfig, TrainingReport
from fedmkt.public_set import PublicSample
from fedmkt.round_plan import RoundPlan
from fedmkt.teachers import read_teacher
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary import Vocabulary

FEDERATION = "fed_" + "0" * 16  # headers carry an id; these never leave the process
LLM = "llm"


class StepsDiffer(Exception):
    """An arm took other steps than those it is compared with."""


@dataclass(frozen=True)
class Sent:
    """What travels from one party to another."""

    knowledge: bytes
    vocabulary: Vocabulary


@dataclass
class Player:
    """A party in one arm, with what it has done so far."""

    start: Start
    party: Party
    private_steps: int = 0
    public_steps: int = 0
    account: Account = field(default_factory=Account)

    def trained(self, report: TrainingReport | None, *, public: bool) -> None:
        steps = 0 if report is None else report.steps
        if public:
            self.public_steps += steps
        else:
            self.private_steps += steps


def play(seed: Seed, name: str, arm: Arm, tell: Progress) -> list[Line]:
    """Every measured party and domain of this arm; after the last round, or after every one. Raises StepsDiffer."""
    return list(_Played(seed, name, arm).lines(tell))


class _Played:
    def __init__(self, seed: Seed, name: str, arm: Arm) -> None:
        self.seed, self.name, self.arm, self.setting = seed, name, arm, seed.setting
        self.config = self.setting.config(arm, seed.names, seed.number)
        self.rounds = self.setting.arm_rounds(arm) if arm.plays else 0
        private = arm.plays and arm.private
        self.llm = Player(seed.llm, seed.load(seed.llm))
        self.sites = {
            site.name: Player(site, seed.trained(site) if private else seed.load(site)) for site in seed.sites
        }
        for player in self.sites.values():
            player.private_steps = player.party.steps  # those of the first private training, which is done already

    def lines(self, tell: Progress) -> Iterator[Line]:
        began = time.perf_counter()
        for number in range(1, self.rounds + 1):
            self._round(number)
            tell(number, self.rounds)
            if self.setting.measured == "every" and number < self.rounds:
                yield from self._measured(number, time.perf_counter() - began)
        if not self.rounds:
            tell(1, 1)
        self._check_steps()
        yield from self._measured(self.rounds, time.perf_counter() - began)

    # -------------------------------------------------------------------------------------------- what is compared

    def _measured(self, number: int, seconds: float) -> Iterator[Line]:
        players = [*([self.llm] if self._measures_llm else []), *(self.sites.values() if self._measures_sites else [])]
        for player in players:
            found = evaluate(
                player.party,
                self.seed.texts.test,
                max_tokens=self.config.knowledge.max_tokens,
                questions=self.config.evaluation,
            )
            about = {
                "experiment": self.setting.name,
                "arm": self.name,
                "seed": self.seed.number,
                "party": player.start.name,
                "own_domain": player.start.domain,
                "round": number,
                "private_steps": player.private_steps,
                "public_steps": player.public_steps,
                "seconds": round(seconds, 2),
                "commit": commit(),
                "setting": self.setting.digest,
            }
            yield from (line_of(domain, one, player.account, about) for domain, one in found.items())

    @property
    def _measures_llm(self) -> bool:
        """Where it neither learns nor starts anything, it is what `zero_shot` measures."""
        return not self.arm.plays or self.arm.llm not in ("absent", "frozen")

    @property
    def _measures_sites(self) -> bool:
        return not self.arm.plays or self.arm.sites != "absent"

    def _check_steps(self) -> None:
        """A party takes all steps of a kind that there are, or none where the arm leaves that kind out."""
        setting, arm = self.setting, self.arm
        if not arm.plays:
            return
        learns = arm.llm not in ("absent", "frozen")
        self._same(self.llm, 0, setting.public_steps(self.config.llm_optimizer) if learns else 0)
        private = setting.private_steps() if arm.private else 0
        public = 0 if arm.sites == "absent" else setting.public_steps(self.config.site_optimizer)
        for player in self.sites.values():
            self._same(player, private, public)

    def _same(self, player: Player, private: int, public: int) -> None:
        found = (player.private_steps, player.public_steps)
        if found != (private, public):
            raise StepsDiffer(
                f"arm {self.name!r}, {player.start.name}: {found[0]} private and {found[1]} public steps, "
                f"{private} and {public} in the arms that it is compared with"
            )

    # -------------------------------------------------------------------------------------------- a round

    def _round(self, number: int) -> None:
        plan = self._plan(self.config, number)
        own, sent, averaged = self._collect(plan)
        of_llm = self._distil(number, sent)
        if self.arm.sites == "absent":
            return
        for name, player in self.sites.items():
            if self.arm.sites == "private":
                self._train_alone(player)
            else:
                self._apply(name, player, plan, own.get(name), of_llm, averaged)

    def _plan(self, config: FederationConfig, number: int) -> RoundPlan:
        return RoundPlan(FEDERATION, number, number - 1, config, self.seed.texts.public)

    def _collect(self, plan: RoundPlan) -> tuple[dict[str, Knowledge], dict[str, Sent], bytes | None]:
        """The sites' private training; their knowledge, where somebody asks for it; their averaged adapter."""
        own: dict[str, Knowledge] = {}
        for name, player in self.sites.items():
            if self.arm.private and plan.round_number > 1:
                epochs = private_epochs(self.config, plan.round_number - 1)
                player.trained(
                    private_phase(player.party, self._private(name), self.config, epochs=epochs), public=False
                )
            if self.arm.sites in ("llm", "nobody"):
                own[name] = own_knowledge(player.party, plan, adapter_version=plan.round_number - 1)
        sent = {name: self._sent(self.sites[name], one) for name, one in own.items()} if self._asked else {}
        return own, sent, self._averaged()

    @property
    def _asked(self) -> bool:
        """Does anybody learn from the sites?"""
        return self.arm.llm in ("sites", "expert", "worst", "mean")

    def _sent(self, player: Player, own: Knowledge) -> Sent:
        blob = encode(shared_knowledge(own, self.config.knowledge))
        player.account.bytes_up += len(blob)
        player.account.rows += own.rows
        return Sent(blob, player.party.vocabulary)

    def _averaged(self) -> bytes | None:
        if not self.config.average_adapters:
            return None
        given = []
        for name, player in self.sites.items():
            blob = player.party.adapter_bytes()
            player.account.bytes_up += len(blob)
            given.append(Contribution(name, blob, len(self._private(name))))
        return average_adapters(given, self.config.average_rule).blob

    # -------------------------------------------------------------------------------------------- the LLM

    def _distil(self, number: int, sent: Mapping[str, Sent]) -> Sent | None:
        """The LLM's part of the round; what it sends, where sites learn from it."""
        llm, arm = self.llm, self.arm
        if arm.llm == "absent":
            return None
        distillation = self.config.distillation.model_copy(update=dict(arm.llm_changes))
        plan = self._plan(self.config.model_copy(update={"distillation": distillation}), number)
        if arm.llm == "pooled":
            self._train_pooled(plan)
            return None
        own = own_knowledge(llm.party, plan, adapter_version=number - 1)
        if arm.llm != "frozen":
            learned = distil_phase(llm.party, plan, own, self._teach(llm, plan, sent))
            llm.trained(learned.training, public=True)
            llm.account.learned(learned.selection, learned.gate)
        if arm.sites != "llm":
            return None
        if arm.paper:  # algorithm 1 sends what the LLM knows after it learned
            own = own_knowledge(llm.party, plan, adapter_version=number)
        return self._sent(llm, own)

    def _train_pooled(self, plan: RoundPlan) -> None:
        """As many steps as the other arms take, on the slice and everybody's private text in one random order."""
        pooled = [plan.public_set.samples[index] for index in plan.samples]
        pooled += [sample for name in self.sites for sample in self._private(name)]
        optimizer = self.config.llm_optimizer
        steps = self.setting.public_steps(optimizer) // self.setting.rounds
        report = private_phase(
            self.llm.party,
            pooled,
            self.config.model_copy(update={"site_optimizer": optimizer}),
            epochs=steps * optimizer.batch_size / len(pooled),
        )
        self.llm.trained(report, public=True)

    # -------------------------------------------------------------------------------------------- a site

    def _train_alone(self, player: Player) -> None:
        """Private text in the place of the public set, as many steps."""
        optimizer, private = self.config.site_optimizer, self._private(player.start.name)
        steps = self.setting.public_steps(optimizer) // self.setting.rounds
        epochs = steps * optimizer.batch_size / len(private)
        player.trained(private_phase(player.party, private, self.config, epochs=epochs), public=True)

    def _apply(
        self,
        name: str,
        player: Player,
        plan: RoundPlan,
        own: Knowledge | None,
        of_llm: Sent | None,
        averaged: bytes | None,
    ) -> None:
        sent = {} if of_llm is None else {LLM: of_llm}
        player.account.bytes_down += sum(len(one.knowledge) for one in sent.values()) + len(averaged or b"")
        applied = apply_phase(
            player.party,
            plan,
            own,
            self._teach(player, plan, sent),
            private=self._private(name) if self.arm.replay else None,
            private_holdout=self.seed.texts.private[name].holdout if self.arm.private else (),
            averaged=averaged,
            adapter_version=plan.round_number,
        )
        player.trained(applied.training, public=True)
        player.account.learned(applied.selection, applied.gate)

    def _private(self, name: str) -> tuple[PublicSample, ...]:
        return self.seed.texts.private[name].train

    # -------------------------------------------------------------------------------------------- lessons

    def _teach(self, player: Player, plan: RoundPlan, sent: Mapping[str, Sent]) -> Teach:
        """A lesson from what was sent, decoded and checked as the services do; in some arms from a part of it."""

        def teach(own: Knowledge) -> Lesson:
            teachers = [self._teacher(name, plan, one, player.party.vocabulary) for name, one in sent.items()]
            if player is self.llm and self.arm.llm in ("expert", "worst"):
                teachers = assigned(teachers, plan, worst=self.arm.llm == "worst")
            if player is self.llm and self.arm.llm == "mean":
                lesson = equal_mixture([self._lesson(player, plan, own, [one]) for one in teachers])
            else:
                lesson = self._lesson(player, plan, own, teachers)
            if player is self.llm:
                player.account.selected(*right_teachers(lesson, plan.public_set, self.seed.names))
            return lesson

        return teach

    def _lesson(self, player: Player, plan: RoundPlan, own: Knowledge, teachers: list[Teacher]) -> Lesson:
        distillation = plan.config.distillation
        return prepare_lesson(plan.public_set, own, player.party.vocabulary, teachers, distillation, plan.max_tokens)

    def _teacher(self, name: str, plan: RoundPlan, sent: Sent, student: Vocabulary) -> Teacher:
        vocab_map = self._map(sent.vocabulary, student)
        return read_teacher(name, plan, knowledge=sent.knowledge, vocabulary=sent.vocabulary, vocab_map=vocab_map)

    @functools.cache  # noqa: B019 - one arm lives as long as its unit
    def _map(self, teacher: Vocabulary, student: Vocabulary) -> bytes:
        return build_vocab_map(teacher, student, self.config.distillation.map_method).to_bytes()
