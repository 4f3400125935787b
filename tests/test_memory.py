"""Tokens in one pass through the model: measured, kept to, halved where a device says that it was too much."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmkt.ml import memory
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.evaluation import evaluate
from fedmkt.ml.memory import peak_bytes, power_of_two, tokens_at_once
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.training import train_private
from fedmkt.protocol import LoraConfig, OptimizerConfig
from fedmkt.public_set import PublicSample
from tiny_models import save_tiny, story

CPU = torch.device("cpu")
MEGA = 1_000_000
SAMPLES = [PublicSample(f"s{number}", story(number), 0, True) for number in range(16)]
CONFIG = OptimizerConfig(batch_size=8, learning_rate=1e-3)
ENOUGH = memory.MOST_TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def party(folder: Path) -> Party:
    return Party(load_base(folder, device="cpu"), LoraConfig(rank=2), seed=0)


def train(student: Party, *, steps_done: int = 0, progress: Callable[..., None] | None = None) -> torch.Tensor:
    train_private(student, SAMPLES, optimizer=CONFIG, epochs=2, seed=0, steps_done=steps_done, progress=progress)
    return torch.cat([parameter.detach().flatten() for parameter in student.weights.values()])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """Gives this process's container so many bytes."""

    def give(size: int) -> None:
        (tmp_path / "memory.max").write_text(f"{size}\n")
        monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path / "memory.max")

    return give


def test_the_peak_is_what_is_held_at_one_time() -> None:
    kept = torch.zeros(250_000)  # a million bytes, from before: it counts nowhere

    def work() -> None:
        first = torch.ones(500_000)  # 2 MB
        second = first + 1  # 4 MB
        second.view(500, 1000)[3:].mul_(2)  # no new memory
        del first  # 2 MB
        third = torch.cat([second, kept])  # 5 MB
        third.add_(1)

    assert peak_bytes(CPU, work) == 5 * MEGA
    assert peak_bytes(CPU, lambda: None) == 0
    assert peak_bytes(CPU, work) == 5 * MEGA, "nothing is left of the first time"


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(1, 1024), (2, 512), (10, 64)],  # 15, 7 and -1 MB for samples of 100 tokens and 1 MB: 1,500, 700, -100
)
def test_tokens_fit_into_a_quarter_of_the_memory(machine: Callable[[int], None], processes: int, expected: int) -> None:
    machine(64 * MEGA)

    def work(samples: int) -> None:
        torch.zeros(250_000 * samples + 250_000)  # a million bytes a sample, and a million anyway

    assert tokens_at_once(CPU, processes, 100, work) == expected


def test_a_machine_without_a_limit_has_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path / "nothing")
    whole = memory.machine_bytes()
    assert whole > 1 << 28
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path / "memory.max")
    assert memory.machine_bytes() == whole


def test_the_number_is_a_power_of_two_within_bounds() -> None:
    assert [power_of_two(tokens) for tokens in (-5, 0, 64, 127, 128, 1000, 16384, 10**9)] == [
        *(64, 64, 64, 64, 128, 512, 16384, 16384)
    ]


def test_a_training_measures_once_and_the_same_every_time(folder: Path, machine: Callable[[int], None]) -> None:
    plenty, short = party(folder), party(folder)
    everything = train(plenty)
    assert plenty.pass_tokens == ENOUGH
    machine(8 * MEGA)
    in_parts = train(short)
    assert short.pass_tokens is not None
    assert memory.FEWEST_TOKENS <= short.pass_tokens < 8 * 40, "a batch takes several passes"
    torch.testing.assert_close(in_parts, everything, rtol=1e-3, atol=2e-5)
    again = party(folder)
    assert torch.equal(train(again), in_parts)
    assert again.pass_tokens == short.pass_tokens
    machine(64 * 10**9)
    train(again)
    assert again.pass_tokens == short.pass_tokens


def test_a_resumed_training_goes_on_with_the_portions_it_had(
    folder: Path, machine: Callable[[int], None], tmp_path: Path
) -> None:
    """The successor may find more memory, on another machine: it ends with the same bytes all the same."""

    class Killed(Exception):
        pass

    machine(8 * MEGA)
    whole = train(party(folder))
    victim, successor = party(folder), party(folder)
    checkpoints = Checkpoints(tmp_path / "checkpoint", "job", interval_s=0)

    def save_and_die(done: int, total: int, loss: float) -> None:
        checkpoints.offer(victim, done, total)
        raise Killed

    with pytest.raises(Killed):
        train(victim, progress=save_and_die)
    machine(64 * 10**9)
    done = checkpoints.resume(successor)
    assert done == 1
    assert torch.equal(train(successor, steps_done=done), whole)


def refuse_more_than(student: Party, tokens: int) -> None:
    """As a device does that holds so much and no more."""

    def check(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError(f"{kwargs['input_ids'].numel()} tokens")

    student.model.register_forward_pre_hook(check, with_kwargs=True)


def test_a_pass_that_does_not_fit_is_taken_in_halves(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, small = party(folder), party(folder)
    expected = train(plain)
    refuse_more_than(small, 300)
    caplog.set_level(logging.INFO)
    torch.testing.assert_close(train(small), expected, rtol=1e-3, atol=2e-5)
    assert small.pass_tokens is not None
    assert small.pass_tokens <= 512
    told = [record.__dict__["micro_batch_tokens"] for record in caplog.records if "out_of_memory" in record.message]
    assert told[0] == ENOUGH // 2
    assert told[-1] == small.pass_tokens
    assert evaluate(small, SAMPLES)["all"].bits_per_byte == pytest.approx(
        evaluate(plain, SAMPLES)["all"].bits_per_byte, rel=1e-4
    )


def test_a_sample_that_does_not_fit_alone_ends_the_training(folder: Path) -> None:
    small = party(folder)
    refuse_more_than(small, 20)
    with pytest.raises(torch.OutOfMemoryError):
        train(small)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(small, SAMPLES)
    assert all(parameter.grad is None for parameter in small.weights.values())
