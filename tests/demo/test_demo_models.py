"""The demo's models: four families of tokenizers, four architectures, and folders that load like any real model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fedmkt.demo import models
from fedmkt.demo.models import ModelRecipe, default_recipes, ensure_models, make_model
from fedmkt.demo.texts import Corpus
from fedmkt.demo.vocabularies import train_tokenizer
from fedmkt.ml.models import load_base
from fedmkt.vocabulary import Vocabulary
from tiny_models import story

TEXTS = tuple(f"{story(number)}\n\n    Returns {number}: the café's list of ``names``" for number in range(400))
DOMAINS = ("reference", "numerics", "algebra", "databases")
CORPUS = Corpus(
    private=dict.fromkeys(DOMAINS, TEXTS[:5]),
    public=dict.fromkeys(DOMAINS, TEXTS[5:9]),
    pretraining=dict.fromkeys(DOMAINS, TEXTS[9:30]),
    general=TEXTS[30:],
)
RECIPES = default_recipes(DOMAINS, llm_steps=2, site_steps=2)
ALL_RECIPES = [RECIPES.llm, *RECIPES.sites.values()]


def ignore(done: int, total: int) -> None: ...


@pytest.mark.parametrize("kind", ["byte_bpe", "byte_bpe_digits", "sentencepiece_bpe"])
def test_a_tokenizer_writes_any_text_without_loss(kind: str) -> None:
    tokenizer = train_tokenizer(kind, 600, TEXTS)
    for text in (TEXTS[3], "tabs\tand\n\n  blank lines ", "snow ☃ and 12345"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_unigram_tokenizer_writes_what_it_was_trained_on() -> None:
    tokenizer = train_tokenizer("unigram", 600, TEXTS)
    text = TEXTS[3].replace("\n\n    ", " ")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_byte_tokens_are_ordinary_tokens(tmp_path: Path) -> None:
    """A vocabulary would not let special ones stand for text."""
    train_tokenizer("sentencepiece_bpe", 600, TEXTS).save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.from_tokenizer(tmp_path)
    encoded = vocabulary.encode("☃")
    assert b"".join(vocabulary.tokens[token] for token in encoded.ids).strip() == "☃".encode()
    assert sorted(vocabulary.roles.values()) == ["bos", "eos", "unk"]


def test_tokens_of_digits_stand_alone() -> None:
    tokenizer = train_tokenizer("byte_bpe_digits", 600, TEXTS * 2)
    assert tokenizer.encode("in 1234").tokens[-4:] == ["1", "2", "3", "4"]


def test_the_federation_has_different_architectures_and_tokenizers() -> None:
    sites = list(RECIPES.sites.values())
    assert len({site.architecture for site in sites}) == len({site.tokenizer for site in sites}) == 4
    assert len({site.vocabulary for site in ALL_RECIPES}) == 5


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda recipe: recipe.architecture + "-" + recipe.name)
def test_a_made_folder_loads_like_any_model(recipe: ModelRecipe, tmp_path: Path) -> None:
    texts = models._texts(recipe, CORPUS)
    make_model(ignore, recipe, texts, tmp_path / recipe.name)
    loaded = load_base(tmp_path / recipe.name, device="cpu")
    trained = Tokenizer.from_file(str(tmp_path / recipe.name / "tokenizer.json"))
    # transformers gives some architectures a tokenizer of its own on loading: text must be cut as in training
    assert loaded.vocabulary.encode(TEXTS[0]).ids.tolist() == [0, *trained.encode(TEXTS[0]).ids]
    assert loaded.vocabulary.size == trained.get_vocab_size()
    assert (loaded.vocabulary.bos_id, loaded.vocabulary.eos_id) == (0, 1)
    assert loaded.card.parameters < 2_000_000
    assert not list(tmp_path.glob(".*"))


def test_the_llm_is_the_largest() -> None:
    counts = [models.build_model(recipe, recipe.vocabulary).num_parameters() for recipe in ALL_RECIPES]
    assert counts[0] > 3 * max(counts[1:])


def test_training_lowers_the_loss() -> None:
    recipe = RECIPES.sites["algebra"]
    tokenizer = train_tokenizer(recipe.tokenizer, 400, TEXTS)
    sequences = [[0, *each.ids] for each in tokenizer.encode_batch(TEXTS)]
    model = models.build_model(recipe, 400)
    with torch.no_grad():
        before = float(models._loss(model, sequences[:16]))
        assert before == pytest.approx(np.log(400), abs=0.5)  # a fresh model knows nothing
    models.pretrain(ignore, model, sequences, ModelRecipe(**{**vars(recipe), "steps": 15}))
    with torch.no_grad():
        assert float(models._loss(model, sequences[:16])) < before - 1


def test_the_same_recipe_gives_the_same_weights() -> None:
    recipe = RECIPES.sites["numerics"]
    tokenizer = train_tokenizer(recipe.tokenizer, 400, TEXTS)
    sequences = [[0, *each.ids] for each in tokenizer.encode_batch(TEXTS)]
    made = [models.build_model(recipe, 400) for _ in range(2)]
    for model in made:
        models.pretrain(ignore, model, sequences, recipe)
    first, second = (model.state_dict() for model in made)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_sequence_comes_once_before_any_comes_again() -> None:
    recipe = ModelRecipe(**{**vars(RECIPES.llm), "steps": 4, "batch_size": 3})
    batches = list(models._batches([[number] for number in range(6)], recipe))
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == [[number] for number in range(6)]


def test_the_rate_rises_stays_and_falls_to_nearly_nothing() -> None:
    rates = [models._rate_factor(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19:41] == [1.0] * 22
    assert rates[70] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 60)


def test_models_are_made_once_and_kept(tmp_path: Path) -> None:
    done: list[str] = []
    wanted = ("algebra",)
    first = ensure_models(RECIPES, CORPUS, tmp_path, wanted=wanted, on_progress=lambda name, *_: done.append(name))
    assert done == ["algebra", "algebra"]
    stamp = (first["algebra"] / "model.safetensors").stat().st_mtime_ns
    again = ensure_models(RECIPES, CORPUS, tmp_path, wanted=wanted, on_progress=lambda *_: pytest.fail("made again"))
    assert again == first
    assert (again["algebra"] / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_recipe_or_corpus_has_another_place() -> None:
    other = Corpus(CORPUS.private, CORPUS.public, CORPUS.pretraining, TEXTS[31:])
    digests = {RECIPES.digest(CORPUS), RECIPES.digest(other), default_recipes(DOMAINS, llm_steps=3).digest(CORPUS)}
    assert len(digests) == 3
