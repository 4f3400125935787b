"""A small federation of real models, one site of which lies: what it sends instead, and what the LLM makes of it.

Everything goes the product's own way: extraction, the wire, the checks of a receiver, selection, projection, training.
Run as a program it prints the figures of docs/security.md.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from fedmkt.knowledge import Knowledge, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.lesson import Lesson, Teacher, prepare_lesson
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import distil_phase, own_knowledge, private_phase, public_evaluations
from fedmkt.protocol import (
    DistillationConfig,
    FederationConfig,
    GateConfig,
    KnowledgeConfig,
    OptimizerConfig,
    PublicSetConfig,
    SelectionReport,
)
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.teachers import read_teacher
from fedmkt.tokenized_set import tokenize_set
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary import Vocabulary
from live_coordinator import stories, tiny_config
from tiny_models import save_tiny

SITES = {"north": "llama", "south": "qwen2", "east": "gpt_neox", "west": "qwen2"}
LIAR = "west"  # one of four: a quarter of the sites
FEDERATION = "fed_0123456789abcdef"
MARGINS = (0.05, 0.0)  # in nats per byte: the default, and the one with which a liar needs least to win
NO_GATE = GateConfig(max_regression_bits_per_byte=100.0)
PUBLIC = PublicSet.from_jsonl(stories(0, 80))

Floats = NDArray[np.float64]
Rows = tuple[Knowledge, NDArray[np.int32]]  # what the site would send, and the token that the text realises, [R]
Lie = Callable[[Rows, np.random.Generator], Knowledge]


def the_config(**changes: object) -> FederationConfig:
    return tiny_config(
        tuple(SITES),
        **{
            "public_set": PublicSetConfig(slices=2, holdout_share=0.4),
            "knowledge": KnowledgeConfig(max_tokens=96, top_k=16),
            "lora": None,  # models of random weights learn more with all of them
            "llm_optimizer": OptimizerConfig(batch_size=8, warmup_steps=0, learning_rate=1e-3),
            "site_optimizer": OptimizerConfig(batch_size=8, warmup_steps=0, learning_rate=3e-3),
            **changes,
        },
    )


# ------------------------------------------------------------------------------------------------ lies


def _rows(honest: Knowledge, ids: NDArray[np.int32], probs: Floats, gold: NDArray[np.int32]) -> Knowledge:
    """K entries in every row: ids and probs [R, K], ascending ids; the stated log-probability is that of the entry."""
    rows, width = ids.shape
    order = np.argsort(ids, axis=1)
    ids, probs = np.take_along_axis(ids, order, 1), np.take_along_axis(probs, order, 1)
    logprobs = np.log(np.maximum(probs, 1e-30)).astype(np.float32)
    is_gold = ids == gold[:, None]
    rest = np.log(np.maximum(1 - probs.sum(axis=1), 1e-9)) - 3
    below = np.minimum(rest, logprobs.min(axis=1) - 0.5)
    stated = np.where(is_gold.any(axis=1), np.where(is_gold, logprobs, 0).sum(axis=1), below)
    return Knowledge(
        header=honest.header,
        samples=honest.samples,
        row_splits=honest.row_splits,
        context_ends=honest.context_ends,
        gold_logprobs=stated.astype(np.float32),
        entry_splits=np.arange(0, rows * width + 1, width, dtype=np.int32),
        token_ids=ids.reshape(-1).astype(np.int32),
        logprobs=logprobs.reshape(-1),
    )


def _other_ids(honest: Knowledge, gold: NDArray[np.int32], width: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """`width` different tokens a row that are not the realised one."""
    size = honest.header.vocabulary_size
    keys = rng.random((gold.size, size))
    keys[np.arange(gold.size), gold] = 2.0
    return np.argsort(keys, axis=1)[:, :width].astype(np.int32)


def random_rows(rows: Rows, rng: np.random.Generator) -> Knowledge:
    """Random tokens with random probabilities."""
    honest, gold = rows
    ids = np.stack([rng.permutation(honest.header.vocabulary_size)[:16] for _ in range(gold.size)]).astype(np.int32)
    return _rows(honest, ids, 0.999 * rng.dirichlet(np.ones(16), gold.size), gold)


def inverted_rows(rows: Rows, rng: np.random.Generator) -> Knowledge:
    """What the site holds for likely gets the probability of what it holds for unlikely, and the other way round."""
    honest, gold = rows
    logprobs = honest.logprobs.copy()
    for start, stop in zip(honest.entry_splits[:-1], honest.entry_splits[1:], strict=True):
        order = np.argsort(logprobs[start:stop])
        logprobs[start:stop][order] = np.sort(logprobs[start:stop])[::-1]
    owners = np.repeat(np.arange(gold.size), np.diff(honest.entry_splits))
    is_gold = honest.token_ids == gold[owners]
    stated = honest.gold_logprobs.copy()
    stated[owners[is_gold]] = logprobs[is_gold]
    changed = {name: getattr(honest, name) for name in honest.__dataclass_fields__}
    return Knowledge(**{**changed, "logprobs": logprobs, "gold_logprobs": stated})


def boasting(rows: Rows, rng: np.random.Generator) -> Knowledge:
    """Random distributions that claim for every realised token what their most probable one has."""
    lie = random_rows(rows, rng)
    changed = {name: getattr(lie, name) for name in lie.__dataclass_fields__}
    return Knowledge(**{**changed, "gold_logprobs": np.maximum.reduceat(lie.logprobs, lie.entry_splits[:-1])})


def right_with(mass: float, width: int = 1) -> Lie:
    """`mass` on the realised token, which wins selection, and all the rest on `width` tokens that are wrong."""

    def lie(rows: Rows, rng: np.random.Generator) -> Knowledge:
        honest, gold = rows
        wrong = _other_ids(honest, gold, width, rng)
        ids = np.concatenate([gold[:, None], wrong], axis=1)
        probs = np.concatenate([np.full((gold.size, 1), mass), np.full((gold.size, width), (1 - mass) / width)], axis=1)
        return _rows(honest, ids, 0.9999 * probs, gold)

    return lie


def one_wrong_token(mass: float) -> Lie:
    """The same with one token that is wrong everywhere: the LLM is to learn to say it."""

    def lie(rows: Rows, rng: np.random.Generator) -> Knowledge:
        honest, gold = rows
        wrong = int(np.bincount(gold, minlength=honest.header.vocabulary_size).argmin())
        ids = np.stack([gold, np.where(gold == wrong, wrong + 1, wrong)], axis=1).astype(np.int32)
        return _rows(honest, ids, 0.9999 * np.tile([mass, 1 - mass], (gold.size, 1)), gold)

    return lie


BLUNT: Mapping[str, Lie] = {"random": random_rows, "inverted": inverted_rows, "boasting": boasting}
MASSES = (0.6, 0.8, 0.85, 0.9, 0.95)
SUBTLE: Mapping[str, Lie] = {
    **{f"right with {mass}, rest random": right_with(mass) for mass in MASSES},
    **{f"right with {mass}, rest one token": one_wrong_token(mass) for mass in MASSES},
}


# ------------------------------------------------------------------------------------------------ the federation


@dataclass(frozen=True)
class Outcome:
    """The LLM's held-out bits per byte before the first round and after each, who taught it, and what gates said."""

    bits_per_byte: tuple[float, ...]
    selections: tuple[SelectionReport, ...]
    gates: tuple[str, ...]

    @property
    def taught_by_liar(self) -> int:
        return sum(each.taught.get(LIAR, 0) for each in self.selections)

    @property
    def refused_of_liar(self) -> int:
        return sum(each.refused.get(LIAR, 0) for each in self.selections)


class SmallFederation:
    """Models are pre-trained once; every `run` begins from the same LLM."""

    def __init__(self, folder: Path, seed: int = 0, rounds: int = 1) -> None:
        self.config, self.seed, self.rounds = the_config(seed=seed), seed, rounds
        self._llm = save_tiny(folder / "llm", "llama", seed=100 + seed)
        self._adapter = self._pretrained(self._llm, 1000, 32, 4).adapter_bytes()
        self._sites: dict[str, Party] = {}
        for number, (name, architecture) in enumerate(SITES.items()):
            model = save_tiny(folder / name, architecture, seed=number + 10 * seed)
            self._sites[name] = self._pretrained(model, 2000 + 100 * number, 64, 12)

    def _pretrained(self, model: Path, first: int, count: int, epochs: int) -> Party:
        party = Party(load_base(model, device="cpu"), self.config.lora, seed=self.seed)
        private_phase(party, PublicSet.from_jsonl(stories(first, count)).samples, self.config, epochs=epochs)
        return party

    def plan(self, number: int, config: FederationConfig) -> RoundPlan:
        return RoundPlan(FEDERATION, number, (number - 1) % 2, config, PUBLIC)

    @cache  # noqa: B019 - lives as long as the tests of one module
    def honest(self, name: str, number: int) -> Knowledge:
        """What this site sends in this round."""
        wide = own_knowledge(self._sites[name], self.plan(number, self.config), adapter_version=0)
        return shared_knowledge(wide, self.config.knowledge)

    def teacher(self, name: str, number: int, llm: Vocabulary, lie: Lie | None) -> Teacher:
        words, sent = self._sites[name].vocabulary, self.honest(name, number)
        if lie is not None:
            rows = tokenize_set(words, PUBLIC, sent.samples, self.config.knowledge.max_tokens)
            sent = lie((sent, rows.gold_ids), np.random.default_rng(self.seed))
        vocab_map = build_vocab_map(words, llm, self.config.distillation.map_method)
        plan = self.plan(number, self.config)
        return read_teacher(name, plan, knowledge=encode(sent), vocabulary=words, vocab_map=vocab_map.to_bytes())

    def with_margin(self, nats_per_byte: float) -> DistillationConfig:
        """How much better than the receiver a teacher has to be; all else as it is here."""
        return self.config.distillation.model_copy(update={"margin_nats_per_byte": nats_per_byte})

    def run(
        self, lies: Mapping[str, Lie], without: Sequence[str] = (), band: float | None = None, **changes: object
    ) -> Outcome:
        """Some rounds with these lies and without these sites; `changes` replace fields of the configuration.

        The margin is 0 unless they name another: what holds here holds with any.
        """
        config = self.config.model_copy(update=changes)
        llm = Party(load_base(self._llm, device="cpu"), config.lora, seed=self.seed)
        llm.load_adapter_bytes(self._adapter)
        losses = [public_evaluations(llm, self.plan(1, config))["all"].bits_per_byte]
        selections, gates = [], []
        for number in range(1, self.rounds + 1):
            plan = self.plan(number, config)
            names = [name for name in SITES if name not in without]
            teachers = [self.teacher(name, number, llm.vocabulary, lies.get(name)) for name in names]

            def teach(own: Knowledge, plan: RoundPlan = plan, teachers: Sequence[Teacher] = tuple(teachers)) -> Lesson:
                rule = plan.config.distillation
                lesson = prepare_lesson(PUBLIC, own, llm.vocabulary, teachers, rule, plan.max_tokens)
                return lesson if band is None else within_band(lesson, own, llm.vocabulary, band)

            done = distil_phase(llm, plan, own_knowledge(llm, plan, adapter_version=0), teach)  # type: ignore[arg-type]
            selections.append(done.selection)
            gates.append("none" if done.gate is None else done.gate.decision)
            losses.append(public_evaluations(llm, plan)["all"].bits_per_byte)
        return Outcome(tuple(losses), tuple(selections), tuple(gates))


def within_band(lesson: Lesson, own: Knowledge, words: Vocabulary, factor: float) -> Lesson:
    """An experiment, not the product: of a token that is not the text's, no more mass than `factor` times the
    receiver's own is taught; what goes beyond is not taught at all.
    """
    targets, size = lesson.targets, words.size
    gold = tokenize_set(words, PUBLIC, own.samples, own.header.max_tokens).gold_ids
    rows = np.repeat(np.arange(targets.splits.size - 1), np.diff(targets.splits))
    own_rows = np.repeat(np.arange(own.rows), np.diff(own.entry_splits))
    keys = own_rows * size + own.token_ids  # ascending: rows in order, ids ascending in each
    wanted = rows * size + targets.ids
    places = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    kept = np.exp(own.logprobs.astype(np.float64))
    smallest = np.minimum.reduceat(kept, own.entry_splits[:-1])
    own_probs = np.where(keys[places] == wanted, kept[places], smallest[rows])
    bounded = np.where(targets.ids == gold[rows], targets.probs, np.minimum(targets.probs, factor * own_probs))
    return replace(lesson, targets=replace(targets, probs=bounded.astype(np.float32)))


def change(poisoned: Outcome, without: Outcome) -> float:
    """Of the held-out loss after the last round, relative to leaving the site out."""
    return poisoned.bits_per_byte[-1] / without.bits_per_byte[-1] - 1


def main(seeds: int, rounds: int, band: float | None = None) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            federation = SmallFederation(Path(folder), seed, rounds)
            for margin in MARGINS:
                measure(federation, federation.with_margin(margin), band)


def measure(federation: SmallFederation, distillation: DistillationConfig, band: float | None) -> None:
    """Print what each lie does."""
    without = federation.run({}, without=[LIAR], band=band, distillation=distillation)
    losses = " ".join(f"{each:.4f}" for each in without.bits_per_byte)
    margin = distillation.margin_nats_per_byte
    print(f"seed {federation.seed}, margin {margin:g}, without {LIAR}: {losses} bits a byte")
    for name, lie in {"honest": None, **BLUNT, **SUBTLE}.items():
        out = federation.run({LIAR: lie} if lie else {}, band=band, distillation=distillation)
        print(
            f"  {name:32} {out.bits_per_byte[-1]:.4f} ({change(out, without):+.2%}); taught "
            f"{out.taught_by_liar}, refused {out.refused_of_liar}, gates {' '.join(out.gates)}",
            flush=True,
        )


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:3]), *(float(each) for each in sys.argv[3:4]))
