"""Experiments: tiny ones from the first text to the last table, resumed, with equal steps; literal statistics."""

import functools
import pydoc_data.topics
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from experiments.arms import ARMS
from experiments.lines import Line, write_lines
from experiments.paired import difference, interval
from experiments.play import StepsDiffer, play
from experiments.report import HalfMarked, NoResults, Results, put_between, tables, write_report
from experiments.setting import Setting
from experiments.starts import Seed, make_start
from experiments.teaching import mean_targets, right_teachers
from experiments.texts import NoRealTexts, Pool, draw, real_pool
from experiments.units import Folders, Unit, finished_lines, run, units_of
from pydantic import ValidationError

from fedmkt.alignment import SparseTargets
from fedmkt.demo.texts import NotEnoughText, chunk
from fedmkt.lesson import Lesson
from fedmkt.protocol import SelectionReport
from fedmkt.public_set import PublicSample, PublicSet

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
HETEROGENEOUS = [name for name, arm in ARMS.items() if not arm.averages_only]
TINY_MODEL = {
    "architecture": "llama",
    "settings": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    "tokenizer": "byte_bpe",
    "vocabulary": 300,
    "steps": 2,
    "domain_chunks": 8,
}


def tiny(**changes: Any) -> Setting:
    """Two sites, two rounds, a few texts."""
    other = TINY_MODEL | {"vocabulary": 320, "tokenizer": "byte_bpe_digits"}
    content: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "scenario": "heterogeneous",
        "arms": ["public_only", "fedmkt"],
        "seeds": [0],
        "rounds": 2,
        "sites": 2,
        "texts": {
            "domains": 2,
            "general": 40,
            "private": 16,
            "private_holdout": 4,
            "slice": 4,
            "public_holdout": 2,
            "test": 3,
        },
        "llm": TINY_MODEL | {"vocabulary": 340},
        "site_models": [TINY_MODEL, other],
        "federation": {
            "distillation": {"epochs": 2},
            "private": {"first_epochs": 1.0, "epochs": 0.5},
            "llm_optimizer": {"batch_size": 8},
            "site_optimizer": {"batch_size": 8},
        },
    }
    return Setting.model_validate(content | changes)


def tiny_homogeneous() -> Setting:
    federation = tiny().federation.model_dump() | {"lora": {"rank": 2}}
    return tiny(name="tiny_homogeneous", scenario="homogeneous", site_models=[TINY_MODEL], federation=federation)


@functools.cache
def tiny_pool() -> Pool:
    """Two domains of 60 texts each, and general text."""
    chunks = [piece for text in pydoc_data.topics.topics.values() for piece in chunk(text)]
    chunks = sorted(set(chunks))
    return Pool({"first": tuple(chunks[:60]), "second": tuple(chunks[60:120])}, tuple(chunks[120:240]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny_seed(setting: Setting, cache: Path) -> Seed:
    seed = Seed.of(setting, tiny_pool(), 0, cache)
    for start in seed.models().values():
        make_start(lambda done, total: None, start)
    return seed


def played(setting: Setting, arm: str, cache: Path) -> list[Line]:
    return play(tiny_seed(setting, cache), arm, ARMS[arm], lambda done, total: None)


@functools.cache
def tiny_lines(arm: str, cache: Path) -> list[Line]:
    return played(tiny(), arm, cache)


# ------------------------------------------------------------------------------------------------ arms


@pytest.mark.parametrize("arm", HETEROGENEOUS)
def test_every_arm_plays_to_its_end_with_the_steps_of_the_others(arm: str, cache: Path) -> None:
    lines = tiny_lines(arm, cache)

    assert {line.domain for line in lines} == {"all", "first", "second"}
    assert all(0 < line.bits_per_byte < 20 for line in lines)
    # 2 rounds of 8 samples, 2 epochs, batches of 8; 2 first private steps and 1 before the second upload
    public, private = {line.public_steps for line in lines}, {line.private_steps for line in lines if line.own_domain}
    assert public == ({0} if arm == "zero_shot" else {4})
    assert private <= ({0} if arm in ("zero_shot", "public_only") else {3})
    assert all(line.private_steps == 0 for line in lines if line.party == "llm")


def test_equal_sites_average_their_adapters(cache: Path) -> None:
    fedavg, fedmkt, apart = (
        [line for line in played(tiny_homogeneous(), arm, cache) if line.own_domain]
        for arm in ("fedavg", "fedmkt", "without_averaging")
    )

    assert {line.rows for line in fedavg} == {0}  # adapters alone
    for averaged, alone in zip(fedmkt, apart, strict=True):
        adapters = fedavg[0].bytes_up  # of as many rounds
        assert averaged.bytes_up - alone.bytes_up == pytest.approx(adapters, rel=0.1)
        assert averaged.bits_per_byte != alone.bits_per_byte


def test_the_default_arm_is_the_default_federation() -> None:
    setting = tiny(federation={}, texts={**tiny().texts.model_dump(), "slice": 8})
    config = setting.config(ARMS["fedmkt"], ("first", "second"), 7)

    assert config.distillation == type(config.distillation)()
    assert (config.lora, config.seed, config.llm_training) == (None, 7, True)
    assert config.public_set.slices == 2
    assert config.public_set.holdout_share == pytest.approx(4 / 36)


def test_the_paper_plays_fewer_rounds_with_as_many_steps() -> None:
    setting = tiny(rounds=4, arms=["paper"])
    config = setting.config(ARMS["paper"], ("first", "second"), 0)

    assert setting.arm_rounds(ARMS["paper"]) == 2
    assert config.distillation.epochs == 1
    assert config.private.epochs == 1.5  # 3 later trainings of 1 step become one of 3 steps, 24 of 16 samples
    assert config.distillation.gold_weight == 0.9


def test_an_arm_that_takes_other_steps_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "private_steps", lambda self: 5)
    with pytest.raises(StepsDiffer, match="3 private and 4 public steps, 5 and 4"):
        played(tiny(), "private_public", cache)


def test_experts_and_nobody_else_teach_in_the_oracle_arm(cache: Path) -> None:
    lines = {arm: tiny_lines(arm, cache) for arm in ("oracle_teacher", "worst_teacher")}
    llm = {arm: next(line for line in found if line.party == "llm") for arm, found in lines.items()}

    assert llm["oracle_teacher"].precision == 1.0
    assert llm["oracle_teacher"].taught == {"first": 8, "second": 8}
    assert sum(llm["worst_teacher"].taught.values()) == 16


def test_results_do_not_depend_on_what_was_kept(cache: Path, tmp_path: Path) -> None:
    again = played(tiny(), "fedmkt", tmp_path)

    assert [_without_seconds(line) for line in again] == [
        _without_seconds(line) for line in tiny_lines("fedmkt", cache)
    ]


def _without_seconds(line: Line) -> dict[str, Any]:
    return line.model_dump(exclude={"seconds"})


# ------------------------------------------------------------------------------------------------ texts and settings


def test_no_text_is_in_two_parts_and_a_seed_draws_all_of_them_anew() -> None:
    draws = [draw(tiny(), tiny_pool(), seed) for seed in (0, 0, 1)]
    parts = [
        [sample.text for sample in draws[0].test],
        [sample.text for sample in draws[0].public.samples],
        [text for chunks in draws[0].pretraining.values() for text in chunks],
        *([s.text for s in (*private.train, *private.holdout)] for private in draws[0].private.values()),
    ]

    texts = [text for part in parts for text in part]
    assert len(texts) == len(set(texts)) == 6 + 20 + 16 + 20 + 20
    assert draws[0] == draws[1]
    assert draws[0].test != draws[2].test
    assert draws[0].public.digest != draws[2].public.digest


def test_a_public_set_off_the_domains_has_none_of_their_text() -> None:
    texts = draw(tiny(texts=tiny().texts.model_dump() | {"public": "off_domain"}), tiny_pool(), 0)

    assert {sample.domain for sample in texts.public.samples} == {"elsewhere"}
    assert {sample.domain for sample in texts.test} == {"first", "second"}
    assert len(texts.public) == 20
    assert not {sample.text for sample in texts.public.samples} & set(texts.general)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(NotEnoughText, match="domain 'first' has 60 chunks, 142 wanted"):
        draw(tiny(texts=tiny().texts.model_dump() | {"test": 104}), tiny_pool(), 0)


@pytest.mark.data
def test_real_texts_fill_four_domains(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMKT_DATA_DIR", str(data_dir))
    texts = draw(Setting.read(EXPERIMENTS / "full" / "real_texts.toml"), real_pool(), 10)

    assert list(texts.private) == ["dialogues", "problems", "questions", "shakespeare"]
    assert len(texts.public) == 4 * (4 * 24 + 8)
    assert all(len(text.encode()) <= 256 for text in texts.general if len(text.split()) > 1)


def test_without_a_data_folder_real_texts_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDMKT_DATA_DIR", str(tmp_path))
    real_pool.cache_clear()
    with pytest.raises(NoRealTexts, match="FEDMKT_DATA_DIR names no folder"):
        real_pool()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["fedmtk"]}, "there are no arms"),
        ({"arms": ["fedavg"]}, "average adapters, which scenario 'heterogeneous' does not"),
        ({"sites": 3}, "3 sites have 2 domains"),
        ({"rounds": 3, "texts": {**tiny().texts.model_dump(), "slice": 3}}, "no whole batches of 8"),
        ({"texts": {**tiny().texts.model_dump(), "public": "unlabelled"}}, "the public set has none"),
        ({"scenario": "homogeneous"}, "homogeneous sites have one model, 2 are given"),
    ],
)
def test_an_experiment_that_compares_unlike_things_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.rglob("*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_experiment_of_the_repository_is_sound(path: Path) -> None:
    setting = Setting.read(path)

    assert len(setting.seeds) >= 5
    for arm in setting.arms:
        setting.config(ARMS[arm], tuple(f"site{number}" for number in range(setting.sites)), 0)


# ------------------------------------------------------------------------------------------------ units


@pytest.mark.timeout(600)
def test_what_is_finished_is_never_repeated(tmp_path: Path, cache: Path) -> None:
    folders = Folders(tmp_path / "results", cache, tmp_path / "texts")
    setting = tiny(arms=["zero_shot", "fedmkt"])
    tiny_seed(setting, cache)  # a process of its own for each stage takes long

    def names(kill_at: str = "") -> list[str]:
        found: list[str] = []

        def tell(name: str, done: int, total: int) -> None:
            nonlocal kill_at
            if name == kill_at:
                kill_at = ""
                _kill_workers()
            elif done == total:
                found.append(name)

        run([setting], folders, workers=1, tell=tell, pool=tiny_pool())
        return found

    assert names(kill_at="tiny fedmkt, seed 0")[-1] == "tiny fedmkt, seed 0"
    before = finished_lines(setting, folders)
    assert {line.arm for line in before} == {"zero_shot", "fedmkt"}
    unfinished = Unit(setting, "fedmkt", 0).file(folders)
    unfinished.rename(unfinished.with_name(f".{unfinished.name}.1"))  # as a unit that was killed leaves it

    assert names() == ["tiny fedmkt, seed 0"]
    assert list(map(_without_seconds, finished_lines(setting, folders))) == list(map(_without_seconds, before))
    assert names() == []


def _kill_workers() -> None:
    for child in psutil.Process().children(recursive=True):
        if any("spawn_main" in part for part in child.cmdline()):
            child.kill()


def test_an_arm_that_plays_otherwise_has_other_results() -> None:
    arm = ARMS["fedmkt"]

    assert replace(arm, about="in other words").digest == arm.digest
    assert replace(arm, replay=False).digest != arm.digest
    assert len({each.digest for each in ARMS.values()}) == len(ARMS)


def test_units_come_seed_by_seed_and_their_results_outlive_new_arms_and_seeds() -> None:
    setting = tiny(seeds=[1, 0])
    order = [(unit.seed, unit.arm) for unit in units_of([setting])]

    assert order == [(0, "public_only"), (0, "fedmkt"), (1, "public_only"), (1, "fedmkt")]
    assert setting.digest == tiny(arms=["paper"]).digest
    assert setting.digest != tiny(rounds=4).digest


# ------------------------------------------------------------------------------------------------ statistics


def test_intervals_have_literal_values() -> None:
    # of [0, 1] the four resamples have means 0, 1/2, 1/2, 1
    found = interval([0.0, 1.0])
    assert (found.mean, found.low, found.high, found.seeds, found.clear) == (0.5, 0.0, 1.0, 2, False)
    # of [1, 2, 3] the 27 resamples have sums 3 (1), 4 (3), 5 (6), 6 (7), 7 (6), 8 (3), 9 (1): 1/27 is above 2.5 %
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high, found.clear) == (2.0, 1.0, 3.0, True)
    # of [0, 0, 0, 1] 81 of 256 resamples have no 1, and 13 at least three: the quantile 97.5 % is 3/4
    found = interval([0.0, 0.0, 0.0, 1.0])
    assert (found.mean, found.low, found.high) == (0.25, 0.0, 0.75)


def test_equal_differences_and_a_single_seed_have_no_width() -> None:
    assert str(interval([-0.5] * 8)) == "-0.5000 [-0.5000, -0.5000] *"
    assert not interval([-0.5]).clear


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 1.5, 1: 2.25, 3: 0.0})

    assert found is not None
    assert (found.mean, found.low, found.high, found.seeds) == (-0.375, -0.5, -0.25, 2)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_many_seeds_agree_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(size=200)
    found, half = interval(values.tolist()), 1.96 * values.std() / np.sqrt(200)

    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


# ------------------------------------------------------------------------------------------------ teaching


def targets(splits: list[int], ids: list[int], probs: list[float], residual: list[float]) -> SparseTargets:
    return SparseTargets(
        row_splits=np.array([0, 2], np.int32),
        splits=np.array(splits, np.int32),
        ids=np.array(ids, np.int32),
        probs=np.array(probs, np.float32),
        residual=np.array(residual, np.float32),
        supervised=np.diff(splits) > 0,
    )


def test_the_mean_of_teachers_is_over_those_who_supervise_a_row() -> None:
    found = mean_targets(
        [targets([0, 2, 2], [1, 5], [0.5, 0.25], [0.25, 0]), targets([0, 1, 2], [5, 0], [1, 1], [0, 0])]
    )

    assert found.splits.tolist() == [0, 2, 3]
    assert found.ids.tolist() == [1, 5, 0]
    assert found.probs.tolist() == [0.25, 0.625, 1.0]
    assert found.residual.tolist() == [0.125, 0.0]
    assert found.supervised.tolist() == [True, True]


def test_the_right_teacher_is_the_site_of_the_samples_domain() -> None:
    samples = [PublicSample(str(i), "text", 0, False, domain) for i, domain in enumerate(["a", "a", "b", "b", "c"])]
    lesson = Lesson(
        samples=np.arange(5, dtype=np.int32),
        taught_by=("a", "b", "b", "self", "a"),  # nobody works in c
        targets=targets([0, 0, 0], [], [], [0, 0]),
        report=SelectionReport(),
    )

    assert right_teachers(lesson, PublicSet(tuple(samples)), ("a", "b")) == (2, 3)


# ------------------------------------------------------------------------------------------------ tables


def line(arm: str, seed: int, party: str, domain: str, bits: float) -> Line:
    own = None if party == "llm" else party
    return Line(
        experiment="tiny",
        arm=arm,
        seed=seed,
        party=party,
        own_domain=own,
        domain=domain,
        round=2,
        bits_per_byte=bits,
        accuracy=0.5,
        choice_accuracy=None,
        rouge_l=None,
        taught={},
        precision=0.75 if arm == "fedmkt" and party == "llm" else None,
        gold_transfer=None,
        rolled_back=0,
        bytes_up=4000,
        bytes_down=0,
        rows=100,
        private_steps=0,
        public_steps=4,
        seconds=1.0,
        commit="abc",
        setting="0",
    )


def some_lines() -> list[Line]:
    gains = {"public_only": (0.0, 0.0), "fedmkt": (0.25, 0.5)}  # by seed
    return [
        line(arm, seed, party, domain, 3.0 - gain)
        for arm, by_seed in gains.items()
        for seed, gain in enumerate(by_seed)
        for party in ("llm", "first")
        for domain in ("all", "first", "second")
    ]


def test_tables_hold_means_and_paired_differences() -> None:
    found = list(tables(Results(tiny(), some_lines())))

    assert "| fedmkt | 2.6250 | 50.0% | -0.3750 [-0.5000, -0.2500] * | 75.0% |  | 0% |" in found
    assert "| public only | 3.0000 | 50.0% |  |  |  | 0% |" in found
    assert "| fedmkt | 2.6250 | 2.6250 | 2 | 40.0 | 0% |" in found
    assert "| second | -0.3750 [-0.5000, -0.2500] * |  |  |  |" in found


def test_only_the_last_round_counts() -> None:
    early = [one.model_copy(update={"round": 1, "bits_per_byte": 99.0}) for one in some_lines()]

    assert list(tables(Results(tiny(), [*early, *some_lines()]))) == list(tables(Results(tiny(), some_lines())))


def test_a_report_replaces_what_stands_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    folders, document = Folders(tmp_path, tmp_path, tmp_path), tmp_path / "experiments.md"
    for arm in ("public_only", "fedmkt"):
        write_lines(Unit(tiny(), arm, 0).file(folders), [one for one in some_lines() if one.arm == arm])
    document.write_text("before\n<!-- tiny: begin -->\nolder tables\n<!-- tiny: end -->\nafter\n")

    write_report([tiny()], folders, document)
    first, plot = document.read_text(), (tmp_path / "experiments" / "tiny.svg").read_bytes()
    shutil.rmtree(tmp_path / "experiments")
    write_report([tiny()], folders, document)

    assert first.startswith("before\n<!-- tiny: begin -->\n\n**Does it run?**\n")
    assert first.endswith("\n<!-- tiny: end -->\nafter\n")
    assert "older tables" not in first
    assert document.read_text() == first
    assert (tmp_path / "experiments" / "tiny.svg").read_bytes() == plot
    assert b"LLM minus public only" in plot


def test_missing_results_and_half_markers_are_refused() -> None:
    with pytest.raises(NoResults, match="'tiny' has 0 lines"):
        Results(tiny(), [])
    with pytest.raises(HalfMarked, match=r"<!-- tiny: begin --> \.\.\. <!-- tiny: end --> is missing"):
        put_between("text\n<!-- tiny: begin -->\n", "tiny", ["x"])


def test_a_document_without_markers_gets_them_at_its_end() -> None:
    found = put_between("# Title\n", "tiny", ["x"])

    assert found == "# Title\n\n## Tiny\n\n<!-- tiny: begin -->\n\nx\n\n<!-- tiny: end -->\n"
    assert put_between(found, "tiny", ["x"]) == found
