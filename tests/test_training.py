"""The step loop: against a twin worked with plain torch, repeatable, resumable, and stopping where it must."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmkt.alignment import SparseTargets
from fedmkt.lesson import Lesson, Teacher, prepare_lesson
from fedmkt.ml.batches import SampleTooLong, tokenize
from fedmkt.ml.evaluation import evaluate
from fedmkt.ml.extraction import WIDE_TOP_K, WIDE_TOP_P, extract
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.plan import LessonRowsDiffer, NothingToLearn, Part, batches, step_count
from fedmkt.ml.training import TrainingDiverged, train_on_lesson, train_private
from fedmkt.protocol import DistillationConfig, LoraConfig, OptimizerConfig, SelectionReport
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.tokenized_set import tokenize_set
from fedmkt.vocab_map import build_vocab_map
from tiny_models import POSITIONS, save_tiny, story

LORA = LoraConfig(rank=4, alpha=8)
FAST = OptimizerConfig(learning_rate=0.01, batch_size=4, warmup_steps=2)
MAX_TOKENS = 80


def sample(number: int, start: int = 0) -> PublicSample:
    return PublicSample(f"s{number}", story(number)[:60], response_start=start, ends=number % 2 == 0)


PUBLIC = PublicSet(tuple(sample(number, 3 * number) for number in range(9)))
PRIVATE = [sample(number) for number in range(100, 107)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name) for name in ("llama", "gpt2", "gemma2")}


def party(folder: Path, lora: LoraConfig | None = LORA, seed: int = 0) -> Party:
    return Party(load_base(folder, device="cpu"), lora, seed=seed)


def lesson(student: Party, seed: int = 0, untaught: tuple[int, ...] = (1, 4)) -> Lesson:
    """Random soft targets on the student's rows; nobody teaches `untaught`, and elsewhere every third row has none."""
    random = np.random.default_rng(seed)
    rows = tokenize_set(student.vocabulary, PUBLIC, range(len(PUBLIC)), MAX_TOKENS)
    owners = np.repeat(np.arange(len(PUBLIC)), np.diff(rows.row_splits))
    supervised = ~np.isin(owners, untaught) & (np.arange(rows.rows) % 3 != 0)
    counts = np.where(supervised, random.integers(1, 6, rows.rows), 0)
    ids = [np.sort(random.choice(student.vocabulary.size, count, replace=False)) for count in counts]
    probs = [random.dirichlet(np.ones(count + 1))[:count] for count in counts]
    residual = [1 - chosen.sum() if count else 0.0 for chosen, count in zip(probs, counts, strict=True)]
    targets = SparseTargets(
        row_splits=rows.row_splits,
        splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        ids=np.concatenate(ids).astype(np.int32),
        probs=np.concatenate(probs).astype(np.float32),
        residual=np.array(residual, dtype=np.float32),
        supervised=supervised,
    )
    taught_by = tuple("none" if index in untaught else "llm" for index in range(len(PUBLIC)))
    return Lesson(rows.samples, taught_by, targets, SelectionReport())


def learn(student: Party, given: Lesson, **options: Any) -> list[float]:
    """Train on a lesson; the loss of every step."""
    losses: list[float] = []
    settings: dict[str, Any] = {
        "gold_weight": 0.5,
        "temperature": 1.0,
        "residual_bucket": True,
        "optimizer": FAST,
        "epochs": 1,
        "seed": 0,
        "max_tokens": MAX_TOKENS,
        "progress": lambda done, total, loss: losses.append(loss),
    }
    train_on_lesson(student, PUBLIC, given, **settings | options)
    return losses


def trained(student: Party) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in student.weights.values()])


# ------------------------------------------------------------------------------------------------ the twin


def twin_rows(student: Party, one: PublicSample) -> tuple[Tensor, list[int]]:
    """Log-probabilities (R, V) of a sample's response rows by the plain forward pass, and its gold ids."""
    encoding = student.vocabulary.encode(one.text, add_eos=one.ends, max_tokens=MAX_TOKENS)
    logits = student.model(input_ids=torch.tensor(encoding.ids.astype(np.int64))[None]).logits[0]
    rows = [j for j in range(1, len(encoding.ids)) if encoding.ends[j - 1] >= one.response_start]
    log_q = logits[[j - 1 for j in rows], : student.vocabulary.size].log_softmax(-1)
    return log_q, [int(encoding.ids[j]) for j in rows]


def twin_loss(
    student: Party, public: list[int], given: Lesson, private: list[PublicSample], gold_weight: float, weight: float
) -> Tensor:
    """The batch's loss written out row by row."""
    gold_sum, soft_sum, rows = torch.zeros(()), torch.zeros(()), 0
    targets = given.targets
    for index in public:
        log_q, gold = twin_rows(student, PUBLIC.samples[index])
        for position, token in enumerate(gold):
            row = int(targets.row_splits[index]) + position
            gold_sum = gold_sum - log_q[position, token]
            if targets.supervised[row]:
                entries = slice(*targets.splits[row : row + 2])
                ids = torch.tensor(targets.ids[entries].astype(np.int64))
                soft_sum = soft_sum - (torch.tensor(targets.probs[entries]) * log_q[position, ids]).sum()
                tail = 1 - log_q[position, ids].exp().sum()
                soft_sum = soft_sum - float(targets.residual[row]) * tail.log()
        rows += len(gold)
    loss = weight * (gold_weight * gold_sum + (1 - gold_weight) * soft_sum) / rows
    if private:
        parts = [twin_rows(student, one) for one in private]
        nll = sum((F.nll_loss(log_q, torch.tensor(gold), reduction="sum") for log_q, gold in parts), torch.zeros(()))
        loss = loss + (1 - weight) * nll / sum(len(gold) for _, gold in parts)
    return loss


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_steps_equal_a_twin_written_in_plain_torch(folders: dict[str, Path], architecture: str, replayed: bool) -> None:
    student, other = party(folders[architecture]), party(folders[architecture])
    given = lesson(student)
    weight = 0.3 if replayed else 1.0
    replay = PRIVATE if replayed else None
    losses = learn(student, given, gold_weight=0.7, replay=replay, public_weight=0.3, seed=5)

    random = np.random.default_rng([5, 0])
    public_order = random.permutation(len(PUBLIC))
    private_order = np.concatenate([random.permutation(len(PRIVATE)) for _ in range(2)]) if replayed else []
    optimizer = torch.optim.AdamW(other.weights.values(), weight_decay=FAST.weight_decay)
    for step in range(3):
        chosen = slice(4 * step, 4 * step + 4)
        private = [PRIVATE[index] for index in private_order[chosen]]
        loss = twin_loss(other, public_order[chosen].tolist(), given, private, 0.7, weight)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.weights.values(), FAST.max_grad_norm)
        optimizer.param_groups[0]["lr"] = FAST.learning_rate * min(1, (step + 1) / 2)
        optimizer.step()
    assert len(losses) == 3
    torch.testing.assert_close(trained(student), trained(other), rtol=1e-3, atol=2e-5)
    assert (trained(student) - trained(party(folders[architecture]))).abs().max() > 1e-3


def test_private_training_is_the_mean_loss_over_response_rows(folders: dict[str, Path]) -> None:
    student, losses = party(folders["llama"]), []
    parts = [twin_rows(student, one) for one in PRIVATE]
    nats = [-log_q[row, token].item() for log_q, gold in parts for row, token in enumerate(gold)]
    one_batch = FAST.model_copy(update={"batch_size": 7})
    report = train_private(
        student, PRIVATE, optimizer=one_batch, epochs=1, seed=0, progress=lambda *now: losses.append(now)
    )
    assert losses == [(1, 1, pytest.approx(sum(nats) / len(nats), rel=1e-5))]
    assert (report.steps, report.samples, report.first_loss_nats) == (1, 7, losses[0][2])


def test_temperature_and_bucket_reach_the_loss(folders: dict[str, Path]) -> None:
    given = lesson(party(folders["llama"]))
    firsts = {
        (temperature, bucket): learn(
            party(folders["llama"]), given, temperature=temperature, residual_bucket=bucket, gold_weight=0.0
        )[0]
        for temperature in (1.0, 2.0)
        for bucket in (True, False)
    }
    assert len({round(value, 4) for value in firsts.values()}) == 4


def test_a_gold_weight_of_one_ignores_the_targets_and_untaught_samples_keep_the_gold_term(
    folders: dict[str, Path],
) -> None:
    student = party(folders["llama"])
    nobody = lesson(student, untaught=tuple(range(len(PUBLIC))))
    taught = lesson(student)
    gold_only = learn(party(folders["llama"]), taught, gold_weight=1.0)
    assert gold_only == learn(party(folders["llama"]), nobody, gold_weight=1.0)
    half = learn(party(folders["llama"]), nobody, gold_weight=0.5)
    assert half[0] == pytest.approx(gold_only[0] / 2, rel=1e-6)


# ------------------------------------------------------------------------------------------------ how it is cut


@pytest.mark.parametrize("micro_batch_tokens", [1, 100])
def test_micro_batches_add_up_to_the_same_step(folders: dict[str, Path], micro_batch_tokens: int) -> None:
    one, other = party(folders["llama"]), party(folders["llama"])
    given = lesson(one)
    losses = learn(one, given, replay=PRIVATE)
    again = learn(other, given, replay=PRIVATE, micro_batch_tokens=micro_batch_tokens)
    assert losses == pytest.approx(again, rel=1e-5)
    torch.testing.assert_close(trained(one), trained(other), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("lora", [LORA, None])
def test_training_through_the_head_in_chunks_is_the_same_training(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, lora: LoraConfig | None
) -> None:
    gentle = FAST.model_copy(update={"learning_rate": 1e-3})
    whole, chunked = party(folders["llama"], lora), party(folders["llama"], lora)
    given = lesson(whole)
    losses = learn(whole, given, optimizer=gentle)
    monkeypatch.setattr("fedmkt.ml.training.CHUNK_LOGITS", 0)
    monkeypatch.setattr("fedmkt.ml.losses.CHUNK_LOGITS", 7 * whole.vocabulary.size)
    assert losses == pytest.approx(learn(chunked, given, optimizer=gentle), rel=1e-4)
    torch.testing.assert_close(trained(whole), trained(chunked), rtol=1e-3, atol=5e-5)


def test_steps_can_be_counted_beforehand(folders: dict[str, Path]) -> None:
    assert step_count(9, 4, 1) == 3
    assert step_count(9, 4, 2) == 5  # 18 samples, passes follow one another without a gap
    assert step_count(10, 4, 0.1) == 1
    assert step_count(10, 1, 0.3) == 3  # not 4 from 10 * 0.3 = 3.0000000000000004 in floating point
    assert step_count(10, 4, 0) == 0
    for epochs in (0, 0.5, 1, 2.5):
        seen: list[tuple[int, int]] = []
        report = train_private(
            party(folders["llama"]),
            PRIVATE,
            optimizer=FAST,
            epochs=epochs,
            seed=0,
            progress=lambda done, total, _, seen=seen: seen.append((done, total)),
        )
        steps = step_count(len(PRIVATE), 4, epochs)
        assert report.steps == steps
        assert seen == [(step + 1, steps) for step in range(steps)]
    assert report.samples == 18  # 2.5 passes over 7, rounded up


def test_every_pass_shows_every_sample_once_in_a_fresh_order(folders: dict[str, Path]) -> None:
    part = Part(tokenize(party(folders["llama"]).vocabulary, PRIVATE, MAX_TOKENS))
    drawn = [item.place for items in batches([part], 4, 3, np.random.default_rng(0)) for item in items]
    passes = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


# ------------------------------------------------------------------------------------------------ state


def test_the_same_seed_gives_the_same_bytes_dropout_included(folders: dict[str, Path]) -> None:
    dropping = LoraConfig(rank=2, dropout=0.3)  # and GPT-2 drops by itself

    def run(seed: int) -> bytes:
        student = party(folders["gpt2"], dropping)
        torch.manual_seed(int(np.random.default_rng().integers(1000)))  # the process's own state does not matter
        learn(student, lesson(student), replay=PRIVATE, seed=seed)
        return student.adapter_bytes()

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_is_cut_and_resumed_ends_where_an_unbroken_one_ends(
    folders: dict[str, Path], tmp_path: Path, stop: int
) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, loss: float) -> None:
        if done == stop:
            victim.save(tmp_path / "party")
            raise Killed

    options: dict[str, Any] = {"optimizer": FAST, "epochs": 3, "seed": 4}
    whole = party(folders["gpt2"])
    train_private(whole, PRIVATE[:2], optimizer=FAST, epochs=1, seed=9)  # earlier rounds count
    victim = party(folders["gpt2"])
    train_private(victim, PRIVATE[:2], optimizer=FAST, epochs=1, seed=9)
    train_private(whole, PRIVATE, **options)
    with pytest.raises(Killed):
        train_private(victim, PRIVATE, **options, progress=kill)
    resumed = Party.load(tmp_path / "party", load_base(folders["gpt2"], device="cpu"))
    report = train_private(resumed, PRIVATE, **options, steps_done=stop)
    assert report.steps == step_count(7, 4, 3) - stop
    assert resumed.adapter_bytes() == whole.adapter_bytes()


def test_optimizer_and_warm_up_go_on_over_calls(folders: dict[str, Path]) -> None:
    slow = FAST.model_copy(update={"warmup_steps": 4, "learning_rate": 0.04})
    student, rates = party(folders["llama"]), []

    def note(*_: object) -> None:
        rates.append(round(student.optimizer.param_groups[0]["lr"], 6))

    for _ in range(3):
        train_private(student, PRIVATE, optimizer=slow, epochs=1, seed=0, progress=note)
    assert rates == [0.01, 0.02, 0.03, 0.04, 0.04, 0.04]
    assert student.steps == 6


def test_training_leaves_base_mode_and_random_state_as_they_were(folders: dict[str, Path]) -> None:
    student = party(folders["gpt2"])
    frozen = {n: p.clone() for n, p in student.model.named_parameters() if not p.requires_grad}
    state = torch.random.get_rng_state()
    train_private(student, PRIVATE, optimizer=FAST, epochs=1, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not student.model.training
    for name, parameter in student.model.named_parameters():
        assert parameter.grad is None
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


def test_norms_and_biases_do_not_decay(folders: dict[str, Path]) -> None:
    groups = party(folders["gpt2"], None).optimizer.param_groups
    assert [(group["decay"], {p.ndim for p in group["params"]}) for group in groups] == [(True, {2}), (False, {1})]


def test_gradient_checkpointing_changes_memory_not_results(folders: dict[str, Path]) -> None:
    plain = party(folders["llama"])
    saving = Party(load_base(folders["llama"], device="cpu"), LORA, seed=0, gradient_checkpointing=True)
    for student in (plain, saving):
        train_private(student, PRIVATE, optimizer=FAST, epochs=1, seed=0)
    torch.testing.assert_close(trained(plain), trained(saving), rtol=1e-4, atol=1e-6)
    assert trained(saving).count_nonzero() > trained(saving).numel() // 2


# ------------------------------------------------------------------------------------------------ refusals


def test_a_loss_that_is_not_finite_names_the_sample_and_takes_no_step(folders: dict[str, Path]) -> None:
    student = party(folders["llama"])
    odd = int(student.vocabulary.encode("€").ids[-1])
    with torch.no_grad():
        student.model.get_input_embeddings().weight[odd] = math.nan
    before = student.adapter_bytes()
    euro = PublicSample("euro", "12 € or 20", 0, False)
    with pytest.raises(TrainingDiverged, match="step 1: the loss is not finite on samples 'euro';"):
        train_private(student, [PRIVATE[0], euro, PRIVATE[1]], optimizer=FAST, epochs=1, seed=0)
    assert student.adapter_bytes() == before
    assert student.steps == 0
    assert all(parameter.grad is None for parameter in student.weights.values())


def test_a_gradient_that_is_not_finite_takes_no_step(folders: dict[str, Path]) -> None:
    student = party(folders["llama"])
    name = next(iter(student.weights))
    student.weights[name].register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingDiverged, match=r"the gradient is not finite on a batch of samples 's10\d'"):
        train_private(student, PRIVATE, optimizer=FAST, epochs=1, seed=0)
    assert not student.optimizer.state


def test_nothing_to_learn_is_refused(folders: dict[str, Path]) -> None:
    cut_away = PublicSample("late", "word " * 60, response_start=290, ends=False)
    with pytest.raises(NothingToLearn, match="none of 1 samples has a response within the token limit"):
        train_private(party(folders["llama"]), [cut_away], optimizer=FAST, epochs=1, seed=0, max_tokens=40)
    with pytest.raises(NothingToLearn, match="none of 0 samples"):
        train_private(party(folders["llama"]), [], optimizer=FAST, epochs=1, seed=0)


def test_a_batch_without_response_rows_counts_and_changes_nothing(folders: dict[str, Path]) -> None:
    cut_away = PublicSample("late", "word " * 60, response_start=290, ends=False)
    single = FAST.model_copy(update={"batch_size": 1})
    student, alone = party(folders["llama"]), party(folders["llama"])
    report = train_private(student, [cut_away, PRIVATE[0]], optimizer=single, epochs=1, seed=0, max_tokens=90)
    assert (report.steps, report.samples, student.steps) == (2, 1, 2)
    train_private(alone, [PRIVATE[0]], optimizer=single, epochs=1, seed=0, max_tokens=90)
    assert student.optimizer.state[student.weights[next(iter(student.weights))]]["step"] == 1


def test_a_lesson_for_other_rows_is_refused(folders: dict[str, Path]) -> None:
    student = party(folders["llama"])
    with pytest.raises(LessonRowsDiffer, match=r"the texts give \d+ rows in 9 samples, the lesson has \d+ in 9"):
        learn(student, lesson(student), max_tokens=MAX_TOKENS // 2)


def test_a_public_sample_longer_than_the_model_is_refused(folders: dict[str, Path]) -> None:
    student = party(folders["gpt2"])
    epic = PublicSet((PublicSample("epic", story(1) * 9, 0, False),))
    empty = lesson(student)
    with pytest.raises(SampleTooLong, match=f"the model has {POSITIONS} positions"):
        train_on_lesson(
            student,
            epic,
            Lesson(np.zeros(1, np.int32), ("none",), empty.targets, empty.report),
            gold_weight=0.5,
            temperature=1.0,
            residual_bucket=True,
            optimizer=FAST,
            epochs=1,
            seed=0,
            max_tokens=500,
        )


# ------------------------------------------------------------------------------------------------ does it learn?


def test_private_training_lowers_the_loss_on_text_of_its_kind(folders: dict[str, Path]) -> None:
    student = party(folders["gpt2"], LoraConfig(rank=8, alpha=16))
    held_out = [sample(number) for number in range(200, 210)]
    before = evaluate(student, held_out)["all"]
    texts = [sample(number) for number in range(48)]
    config = OptimizerConfig(learning_rate=0.02, batch_size=8, warmup_steps=3)
    report = train_private(student, texts, optimizer=config, epochs=8, seed=0)
    after = evaluate(student, held_out)["all"]
    assert after.bits_per_byte < 0.6 * before.bits_per_byte
    assert after.accuracy > before.accuracy + 0.2
    assert report.last_loss_nats is not None
    assert report.first_loss_nats is not None
    assert report.last_loss_nats < report.first_loss_nats


def own_knowledge(of: Party) -> Any:
    return extract(
        of,
        PUBLIC,
        range(len(PUBLIC)),
        federation_id="fed_0123456789abcdef",
        round_number=1,
        slice_index=0,
        adapter_version=0,
        top_k=WIDE_TOP_K,
        top_p=WIDE_TOP_P,
        max_tokens=MAX_TOKENS,
    )


@pytest.fixture(scope="module")
def teacher(folders: dict[str, Path]) -> Party:
    """A GPT-2 that has read the public text: it has something to teach."""
    made = party(folders["gpt2"], LoraConfig(rank=8, alpha=16), seed=1)
    config = OptimizerConfig(learning_rate=0.02, batch_size=8, warmup_steps=3)
    train_private(made, PUBLIC.samples, optimizer=config, epochs=30, seed=0)
    return made


@pytest.mark.parametrize("student_name", ["gpt2", "llama"])
def test_soft_targets_alone_teach_across_vocabularies(
    folders: dict[str, Path], teacher: Party, student_name: str
) -> None:
    student = party(folders[student_name], LoraConfig(rank=8, alpha=16))
    vocab_map = build_vocab_map(teacher.vocabulary, student.vocabulary, "retokenized")
    heard = Teacher("llm", own_knowledge(teacher), teacher.vocabulary, vocab_map)
    config = DistillationConfig(rule="best_or_self", margin_nats_per_byte=0.05)
    given = prepare_lesson(PUBLIC, own_knowledge(student), student.vocabulary, [heard], config, MAX_TOKENS)
    assert given.report.taught["llm"] == len(PUBLIC)
    before = evaluate(student, PUBLIC.samples)["all"]
    optimizer = OptimizerConfig(learning_rate=0.02, batch_size=3, warmup_steps=3)
    losses = learn(student, given, gold_weight=0.0, epochs=12, optimizer=optimizer)
    after = evaluate(student, PUBLIC.samples)["all"]
    assert losses[-1] < losses[0]
    assert after.bits_per_byte < 0.8 * before.bits_per_byte  # it never saw a gold label


@pytest.mark.data
def test_a_real_model_learns_another_kind_of_text_and_replay_keeps_its_own(data_dir: Path) -> None:
    student = party(data_dir / "models" / "stories260K", LoraConfig(rank=4, alpha=8))
    own = [
        PublicSample(f"o{n}", f"Once upon a time, there was a little {w} named Tim.", 0, False)
        for n, w in enumerate(("boy", "dog", "cat", "bird", "girl", "bear"))
    ]
    before = evaluate(student, PUBLIC.samples)["all"].bits_per_byte
    nobody = lesson(student, untaught=tuple(range(len(PUBLIC))))
    config = OptimizerConfig(learning_rate=0.01, batch_size=4, warmup_steps=2)
    forgetful = party(data_dir / "models" / "stories260K", LoraConfig(rank=4, alpha=8))
    learn(student, nobody, gold_weight=1.0, epochs=6, optimizer=config, replay=own, public_weight=0.5)
    learn(forgetful, nobody, gold_weight=1.0, epochs=6, optimizer=config)
    assert evaluate(student, PUBLIC.samples)["all"].bits_per_byte < 0.8 * before
    kept, lost = (evaluate(each, own)["all"].bits_per_byte for each in (student, forgetful))
    assert kept < lost
