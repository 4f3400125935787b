"""Bits per byte and accuracy: equal to a sample-by-sample twin, comparable across tokenizers, sane on real models."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmkt.ml.evaluation import EvaluationNotFinite, NothingToEvaluate, evaluate
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.protocol import LoraConfig
from fedmkt.public_set import PublicSample
from tiny_models import ARCHITECTURES, save_tiny, story

STORIES = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her mom. One day, she "
    "saw a big red ball. The ball was very pretty and Lily wanted to play with it. She asked her mom if she could.",
    "Tom was a happy boy. He had a small dog named Max. Every day they went outside to play and run. One day, Max saw "
    "a bone under the tree. Tom was very surprised and gave Max a big hug. They were best friends.",
    "There was a cat who liked to sleep in the sun. The cat was very lazy. One morning a bird came and sang a song. "
    "The cat woke up and smiled. The cat and the bird became good friends and played together all day.",
)


def samples(count: int) -> list[PublicSample]:
    """Two domains and some without one; prompts of different lengths; some end with eos."""
    domains = ("animals", None, "places")
    return [
        PublicSample(f"s{n}", story(n), response_start=5 * n, ends=n % 2 == 0, domain=domains[n % 3])
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Party]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: Party(load_base(save_tiny(root / name, name), device="cpu"), LoraConfig(rank=2), seed=0)
        for name in ARCHITECTURES
    }


def twin(party: Party, chosen: list[PublicSample], max_tokens: int) -> tuple[float, float, int]:
    """(bits per byte, accuracy, bytes) by one plain forward pass a sample."""
    nats, hits, rows, covered = 0.0, 0, 0, 0
    for sample in chosen:
        encoding = party.vocabulary.encode(sample.text, add_eos=sample.ends, max_tokens=max_tokens)
        with torch.no_grad():
            logits = party.model(input_ids=torch.tensor(encoding.ids.astype(np.int64))[None]).logits[0]
        log_q = logits[:, : party.vocabulary.size].double().log_softmax(-1)
        response = [j for j in range(1, len(encoding.ids)) if encoding.ends[j - 1] >= sample.response_start]
        for j in response:
            nats -= float(log_q[j - 1, int(encoding.ids[j])])
            hits += int(log_q[j - 1].argmax()) == int(encoding.ids[j])
        rows += len(response)
        covered += int(encoding.ends[-1] - encoding.ends[response[0] - 1])
    return nats / math.log(2) / covered, hits / rows, covered


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_equals_the_twin_in_every_domain(parties: dict[str, Party], architecture: str) -> None:
    party, chosen = parties[architecture], samples(9)
    found = evaluate(party, chosen, max_tokens=80, batch_tokens=200)
    assert list(found) == ["all", "animals", "places"]
    for domain, evaluation in found.items():
        part = chosen if domain == "all" else [sample for sample in chosen if sample.domain == domain]
        bits_per_byte, accuracy, covered = twin(party, part, 80)
        assert evaluation.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-5)
        assert evaluation.accuracy == pytest.approx(accuracy)
        assert (evaluation.samples, evaluation.bytes) == (len(part), covered)


def test_a_model_that_knows_nothing_pays_log_of_the_vocabulary_for_each_token(tmp_path: Path) -> None:
    party = Party(load_base(save_tiny(tmp_path, "llama"), device="cpu"), LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        party.model.get_output_embeddings().weight.zero_()
    sample = PublicSample("x", "abc", 0, True)
    tokens = len(party.vocabulary.encode("abc", add_eos=True).ids) - 1  # all but bos are predicted
    found = evaluate(party, [sample])["all"]
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(party.vocabulary.size) / 3)
    assert (found.bytes, found.samples) == (3, 1)


def test_batches_and_order_do_not_matter(parties: dict[str, Party]) -> None:
    chosen = samples(9)
    one = evaluate(parties["opt"], chosen, batch_tokens=10_000)
    other = evaluate(parties["opt"], chosen[::-1], batch_tokens=1)
    for domain in one:
        assert one[domain].bits_per_byte == pytest.approx(other[domain].bits_per_byte, rel=1e-5)
        assert one[domain].accuracy == other[domain].accuracy


def test_samples_without_a_response_left_are_not_counted(parties: dict[str, Party]) -> None:
    cut_away = PublicSample("late", "word " * 60, response_start=290, ends=False, domain="late")
    found = evaluate(parties["llama"], [cut_away, *samples(1)], max_tokens=50)
    assert set(found) == {"all", "animals"}
    assert found["all"].samples == 1
    with pytest.raises(NothingToEvaluate, match="none of 1 samples has a response within 50 tokens"):
        evaluate(parties["llama"], [cut_away], max_tokens=50)
    with pytest.raises(NothingToEvaluate, match="none of 0 samples"):
        evaluate(parties["llama"], [])


def test_a_text_longer_than_the_model_is_cut_to_its_positions(parties: dict[str, Party]) -> None:
    found = evaluate(parties["gpt2"], [PublicSample("long", story(1) * 8, 0, False)], max_tokens=500)
    assert 0 < found["all"].bytes < len(story(1)) * 8


def test_a_loss_that_is_not_finite_names_the_sample(tmp_path: Path) -> None:
    party = Party(load_base(save_tiny(tmp_path, "qwen2"), device="cpu"), LoraConfig(rank=2), seed=0)
    odd = int(party.vocabulary.encode("€").ids[1])
    with torch.no_grad():
        party.model.get_input_embeddings().weight[odd] = math.nan
    with pytest.raises(EvaluationNotFinite, match="sample 'euro' has loss nan"):
        evaluate(party, [PublicSample("euro", "10 € or 20", 0, False)])


def test_progress_reaches_the_end(parties: dict[str, Party]) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(parties["bloom"], samples(5), batch_tokens=100, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)


@pytest.mark.data
@pytest.mark.parametrize(("name", "most"), [("stories260K", 1.1), ("babyllama-105", 1.2), ("babyllama-361", 1.2)])
def test_real_models_find_their_own_kind_of_text_easy(data_dir: Path, name: str, most: float) -> None:
    party = Party(load_base(data_dir / "models" / name, device="cpu"), LoraConfig(rank=2), seed=0)
    stories = evaluate(party, [PublicSample(str(n), text, 0, False) for n, text in enumerate(STORIES)])["all"]
    other = evaluate(party, [PublicSample("x", "Section 4.2: eigenvalues of Hermitian operators are real.", 0, False)])
    assert 0.5 < stories.bits_per_byte < most
    assert stories.accuracy > 0.5
    assert other["all"].bits_per_byte > 2 * stories.bits_per_byte
