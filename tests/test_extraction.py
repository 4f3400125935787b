"""Knowledge from real models: equal to the plain forward pass, cut exactly, and never with ids beyond the tokenizer."""

import math
from collections.abc import Iterator
from pathlib import Path
from threading import current_thread
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedmkt.knowledge import EmptyKnowledge, Knowledge, KnowledgeNotFinite, check, decode, encode
from fedmkt.ml import extraction, inference
from fedmkt.ml.batches import SampleTooLong, collate, tokenize
from fedmkt.ml.extraction import WIDE_TOP_K, WIDE_TOP_P, cut_rows, extract
from fedmkt.ml.head import find_plain_head, logit_blocks, row_logits
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.protocol import KnowledgeConfig, LoraConfig
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.tokenized_set import tokenize_set
from tiny_models import ARCHITECTURES, MORE_AROUND_THE_HEAD, POSITIONS, save_tiny, story

FEDERATION = "fed_0123456789abcdef"


def prompted(number: int) -> PublicSample:
    text = story(number)[: 40 + 3 * number]
    return PublicSample(f"s{number}", text, response_start=text.index(" the "), ends=number % 2 == 0)


PUBLIC = PublicSet((*(prompted(number) for number in range(7)), PublicSample("ünï", "Zoë's café\n42 €", 0, False)))


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Party]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name in ARCHITECTURES + MORE_AROUND_THE_HEAD:
        made[name] = Party(load_base(save_tiny(root / name, name), device="cpu"), LoraConfig(rank=2), seed=0)
        with torch.no_grad():
            for parameter in made[name].weights.values():
                parameter.add_(0.02)  # adapters that matter
    return made


def extracted(party: Party, public_set: PublicSet = PUBLIC, **options: Any) -> Knowledge:
    settings = {"top_k": 8, "top_p": 0.9, "max_tokens": 64} | options
    return extract(
        party,
        public_set,
        range(len(public_set)),
        federation_id=FEDERATION,
        round_number=1,
        slice_index=0,
        adapter_version=3,
        **settings,
    )


def plain_logprobs(
    party: Party, sample: PublicSample, max_tokens: int = 64
) -> tuple[torch.Tensor, list[int], list[int]]:
    """One sample through the model's own forward pass: float64 log-probabilities (R, V), gold ids, context ends."""
    encoding = party.vocabulary.encode(sample.text, add_eos=sample.ends, max_tokens=max_tokens)
    with torch.no_grad():
        logits = party.model(input_ids=torch.tensor(encoding.ids.astype(np.int64))[None]).logits[0]
    rows = [j for j in range(1, len(encoding.ids)) if encoding.ends[j - 1] >= sample.response_start]
    kept = logits[[j - 1 for j in rows], : party.vocabulary.size].double()
    return kept.log_softmax(-1), [int(encoding.ids[j]) for j in rows], [int(encoding.ends[j - 1]) for j in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_AROUND_THE_HEAD)
def test_knowledge_equals_the_plain_forward_pass_sample_by_sample(parties: dict[str, Party], architecture: str) -> None:
    party = parties[architecture]
    knowledge = extracted(party)
    row = 0
    for sample in PUBLIC.samples:
        logprobs, gold, ends = plain_logprobs(party, sample)
        for position in range(len(gold)):
            entries = slice(*knowledge.entry_splits[row : row + 2])
            probs, ids = logprobs[position].exp().sort(descending=True)
            count = min(8, 1 + int((probs.cumsum(0) < 0.9).sum()))
            assert knowledge.token_ids[entries].tolist() == sorted(ids[:count].tolist())
            expected = logprobs[position][knowledge.token_ids[entries].astype(np.int64)]
            np.testing.assert_allclose(knowledge.logprobs[entries], expected, atol=2e-5)
            assert knowledge.gold_logprobs[row] == pytest.approx(float(logprobs[position][gold[position]]), abs=2e-5)
            assert knowledge.context_ends[row] == ends[position]
            row += 1
    assert row == knowledge.rows


def test_only_models_with_nothing_around_the_head_count_as_plain(parties: dict[str, Party]) -> None:
    for architecture in ARCHITECTURES:
        assert parties[architecture].plain_head is not None
    for architecture in MORE_AROUND_THE_HEAD:
        assert parties[architecture].plain_head is None


def test_a_head_with_lora_is_not_plain(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, targets=("lm_head", "q_proj"))
    party = Party(load_base(save_tiny(tmp_path, "llama"), device="cpu"), lora, seed=0)
    assert find_plain_head(party.model) is None
    with torch.no_grad():
        party.weights["lm_head.lora_B.default.weight"].fill_(0.1)
    logprobs, gold, _ = plain_logprobs(party, PUBLIC.samples[0])
    expected = [float(logprobs[row, token]) for row, token in enumerate(gold)]
    np.testing.assert_allclose(extracted(party).gold_logprobs[: len(gold)], expected, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_logits_of_a_padded_batch_are_those_of_each_sample_alone(
    parties: dict[str, Party], architecture: str
) -> None:
    party = parties[architecture]
    party.model.config.pad_token_id, saved = 5, party.model.config.pad_token_id
    batch = collate(tokenize(party.vocabulary, PUBLIC.samples, 64), party.device)
    assert not batch.attention_mask.all()
    with torch.no_grad():
        rows = row_logits(party.model, party.head, batch)[:, : party.vocabulary.size].double().log_softmax(-1)
        alone = torch.cat([plain_logprobs(party, sample)[0] for sample in PUBLIC.samples])
    party.model.config.pad_token_id = saved
    torch.testing.assert_close(rows, alone, atol=2e-5, rtol=1e-4)


def test_a_head_that_is_never_called_falls_back_to_all_logits(parties: dict[str, Party]) -> None:
    party = parties["llama"]
    unused = torch.nn.Linear(3, 3)
    batch = collate(tokenize(party.vocabulary, PUBLIC.samples, 64), party.device)
    with torch.no_grad():
        through_hook = row_logits(party.model, party.head, batch)
        fallen_back = row_logits(party.model, unused, batch)
    torch.testing.assert_close(through_hook, fallen_back)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_blocks_of_rows_make_up_the_batch(parties: dict[str, Party], architecture: str) -> None:
    party = parties[architecture]
    size = party.vocabulary.size
    batch = collate(tokenize(party.vocabulary, PUBLIC.samples, 64), party.device)
    with torch.no_grad():
        blocks = list(logit_blocks(party.model, party.head, party.plain_head, batch, size, most_rows=5))
        whole = list(logit_blocks(party.model, party.head, party.plain_head, batch, size))
    assert len(blocks) > 5
    assert len(whole) == 1
    assert [rows.start for rows, _ in blocks[:3]] == [0, 5, 10]
    assert blocks[-1][0].stop == len(batch.places)
    torch.testing.assert_close(torch.cat([logits for _, logits in blocks]), whole[0][1])


def test_rows_are_those_that_every_receiver_expects(parties: dict[str, Party]) -> None:
    for party in parties.values():
        knowledge = extracted(party)
        expected = tokenize_set(party.vocabulary, PUBLIC, range(len(PUBLIC)), 64)
        assert np.array_equal(knowledge.samples, expected.samples)
        assert np.array_equal(knowledge.row_splits, expected.row_splits)
        assert np.array_equal(knowledge.context_ends, expected.context_ends)


def test_knowledge_travels_and_passes_the_receivers_checks(parties: dict[str, Party]) -> None:
    party = parties["qwen2"]
    received = decode(encode(extracted(party)))
    check(
        received,
        PUBLIC,
        range(len(PUBLIC)),
        federation_id=FEDERATION,
        round_number=1,
        slice_index=0,
        vocabulary_fingerprint=party.vocabulary.fingerprint,
        vocabulary_size=party.vocabulary.size,
        settings=KnowledgeConfig(top_k=8, top_p=0.9, max_tokens=64),
    )
    assert (received.header.model_id, received.header.adapter_version) == ("qwen2", 3)


def test_ids_beyond_the_tokenizer_never_leave_and_take_no_mass(tmp_path: Path) -> None:
    party = Party(load_base(save_tiny(tmp_path, "gpt2"), device="cpu"), LoraConfig(rank=2), seed=0)
    before = extracted(party)
    with torch.no_grad():
        party.model.get_output_embeddings().weight[party.vocabulary.size :] = 50.0
        party.model.get_input_embeddings().weight[party.vocabulary.size :] = 50.0
    after = extracted(party)
    assert after.token_ids.max() < party.vocabulary.size
    assert np.array_equal(before.token_ids, after.token_ids)
    np.testing.assert_allclose(before.logprobs, after.logprobs, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_batch_size_does_not_change_knowledge(parties: dict[str, Party], batch_tokens: int) -> None:
    for name in ("opt", "bloom", "gemma2"):
        one, other = extracted(parties[name]), extracted(parties[name], batch_tokens=batch_tokens)
        assert np.array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "lanes give back the threads that they share out"
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_that_run_side_by_side_are_those_of_one_after_the_other(
    parties: dict[str, Party], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = parties[architecture]
    seen: list[int] = []
    lanes: set[str] = set()

    def cut(*arguments: Any, **options: Any) -> extraction.Kept:
        lanes.add(current_thread().name)
        return cut_rows(*arguments, **options)

    monkeypatch.setattr(extraction, "cut_rows", cut)
    side_by_side = extracted(party, batch_tokens=1, progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert len(seen) >= inference.LANES * inference.BATCHES_A_LANE
    assert lanes == {f"lane_{number}" for number in range(inference.LANES)}
    monkeypatch.setattr(inference, "BATCHES_A_LANE", 10**6)
    one_by_one = extracted(party, batch_tokens=1)
    np.testing.assert_array_equal(side_by_side.token_ids, one_by_one.token_ids)
    np.testing.assert_allclose(side_by_side.logprobs, one_by_one.logprobs, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_a_progress_that_ends_the_work_ends_every_lane(parties: dict[str, Party]) -> None:
    def cancel(done: int, total: int) -> None:
        raise InterruptedError

    party = parties["llama"]
    party.model.train(True)
    with pytest.raises(InterruptedError):
        extracted(party, batch_tokens=1, progress=cancel)
    assert party.model.training, "the mode is put back"
    assert not [thread for thread in enumerate_threads() if thread.name.startswith("lane")]
    party.model.train(False)


def test_the_cut_worked_by_hand() -> None:
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    gold = torch.tensor([2])

    def kept(top_k: int, top_p: float) -> dict[int, float]:
        found = cut_rows(logits, gold, top_k, top_p)
        return {int(i): round(math.exp(p), 4) for i, p in zip(found.ids, found.logprobs, strict=True)}

    assert kept(4, 0.79) == {1: 0.5, 3: 0.3}
    assert kept(4, 0.81) == {0: 0.15, 1: 0.5, 3: 0.3}
    assert kept(2, 0.99) == {1: 0.5, 3: 0.3}
    assert kept(4, 0.001) == {1: 0.5}
    assert kept(9, 1.0) == {0: 0.15, 1: 0.5, 2: 0.05, 3: 0.3}
    assert list(kept(4, 0.81)) == [0, 1, 3]  # ascending
    assert cut_rows(logits, gold, 1, 0.5).gold.item() == pytest.approx(math.log(0.05))


def test_of_equal_tokens_the_smallest_ids_are_kept() -> None:
    # probabilities 1/8, 1/4, 1/8, 1/4, 1/8, 1/8
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]) * math.log(2)

    def kept(top_k: int, top_p: float) -> list[int]:
        return cut_rows(logits, torch.tensor([0]), top_k, top_p).ids.tolist()

    assert kept(1, 1.0) == [1]
    assert kept(3, 1.0) == [0, 1, 3]
    assert kept(4, 1.0) == [0, 1, 2, 3]
    assert kept(6, 0.7) == [0, 1, 2, 3]  # 1/4 + 1/4 + 1/8 = 0.625 is not enough
    assert kept(6, 0.2) == [1]


def cut_by_sorting(logits: torch.Tensor, top_k: int, top_p: float) -> list[tuple[list[int], list[float]]]:
    """Row by row: a stable sort of the whole vocabulary, then entries until there is enough."""
    found = []
    for row in logits.log_softmax(dim=-1):
        values, order = row.sort(descending=True, stable=True)
        entries, mass = {}, 0.0
        for token, value in zip(order.tolist(), values.tolist(), strict=True):
            if entries and (mass >= top_p or len(entries) == top_k or value == -math.inf):
                break
            entries[token] = value
            mass += math.exp(value)
        ids = sorted(entries)
        found.append((ids, [entries[token] for token in ids]))
    return found


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("size", "top_k"), [(5, 9), (7, 7), (101, 1), (203, 16), (1009, 16), (2003, 4), (2003, 64), (5000, 1024)]
)
@pytest.mark.parametrize("kind", ["smooth", "few levels", "mostly forbidden", "all equal", "half"])
def test_the_cut_equals_a_stable_sort_of_the_whole_vocabulary(kind: str, size: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(size + top_k)
    logits = 3 * torch.randn(9, size, generator=generator)
    match kind:
        case "few levels":
            logits = logits.round()
        case "mostly forbidden":
            logits = logits.masked_fill(torch.rand(9, size, generator=generator) < 0.97, -math.inf)
            logits[:, size // 2] = 1.0
        case "all equal":
            logits = torch.full((9, size), 0.7)
        case "half":
            logits = logits.bfloat16().float()
    found = cut_rows(logits, torch.full((9,), size // 2), top_k, top_p)
    splits = np.append(0, np.cumsum(found.counts))
    expected = cut_by_sorting(logits, top_k, top_p)
    for row, (ids, values) in enumerate(expected):
        entries = slice(splits[row], splits[row + 1])
        if abs(sum(map(math.exp, values)) - top_p) > 1e-6:  # else rounding of the sum may decide
            assert found.ids[entries].tolist() == ids
            assert found.logprobs[entries].tolist() == values
    assert found.ids.dtype == np.int32


def test_rows_of_a_padded_head_are_cut_alike() -> None:
    wide = torch.randn(6, 1100, generator=torch.Generator().manual_seed(0))
    part, gold = wide[:, :1000], torch.arange(6)
    for ours, alone in zip(cut_rows(part, gold, 8, 0.9), cut_rows(part.clone(), gold, 8, 0.9), strict=True):
        assert np.array_equal(ours, alone)


def test_forbidden_tokens_are_not_kept_and_nan_is_not_fine() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0], [0.0, math.nan, 1.0], [math.inf, 0.0, 0.0], [0.0, 0.0, -math.inf]])
    found = cut_rows(logits, torch.tensor([1, 0, 0, 2]), 3, 1.0)
    assert found.ids[: found.counts[0]].tolist() == [1, 2]
    # the last: the text realises a forbidden token
    assert np.isfinite(found.gold).tolist() == [True, False, False, False]


def test_logits_that_are_nan_stop_with_the_samples_id(tmp_path: Path) -> None:
    party = Party(load_base(save_tiny(tmp_path, "llama"), device="cpu"), LoraConfig(rank=2), seed=0)
    odd_token = int(party.vocabulary.encode(PUBLIC.samples[7].text).ids[4])
    with torch.no_grad():
        party.model.get_input_embeddings().weight[odd_token] = math.nan
    with pytest.raises(KnowledgeNotFinite, match=r"sample 'ünï': \d+ of \d+ response rows"):
        extracted(party)


def test_a_sample_cut_before_its_response_is_left_out(parties: dict[str, Party]) -> None:
    long_prompt = PublicSample("long", "word " * 30 + "end", response_start=150, ends=True)
    knowledge = extracted(
        parties["llama"], PublicSet((PUBLIC.samples[0], long_prompt, PUBLIC.samples[1])), max_tokens=40
    )
    assert knowledge.samples.tolist() == [0, 2]
    with pytest.raises(EmptyKnowledge, match="none of 1 public samples has a response within 40 tokens"):
        extracted(parties["llama"], PublicSet((long_prompt,)), max_tokens=40)


def test_a_sample_longer_than_the_model_is_refused_with_its_id_and_the_remedy(parties: dict[str, Party]) -> None:
    long = PublicSet((PublicSample("epic", story(1) * 9, 0, False),))
    with pytest.raises(SampleTooLong, match=f"'epic' has 500 tokens, the model has {POSITIONS} positions; set"):
        extracted(parties["gpt2"], long, max_tokens=500)
    assert extracted(parties["bloom"], long, max_tokens=200).rows == 199  # ALiBi has no such bound


def test_small_sets_are_cut_into_tokens_once_and_stay_as_they_were(parties: dict[str, Party]) -> None:
    llama, bloom = parties["llama"].vocabulary, parties["bloom"].vocabulary
    once, again = (tokenize(llama, PUBLIC.samples, 64) for _ in range(2))
    assert all(one is other for one, other in zip(once, again, strict=True))
    again.clear()  # the list is the caller's own
    assert len(tokenize(llama, PUBLIC.samples, 64)) == len(PUBLIC)
    assert len(tokenize(llama, PUBLIC.samples[:3], 64)) == 3
    assert max(len(sample.ids) for sample in tokenize(llama, PUBLIC.samples, 20)) == 20
    for vocabulary in (llama, bloom):
        for sample, tokens in zip(PUBLIC.samples, tokenize(vocabulary, PUBLIC.samples, 64), strict=True):
            expected = vocabulary.encode(sample.text, add_eos=sample.ends, max_tokens=64)
            assert np.array_equal(tokens.ids, expected.ids)


def test_wide_knowledge_holds_nearly_everything(parties: dict[str, Party]) -> None:
    knowledge = extracted(parties["qwen2"], top_k=WIDE_TOP_K, top_p=WIDE_TOP_P)
    counts = np.diff(knowledge.entry_splits)
    mass = np.add.reduceat(np.exp(knowledge.logprobs), knowledge.entry_splits[:-1])
    assert counts.max() <= WIDE_TOP_K
    assert np.all((mass >= WIDE_TOP_P - 1e-6) | (counts == WIDE_TOP_K))
    assert mass.min() > 0.8


def test_a_half_precision_model_is_normalised_in_float32(tmp_path: Path) -> None:
    party = Party(load_base(save_tiny(tmp_path, "llama"), device="cpu", dtype="bfloat16"), LoraConfig(rank=2), seed=0)
    batch = collate(tokenize(party.vocabulary, PUBLIC.samples[:1], 64), party.device)
    assert party.plain_head is not None
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = party.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        party.model(input_ids=batch.input_ids)
        handle.remove()
        ((_, logits),) = logit_blocks(party.model, party.head, party.plain_head, batch, party.vocabulary.size)
        exact = F.linear(seen[0][0].float(), party.head.get_parameter("weight").float())[batch.places]
    torch.testing.assert_close(logits, exact[:, : party.vocabulary.size])
    assert not torch.equal(logits, logits.bfloat16().float())


def test_extraction_reports_progress_and_leaves_the_model_as_it_was(parties: dict[str, Party]) -> None:
    party, seen = parties["gpt_neox"], []
    party.model.train()
    first = extracted(party, batch_tokens=64, progress=lambda done, total: seen.append((done, total)))
    assert party.model.training
    party.model.train(False)
    assert first.equals(extracted(party, batch_tokens=64))  # dropout was off
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "babyllama-361"])
def test_real_models_know_how_a_story_goes_on(data_dir: Path, name: str) -> None:
    party = Party(load_base(data_dir / "models" / name, device="cpu"), LoraConfig(rank=2), seed=0)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    knowledge = extracted(party, PublicSet((PublicSample("lily", text, 30, False),)), max_tokens=200, top_p=0.98)
    expected, gold, _ = plain_logprobs(party, PublicSample("lily", text, 30, False), max_tokens=200)
    np.testing.assert_allclose(
        knowledge.gold_logprobs, [float(expected[row, token]) for row, token in enumerate(gold)], atol=1e-4
    )
    assert float(np.exp(knowledge.gold_logprobs).mean()) > 0.5
