"""Who takes part in the demo and with what: its own parts, the user's, or both."""

from pathlib import Path

import pytest

from fedmkt.demo import setup
from fedmkt.demo.setup import DemoOptions, ModelSource, SiteIncomplete, cached_corpus, demo_config, prepare
from fedmkt.demo.texts import Corpus
from fedmkt.protocol import PublicSetConfig
from fedmkt.public_set import PublicSet
from tiny_models import story

DOMAINS = ("reference", "numerics", "algebra", "databases")
COMMIT = "0123456789abcdef" * 2 + "01234567"


def texts(start: int, count: int) -> tuple[str, ...]:
    return tuple(f"{number}: {story(number)}" for number in range(start, start + count))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that already holds texts."""
    corpus = Corpus(
        private={domain: texts(10_000 * at, 20) for at, domain in enumerate(DOMAINS)},
        public={domain: texts(10_000 * at + 5000, setup.PUBLIC_CHUNKS) for at, domain in enumerate(DOMAINS)},
        pretraining={domain: texts(10_000 * at + 8000, 5) for at, domain in enumerate(DOMAINS)},
        general=texts(90_000, 10),
    )
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / f"texts-{setup._text_key()}.json").write_bytes(corpus.to_json())
    return folder


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.jsonl").write_text('{"text": "one"}\n')
    return tmp_path / "notes.jsonl"


def ignore(name: str, done: int, total: int) -> None: ...


def own_models(model: str) -> dict[str, str]:
    return dict.fromkeys(DOMAINS, model)


def test_the_texts_are_read_from_the_cache(cache: Path) -> None:
    assert cached_corpus(cache, lambda *_: pytest.fail("read again")).general == texts(90_000, 10)


def test_the_demo_s_own_sites_keep_their_domain_and_text(cache: Path, model: str, tmp_path: Path) -> None:
    made = prepare(DemoOptions(llm=model, slms=own_models(model), cache=cache, out=tmp_path / "out"), ignore)
    assert [(site.name, site.domain) for site in made.sites] == [(domain, domain) for domain in DOMAINS]
    assert made.sites[1].private_file.read_text().splitlines()[0] == '{"text": "' + texts(10_000, 1)[0] + '"}'
    assert made.config.sites == DOMAINS
    assert made.config.schedule.quorum == 4


def test_the_public_set_has_a_slice_for_each_round_and_a_held_out_part(cache: Path, model: str, tmp_path: Path) -> None:
    options = DemoOptions(rounds=3, llm=model, slms=own_models(model), cache=cache, out=tmp_path / "out")
    made = prepare(options, ignore)
    parts = PublicSet.from_jsonl(made.public_file.read_bytes()).parts(
        made.config.public_set.slices, made.config.public_set.holdout_share
    )
    assert len(parts.holdout) == 4 * setup.HOLDOUT_CHUNKS
    assert [len(part) for part in parts.slices] == [4 * setup.SLICE_CHUNKS] * 3


def test_many_rounds_share_the_text_there_is(cache: Path, model: str, tmp_path: Path) -> None:
    options = DemoOptions(rounds=20, llm=model, slms=own_models(model), cache=cache, out=tmp_path / "out")
    made = prepare(options, ignore)
    public = PublicSet.from_jsonl(made.public_file.read_bytes())
    parts = public.parts(made.config.public_set.slices, made.config.public_set.holdout_share)
    assert len(public) == 4 * setup.PUBLIC_CHUNKS
    assert len(parts.slices) == 20
    assert len(parts.holdout) == 4 * setup.HOLDOUT_CHUNKS


def test_sites_of_the_user_s_own_replace_the_demo_s(cache: Path, model: str, notes: Path, tmp_path: Path) -> None:
    options = DemoOptions(llm=model, slms={"clinic": model}, private={"clinic": notes}, cache=cache, out=tmp_path / "o")
    made = prepare(options, ignore)
    assert [(site.name, site.domain, site.private_file) for site in made.sites] == [("clinic", None, notes)]


def test_nothing_is_read_or_trained_when_everything_is_given(model: str, notes: Path, tmp_path: Path) -> None:
    options = DemoOptions(
        llm=model,
        slms={"clinic": model},
        private={"clinic": notes},
        public=notes,
        cache=tmp_path / "empty",
        out=tmp_path / "out",
    )
    made = prepare(options, lambda *_: pytest.fail("something was made"))
    assert made.public_file == notes
    assert made.config.public_set.holdout_share == 0.1
    assert not (tmp_path / "empty").exists()


def test_a_site_without_private_text_is_refused(cache: Path, model: str, tmp_path: Path) -> None:
    options = DemoOptions(llm=model, slms={"clinic": model}, cache=cache, out=tmp_path / "out")
    with pytest.raises(SiteIncomplete, match="site 'clinic' has no --private; give --private clinic=PATH"):
        prepare(options, ignore)


def test_a_site_without_a_model_is_refused(cache: Path, model: str, notes: Path, tmp_path: Path) -> None:
    options = DemoOptions(llm=model, private={"clinic": notes}, cache=cache, out=tmp_path / "out")
    with pytest.raises(SiteIncomplete, match="site 'clinic' has no --slm"):
        prepare(options, ignore)


def test_small_models_train_every_weight_and_real_ones_an_adapter() -> None:
    public = PublicSetConfig(slices=3)
    assert demo_config(("a",), public).lora is None
    real = demo_config(("a",), public, own_models=True)
    assert real.lora is not None
    assert real.site_optimizer.learning_rate < demo_config(("a",), public).site_optimizer.learning_rate


def test_a_hub_model_is_named_with_its_commit(tmp_path: Path) -> None:
    assert ModelSource.parse(f"group/name@{COMMIT}") == ModelSource("group/name", COMMIT)
    assert ModelSource.parse("group/name") == ModelSource("group/name")
    assert ModelSource.parse(str(tmp_path)) == ModelSource(str(tmp_path))
