"""Questions with choices and free answers: equal to plain twins on every architecture, literal Rouge-L, edges."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from fedmkt import cli
from fedmkt.ml.evaluation import evaluate
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.questions import AnswerTooLong, chosen_answers, free_answers, rouge_l
from fedmkt.protocol import EvaluationConfig, LoraConfig
from fedmkt.public_set import PublicSample
from tiny_models import ARCHITECTURES, POSITIONS, save_tiny, story

QUESTIONS = tuple(
    PublicSample(f"q{number}", prompt + choices[0], len(prompt), True, ("even", "odd")[number % 2], choices)
    for number, (prompt, choices) in enumerate(
        [
            ("One day the cat", (" went to the river", " said", " found a ball and ran away")),
            ("Then the dog ", ("ran away", "sat down")),  # a token may reach from the prompt's space into the answer
            ("the big red b", ("arn", "all", "ird", "ox")),
            ("Is it day? ", ("yes", "no")),
        ]
    )
)


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Party]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: Party(load_base(save_tiny(root / name, name), device="cpu"), LoraConfig(rank=2), seed=0)
        for name in ARCHITECTURES
    }


def plain_nats(party: Party, prompt: str, answer: str) -> float:
    """By one forward pass: all tokens that end after the prompt does."""
    encoding = party.vocabulary.encode(prompt + answer)
    with torch.no_grad():
        logits = party.model(input_ids=torch.tensor(encoding.ids.astype(np.int64))[None]).logits[0]
    log_q = logits[:, : party.vocabulary.size].double().log_softmax(-1)
    counted = [j for j in range(1, len(encoding.ids)) if encoding.ends[j] > len(prompt.encode())]
    assert counted
    return -sum(float(log_q[j - 1, int(encoding.ids[j])]) for j in counted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_chosen_answer_is_the_likeliest_by_plain_forward_passes(
    parties: dict[str, Party], architecture: str
) -> None:
    party = parties[architecture]
    found = chosen_answers(party, QUESTIONS, max_tokens=80, batch_tokens=60)
    assert sorted(found) == [0, 1, 2, 3]
    for index, sample in enumerate(QUESTIONS):
        nats = [plain_nats(party, sample.prompt, choice) for choice in sample.choices]
        per_byte = [value / len(choice.encode()) for value, choice in zip(nats, sample.choices, strict=True)]
        assert found[index] == (min(nats) == nats[0], min(per_byte) == per_byte[0])


def test_a_model_that_knows_nothing_takes_the_answer_of_fewest_tokens_and_per_byte_the_first_of_equals(
    tmp_path: Path,
) -> None:
    party = Party(load_base(save_tiny(tmp_path, "gpt_neox"), device="cpu"), LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        party.model.get_output_embeddings().weight.zero_()
    # every token costs log V
    tokens = [len(party.vocabulary.encode(text, add_bos=False).ids) for text in ("a", "zq")]
    assert tokens == [1, 2]
    sample = PublicSample("x", "..zq", 2, True, None, ("zq", "a"))
    assert chosen_answers(party, [sample], max_tokens=80) == {0: (False, True)}
    other = PublicSample("y", "..a", 2, True, None, ("zq", "a"))
    assert chosen_answers(party, [other], max_tokens=80) == {0: (True, False)}


def test_a_question_of_which_an_answer_is_cut_is_left_out(parties: dict[str, Party]) -> None:
    long = PublicSample("long", "Is it? yes", 7, True, None, ("yes", "no " * 40))
    assert chosen_answers(parties["gpt2"], [long, QUESTIONS[3]], max_tokens=30).keys() == {1}


def test_samples_without_choices_are_no_questions(parties: dict[str, Party]) -> None:
    assert chosen_answers(parties["gpt2"], [PublicSample("x", story(1), 5, True)], max_tokens=80) == {}


def plain_answer(party: Party, prompt: str, tokens: int) -> str:
    """Greedy, one forward pass over everything for each token."""
    ids = [int(index) for index in party.vocabulary.encode(prompt).ids]
    answer: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = party.model(input_ids=torch.tensor([ids + answer])).logits[0, -1, : party.vocabulary.size]
        answer.append(int(logits.argmax()))
        if answer[-1] == party.vocabulary.eos_id:
            break
    return b"".join(party.vocabulary.tokens[index] for index in answer).decode(errors="replace")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_free_answers_are_greedy_whatever_shares_their_batch(parties: dict[str, Party], architecture: str) -> None:
    """Prompts of unlike lengths are padded on the left; heads are wider than the tokenizer."""
    party = parties[architecture]
    prompts = ("One day", "Then the big red mouse went to the garden and", "a")
    samples = [PublicSample(prompt, prompt + " x", len(prompt), True) for prompt in prompts]
    seen: list[tuple[int, int]] = []
    found = free_answers(party, samples, answer_tokens=7, progress=lambda done, total: seen.append((done, total)))
    assert found == [plain_answer(party, prompt, 7) for prompt in prompts]
    assert seen[-1] == (3, 3)
    assert not party.model.training


def test_a_long_prompt_loses_its_beginning_and_too_long_an_answer_is_refused(parties: dict[str, Party]) -> None:
    party = parties["opt"]
    long = PublicSample("long", story(1) * 9, len(story(1) * 8), True)
    (answer,) = free_answers(party, [long], answer_tokens=8)
    assert answer
    with pytest.raises(AnswerTooLong, match=rf"answers of {POSITIONS} tokens leave none of {POSITIONS} positions"):
        free_answers(party, [long], answer_tokens=POSITIONS)


def test_rouge_l_by_hand() -> None:
    # "the cat" of three and of four words: precision 2/3, recall 2/4, F1 = 4/7
    assert rouge_l("The cat sat.", "the cat ran away") == pytest.approx(4 / 7)
    assert rouge_l("a b c", "a b c") == 1.0
    assert rouge_l("", "a b c") == 0.0
    assert rouge_l("кошка спит", "Кошка не спит") == pytest.approx(0.8)


def test_rouge_l_on_english_is_what_the_library_gives_without_our_words() -> None:
    pairs = [(story(number), story(number * 3 + 1)) for number in range(20)]
    for answer, reference in pairs:
        plain = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == plain


def test_an_evaluation_counts_questions_by_domain_and_spreads_free_answers(parties: dict[str, Party]) -> None:
    party = parties["qwen2"]
    texts = [PublicSample(f"t{number}", story(number), 0, False, "even") for number in range(4)]
    found = evaluate(
        party, [*QUESTIONS, *texts], max_tokens=80, questions=EvaluationConfig(rouge_samples=2, answer_tokens=5)
    )
    chosen = chosen_answers(party, QUESTIONS, max_tokens=80)
    assert (found["all"].choice_samples, found["even"].choice_samples, found["odd"].choice_samples) == (4, 2, 2)
    assert found["odd"].choice_accuracy == sum(chosen[index][0] for index in (1, 3)) / 2
    assert found["even"].choice_accuracy_per_byte == sum(chosen[index][1] for index in (0, 2)) / 2
    # of the four with a prompt the first and the third are asked; both are of one domain
    assert (found["all"].rouge_samples, found["even"].rouge_samples, found["odd"].rouge_samples) == (2, 2, 0)
    answers = free_answers(party, [QUESTIONS[0], QUESTIONS[2]], answer_tokens=5)
    scores = [rouge_l(answer, QUESTIONS[index].response) for answer, index in zip(answers, (0, 2), strict=True)]
    assert found["all"].rouge_l == pytest.approx(sum(scores) / 2)
    assert found["odd"].rouge_l is None


def test_without_choices_and_free_answers_nothing_more_is_said(parties: dict[str, Party]) -> None:
    found = evaluate(parties["qwen2"], [PublicSample("t", story(2), 4, True)])["all"]
    assert (found.choice_accuracy, found.choice_accuracy_per_byte, found.rouge_l) == (None, None, None)
    assert (found.choice_samples, found.rouge_samples) == (0, 0)
    assert math.isfinite(found.bits_per_byte)


def test_the_command_evaluates_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    rows = [
        {"prompt": "One day the cat", "completion": " ran away", "choices": [" sat down", " ran away"], "domain": "a"},
        {"prompt": "Then the dog", "completion": " sat down", "domain": "b"},
    ]
    file = tmp_path / "held-out.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    cli.app(
        ["evaluate", str(folder), str(file), "--rouge", "1", "--answer-tokens", "4", "--json"], standalone_mode=False
    )
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["samples"] == 2
    assert found["a"]["choice_samples"] == 1
    assert found["a"]["rouge_samples"] == 1
    cli.app(["evaluate", str(folder), str(file)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "bits per byte" in shown
    assert "100.0%" in shown or "0.0%" in shown


def test_a_real_model_prefers_how_a_story_goes_on(data_dir: Path) -> None:
    party = Party(load_base(data_dir / "models" / "stories260K", device="cpu"), LoraConfig(rank=2), seed=0)
    begun = (
        ("Once upon a time, there was a little girl named", (" Lily.", " the.", " ran.", " very.")),
        ("She loved to play in the", (" park", " said", " was", " she")),
        ("The dog was very", (" happy", " and", " ran", " it")),
        ("Tom and his mom went to the", (" park", " very", " Lily was", " said")),
    )
    samples = [PublicSample(start, start + choices[0], len(start), True, None, choices) for start, choices in begun]
    found = evaluate(party, samples, questions=EvaluationConfig(rouge_samples=2, answer_tokens=8))["all"]
    assert found.choice_accuracy == 1.0
    assert found.rouge_samples == 2
