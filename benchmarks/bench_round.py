"""A round of the demo in process, without HTTP: how much of it is not the models' own passes.

The models' passes are forward, loss, backward and optimizer steps, in training, evaluation and the making of knowledge.
Everything else is what the method and the platform add. Vocabulary maps are there already: a federation builds them
once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]  # ships no annotations

import fedmkt.teachers
from benchmarks.harness import Results, at_most
from benchmarks.models import demo_corpus, demo_llm, demo_sites
from benchmarks.stopwatch import Stopwatch, Watched
from fedmkt.demo.run import PRIVATE_HOLDOUT_SHARE
from fedmkt.demo.setup import HOLDOUT_CHUNKS, PRIVATE_CHUNKS, SLICE_CHUNKS, demo_config
from fedmkt.demo.texts import private_jsonl, public_jsonl
from fedmkt.knowledge import Knowledge, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.knowledge_file import read_knowledge_file, write_knowledge_file
from fedmkt.lesson import Lesson, prepare_lesson
from fedmkt.ml import evaluation, extraction, head, losses, training
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import apply_phase, distil_phase, own_knowledge, private_epochs, private_phase
from fedmkt.private_set import PrivateSet, split_private
from fedmkt.protocol import PublicSetConfig
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.teachers import read_teacher
from fedmkt.tokenized_set import REMEMBERED, tokenize
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary import Vocabulary

CHECKPOINT_S = 30.0  # the services' own is longer
LATER_ROUND = 1  # rounds trained before: the first one's private training is longer
LESSON = "selection, alignment, projection"


def _pass(model: object, *_: object) -> str:
    return "forward for training" if getattr(model, "training", False) else "forward alone"


OWN_PASSES = ("forward for training", "forward alone", "head", "loss", "backward", "optimizer")
WATCHED: list[Watched] = [
    (head, "multiplied", "head"),
    (training, "gold_and_sparse_losses", "loss"),
    (losses._Losses, "backward", "loss"),
    (Accelerator, "backward", "backward"),
    (training._Loop, "_update", "optimizer"),
    (evaluation, "_score", "loss"),
    (extraction, "cut_rows", "cut of rows"),
    (extraction, "_assembled", "cut of rows"),
    (training, "row_targets", "batches"),
    (training, "collate", "batches"),
    (Vocabulary, "encode_batch", "tokenising"),
    (fedmkt.teachers, "check", "checks"),
    (Party, "snapshot", "saving"),
    (Party, "restore", "saving"),
    (Party, "adapter_bytes", "saving"),
    (Party, "save", "saving"),
    (Checkpoints, "_save", "saving"),
]


@dataclass(frozen=True)
class _Sent:
    """What travels from one party to another."""

    knowledge: bytes
    vocabulary: Vocabulary


class _Federation:
    """The demo's federation in one process: every party, its texts, and maps between the LLM and the sites."""

    def __init__(self) -> None:
        corpus, folders = demo_corpus(), demo_sites()
        chunks = SLICE_CHUNKS + HOLDOUT_CHUNKS
        public = PublicSetConfig(slices=1, holdout_share=HOLDOUT_CHUNKS / chunks)
        self.config = demo_config(tuple(folders), public)
        text = public_jsonl({domain: texts[:chunks] for domain, texts in corpus.public.items()})
        self.plan = RoundPlan("fed_" + "0" * 16, 1, 0, self.config, PublicSet.from_jsonl(text))
        self.llm = self._party(demo_llm().folder)
        self.sites = {domain: self._party(folder) for domain, folder in folders.items()}
        self.private = {domain: self._private(corpus.private[domain][:PRIVATE_CHUNKS]) for domain in folders}
        self.stopwatch = Stopwatch()

    def _party(self, folder: Path) -> Party:
        return Party(load_base(folder, device="cpu"), self.config.lora, seed=self.config.seed)

    def _private(self, chunks: tuple[str, ...]) -> PrivateSet:
        return split_private(PublicSet.from_jsonl(private_jsonl(chunks)).samples, PRIVATE_HOLDOUT_SHARE)

    @functools.cache  # noqa: B019 - one federation lives as long as the process
    def vocab_map(self, teacher: Vocabulary, student: Vocabulary) -> bytes:
        return build_vocab_map(teacher, student, self.config.distillation.map_method).to_bytes()

    def own(self, party: Party) -> Knowledge:
        return own_knowledge(party, self.plan, adapter_version=0)

    def sent(self, party: Party, own: Knowledge) -> _Sent:
        with self.stopwatch.part("cut of rows"):
            shared = shared_knowledge(own, self.config.knowledge)
        with self.stopwatch.part("codec"):
            return _Sent(encode(shared), party.vocabulary)

    def teach(self, party: Party, sent: dict[str, _Sent]) -> Callable[[Knowledge], Lesson]:
        """A lesson from what was sent, decoded and checked as the services do."""

        def teach(own: Knowledge) -> Lesson:
            teachers = []
            for name, one in sent.items():
                vocab_map = self.vocab_map(one.vocabulary, party.vocabulary)
                with self.stopwatch.part("codec"):
                    teacher = read_teacher(
                        name, self.plan, knowledge=one.knowledge, vocabulary=one.vocabulary, vocab_map=vocab_map
                    )
                teachers.append(teacher)
            plan = self.plan
            with self.stopwatch.part(LESSON):
                return prepare_lesson(
                    plan.public_set, own, party.vocabulary, teachers, plan.config.distillation, plan.max_tokens
                )

        return teach

    # -------------------------------------------------------------------------------------------- the work of a round

    def site_work(self, name: str, folder: Path, of_llm: _Sent) -> None:
        """Collecting and applying: private training, knowledge, lesson, what is kept on disk."""
        party, private = self.sites[name], self.private[name]
        checkpoints = Checkpoints(folder / "checkpoint", "work", interval_s=CHECKPOINT_S)
        epochs = private_epochs(self.config, LATER_ROUND)
        private_phase(party, private.train, self.config, epochs=epochs, checkpoints=checkpoints)
        party.save(folder / "private")
        own = self.own(party)
        with self.stopwatch.part("saving"):
            write_knowledge_file(folder / "own", own)
            own = read_knowledge_file(folder / "own")
        self.sent(party, own)
        apply_phase(
            party,
            self.plan,
            own,
            self.teach(party, {"llm": of_llm}),
            private=private.train,
            private_holdout=private.holdout,
            checkpoints=checkpoints,
        )
        party.save(folder / "applied")

    def llm_work(self, folder: Path, of_sites: dict[str, _Sent]) -> _Sent:
        """The distil job: knowledge, lesson from all sites, training, evaluations, what is published."""
        own = self.own(self.llm)
        checkpoints = Checkpoints(folder / "checkpoint", "work", interval_s=CHECKPOINT_S)
        distil_phase(self.llm, self.plan, own, self.teach(self.llm, of_sites), checkpoints=checkpoints)
        return self.sent(self.llm, own)


@pytest.fixture(scope="module")
def federation() -> Iterator[_Federation]:
    """One thread, which is what every process of the demo has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _Federation()
    torch.set_num_threads(threads)


def _measured(
    federation: _Federation, party: Party, seen: Sequence[PublicSample], work: Callable[[], object]
) -> Stopwatch:
    """Once to warm (maps, prefix relations), once measured; the party is as it was after each.

    Of all texts only those `seen` in earlier rounds (held out, private) are cut into tokens already: a slice is new.
    """
    before = party.snapshot()
    work()
    party.restore(before)
    REMEMBERED.clear()
    tokenize(party.vocabulary, seen, party.usable_tokens(federation.plan.max_tokens))
    federation.stopwatch = Stopwatch()
    with federation.stopwatch.watching([(type(party.model), "forward", _pass), *WATCHED]):
        work()
    party.restore(before)
    return federation.stopwatch


def _report(results: Results, who: str, stopwatch: Stopwatch) -> None:
    seconds = dict(sorted(stopwatch.seconds.items(), key=lambda pair: -pair[1]))
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {100 * spent / total:.1f} %" for name, spent in seconds.items())
    outside = sum(spent for name, spent in seconds.items() if name not in OWN_PASSES) / total
    size = f"{total:.3g} s: {parts}"
    print(f"{who}, outside {100 * outside:.1f} %, {size}")
    name = f"share of a round outside the models' own passes, {who}"
    results.add(name, "share", outside, None, size=size, goal=at_most(0.05))
    assert seconds.get("forward for training", 0) > 0


def bench_round_of_the_llm(results: Results, federation: _Federation, tmp_path: Path) -> None:
    of_sites = {name: federation.sent(party, federation.own(party)) for name, party in federation.sites.items()}
    work = functools.partial(federation.llm_work, tmp_path, of_sites)
    stopwatch = _measured(federation, federation.llm, federation.plan.holdout, work)
    _report(results, "the LLM's distil job", stopwatch)


def bench_round_of_a_site(results: Results, federation: _Federation, tmp_path: Path) -> None:
    name, party = next(iter(federation.sites.items()))
    of_llm = federation.sent(federation.llm, federation.own(federation.llm))
    work = functools.partial(federation.site_work, name, tmp_path, of_llm)
    private = federation.private[name]
    seen = [*federation.plan.holdout, *private.train, *private.holdout]
    _report(results, "a site's collecting and applying", _measured(federation, party, seen, work))
