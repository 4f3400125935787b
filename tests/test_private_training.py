"""DP-SGD of the private step: clipped by sample, noised, accounted for, on every architecture, never silently off."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedmkt.ml.batches import TokenSample, tokenize
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import Progress, private_phase, silent
from fedmkt.ml.private_budget import PrivacyBudget
from fedmkt.ml.private_training import NoisySteps, _training, train_with_noise
from fedmkt.ml.sample_gradients import SampleHooks, backward, check_samples_apart, drop_unusable, sample_hooks
from fedmkt.ml.training import TrainingDiverged
from fedmkt.privacy import BudgetSpent, PrivacyGoal, PrivacyLedger, PrivacyRefused
from fedmkt.protocol import FederationConfig, KnowledgeConfig, LoraConfig, OptimizerConfig, PrivateConfig
from fedmkt.public_set import PublicSample
from tiny_models import ARCHITECTURES, MORE_AROUND_THE_HEAD, POSITIONS, save_tiny, story

LORA = LoraConfig(rank=4, alpha=8)
FAST = OptimizerConfig(learning_rate=0.01, batch_size=8, warmup_steps=0)
START_S = 250  # of a process that imports everything, on a loaded machine
SAMPLES = [PublicSample(f"s{n}", story(n)[: 25 + 2 * n], response_start=n, ends=n % 2 == 0) for n in range(24)]
CONFIG = FederationConfig(
    name="tiny",
    sites=("north",),
    knowledge=KnowledgeConfig(max_tokens=POSITIONS),
    private=PrivateConfig(first_epochs=1, epochs=1),
    lora=LORA,
    site_optimizer=FAST,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else save_tiny(root / name, name)


@pytest.fixture
def party(folders: Callable[[str], Path]) -> Party:
    return Party(load_base(folders("llama"), device="cpu"), LORA, seed=0)


def budget(rounds: int = 2, ledger: PrivacyLedger | None = None, epsilon: float = 0.5, **goal: float) -> PrivacyBudget:
    wanted = PrivacyGoal(epsilon=epsilon, rounds=rounds, **goal)
    return PrivacyBudget(wanted, len(SAMPLES), ledger or PrivacyLedger(), lambda ledger: None)


def flat(party: Party, attribute: str | None = None) -> Tensor:
    return torch.cat(
        [(w if attribute is None else getattr(w, attribute)).detach().flatten() for w in party.weights.values()]
    )


def tokens(party: Party) -> list[TokenSample]:
    return [each for each in tokenize(party.vocabulary, SAMPLES, POSITIONS) if len(each.rows)]


def away_from_zero(party: Party) -> None:
    """B is zero at first, and A has no gradient then."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in party.weights.values():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)


def plain_descent(party: Party) -> None:
    """With a learning rate of 1, a step is the gradient."""
    party.optimizer = torch.optim.SGD([{"params": list(party.weights.values()), "decay": False}], lr=1.0)


def step(party: Party, samples: list[TokenSample], noise: float, longest: float, expected: int) -> Tensor:
    """What one step subtracts from the weights, dropout off."""
    plain_descent(party)
    before = flat(party).clone()
    with _training(party) as hooks:
        for module in party.model.modules():  # OPT has dropout without a module of its own
            module.training = any(weight.requires_grad for weight in module.parameters(recurse=False))
        NoisySteps(party, hooks, noise, longest, expected, micro_batch_tokens=200).step(samples)
    return before - flat(party)


# ---------------------------------------------------------------------------------------------------------- clipping


def test_each_samples_gradient_is_cut_to_the_bound_before_they_are_added() -> None:
    """Two samples of two tokens each; a sample's gradient is the sum of its inputs: (3, 4) and (0.3, 0.4)."""
    layer = nn.Linear(2, 1, bias=False)
    hooks = SampleHooks(layer, loss_reduction="sum", strict=True)
    optimizer = DPOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=2
    )
    before = layer.weight.detach().clone()
    hooks.samples = 2
    rows = torch.tensor([[1.0, 1.0], [2.0, 3.0], [0.1, 0.4], [0.2, 0.0]], requires_grad=True)
    layer(rows).sum().backward()  # as rows of tokens, the way OPT passes them
    torch.testing.assert_close(layer.weight.grad_sample, torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]]))
    optimizer.step()
    # lengths 5 and 0.5: (0.6, 0.8) + (0.3, 0.4), over the two samples expected
    torch.testing.assert_close(before - layer.weight.detach(), torch.tensor([[0.45, 0.6]]), rtol=1e-4, atol=1e-5)
    hooks.cleanup()


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_step_without_noise_is_the_sum_of_gradients_cut_one_by_one(
    folders: Callable[[str], Path], architecture: str
) -> None:
    party = Party(load_base(folders(architecture), device="cpu"), LORA, seed=0)
    away_from_zero(party)
    samples = tokens(party)[:7]
    gradients = []
    for sample in samples:
        logits = party.model(input_ids=torch.from_numpy(sample.ids.astype("int64"))[None]).logits[0]
        log_q = logits[:, : party.vocabulary.size].log_softmax(-1)
        loss = -sum(log_q[row - 1, sample.ids[row]] for row in sample.rows.tolist()) / len(sample.rows)
        party.optimizer.zero_grad()
        loss.backward()
        gradients.append(flat(party, "grad").clone())
    lengths = torch.stack([gradient.norm() for gradient in gradients])
    bound = float(lengths.median())
    assert (lengths > bound).any()
    assert (lengths < bound).any()
    expected = sum(g * min(1.0, bound / float(n)) for g, n in zip(gradients, lengths, strict=True)) / 5
    torch.testing.assert_close(step(party, samples, 0.0, bound, 5), expected, rtol=1e-3, atol=1e-5)


def test_without_noise_and_clipping_a_step_is_the_plain_gradient(party: Party) -> None:
    away_from_zero(party)
    samples = tokens(party)[:6]
    with _training(party) as hooks:
        backward(party, hooks, samples)
        plain = flat(party, "grad").clone() / 6
    torch.testing.assert_close(step(party, samples, 0.0, 1e9, 6), plain, rtol=1e-3, atol=1e-6)


def test_no_sample_moves_the_sum_by_more_than_the_bound(party: Party) -> None:
    away_from_zero(party)
    samples = tokens(party)[:5]
    start, bound = party.snapshot(), 0.01
    with_all = step(party, samples, 0.0, bound, 1)
    party.restore(start)
    without_last = step(party, samples[:-1], 0.0, bound, 1)
    assert 0.5 * bound < float((with_all - without_last).norm()) <= bound * 1.001


def test_a_sample_whose_gradient_is_not_finite_contributes_nothing() -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad_sample = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [3.0, 4.0]])
    weights[1].grad_sample = torch.tensor([[1.0], [1.0], [float("inf")]])
    drop_unusable(weights)
    assert weights[0].grad_sample.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert weights[1].grad_sample.tolist() == [[1.0], [0.0], [0.0]]


# ------------------------------------------------------------------------------------------------------------- noise


def test_noise_has_the_size_that_was_asked_for_even_when_no_sample_was_drawn(party: Party) -> None:
    values = torch.cat([step(party, [], noise=3.0, longest=0.5, expected=4) for _ in range(4)])
    assert len(values) > 10_000
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.05)
    assert abs(float(values.mean())) < 0.02


def test_two_runs_of_the_same_seed_draw_different_noise_and_different_batches(folders: Callable[[str], Path]) -> None:
    def run() -> Tensor:
        party = Party(load_base(folders("llama"), device="cpu"), LORA, seed=0)
        train_with_noise(party, SAMPLES, budget(), optimizer=FAST, epochs=0.5, later_epochs=1, max_tokens=POSITIONS)
        return flat(party)

    torch.manual_seed(0)
    first = run()
    torch.manual_seed(0)
    assert not torch.equal(first, run())


def test_training_leaves_random_state_mode_and_weights_clean(party: Party) -> None:
    state = torch.random.get_rng_state()
    train_with_noise(party, SAMPLES, budget(), optimizer=FAST, epochs=0.5, later_epochs=1, max_tokens=POSITIONS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in party.model.modules())
    for weight in party.weights.values():
        assert weight.grad is None
        assert not {"grad_sample", "summed_grad", "_forward_counter"} & set(vars(weight))
    assert not any({"activations", "max_batch_len"} & set(vars(module)) for module in party.model.modules())
    assert not any(module._forward_hooks or module._backward_hooks for module in party.model.modules())


# ----------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_AROUND_THE_HEAD])
def test_every_architecture_trains(folders: Callable[[str], Path], architecture: str) -> None:
    party = Party(load_base(folders(architecture), device="cpu"), LORA, seed=0)
    before, given = flat(party).clone(), budget()
    report = private_phase(party, SAMPLES, CONFIG, epochs=1, budget=given)
    assert report is not None
    assert (report.steps, report.samples, party.steps) == (3, 24, 3)
    assert (report.first_loss_nats, report.last_loss_nats) == (None, None), "losses of private text are not noised"
    assert given.view.steps == 3
    assert 0 < given.view.epsilon < 0.5
    assert not torch.equal(before, flat(party))


class Mixing(nn.Module):
    """A head of attention over the batch, as no language model should have one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.inner(hidden)
        return output + 0.5 * output.mean(dim=0, keepdim=True)


def test_a_model_that_mixes_samples_is_refused(party: Party) -> None:
    check_samples_apart(party)
    block = party.model.model.layers[0]
    block.mlp = Mixing(block.mlp)
    party.weights = {name: p for name, p in party.model.named_parameters() if p.requires_grad}
    with pytest.raises(PrivacyRefused, match=r"differs by .* when another sample is in the batch"):
        check_samples_apart(party)


def test_a_layer_that_gets_some_tokens_of_some_samples_is_refused() -> None:
    layer = nn.Linear(4, 1)
    hooks = SampleHooks(layer, loss_reduction="sum", strict=True)
    hooks.samples = 2
    made = layer(torch.zeros(3, 4, requires_grad=True)).sum()
    with pytest.raises(PrivacyRefused, match="gets 3 rows for 2 samples"):
        made.backward()


def test_the_probe_leaves_the_party_as_it_was(party: Party) -> None:
    before = flat(party).clone()
    check_samples_apart(party)
    assert torch.equal(before, flat(party))
    assert not any(module.training for module in party.model.modules())


def test_a_base_in_gradient_checkpointing_is_told_apart_or_refused(folders: Callable[[str], Path]) -> None:
    party = Party(load_base(folders("llama"), device="cpu"), LORA, seed=0, gradient_checkpointing=True)
    with pytest.raises(PrivacyRefused, match="gradient checkpointing"):
        train_with_noise(party, SAMPLES, budget(), optimizer=FAST, epochs=1, later_epochs=1)


def test_training_of_every_weight_is_refused(folders: Callable[[str], Path]) -> None:
    party = Party(load_base(folders("llama"), device="cpu"), None, seed=0)
    with pytest.raises(PrivacyRefused, match="lora is null"), sample_hooks(party):
        pass


# -------------------------------------------------------------------------------------------------------- the account


def test_a_training_that_would_break_the_budget_does_not_begin(party: Party) -> None:
    before, given = party.adapter_bytes(), budget(rounds=1, ledger=PrivacyLedger(rounds=1))
    with pytest.raises(BudgetSpent):
        private_phase(party, SAMPLES, CONFIG, epochs=1, budget=given)
    assert (party.adapter_bytes(), given.ledger) == (before, PrivacyLedger(rounds=1))


def test_what_diverges_is_undone_and_paid_for(party: Party) -> None:
    before, given = party.adapter_bytes(), budget()

    def poison(step: str, done: int, total: int) -> None:
        with torch.no_grad():
            next(iter(party.weights.values())).fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match="weights are not finite"):
        private_phase(party, SAMPLES, CONFIG, epochs=1, budget=given, progress=poison)
    assert party.adapter_bytes() == before
    assert given.view.steps == 3


class Killed(Exception):
    """The process ended here."""


def killed_after(steps: int) -> Progress:
    def progress(step: str, done: int, total: int, /) -> None:
        if done == steps:
            raise Killed

    return progress


def test_a_training_that_goes_on_pays_for_every_step_that_was_ever_taken(party: Party, tmp_path: Path) -> None:
    def run(given: PrivacyBudget, progress: Progress, interval_s: float) -> None:
        checkpoints = Checkpoints(tmp_path / "checkpoint", "round_1 private", interval_s=interval_s)
        private_phase(party, SAMPLES, CONFIG, epochs=2, budget=given, checkpoints=checkpoints, progress=progress)

    first = budget()
    with pytest.raises(Killed):
        run(first, killed_after(2), interval_s=0.0)  # two steps taken, two in the checkpoint
    saved = (tmp_path / "checkpoint").read_bytes()
    second = budget(ledger=first.ledger)
    with pytest.raises(Killed):
        run(second, killed_after(5), interval_s=1e9)  # steps 3 to 5, lost
    assert (tmp_path / "checkpoint").read_bytes() == saved
    third = budget(ledger=second.ledger)
    run(third, silent, interval_s=1e9)  # steps 3 to 6
    assert third.view.steps == 2 + 3 + 4
    assert party.steps == 6
    assert third.view.epsilon <= 0.5


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import private_phase
from fedmkt.ml.private_budget import PrivacyBudget
from fedmkt.privacy import PrivacyLedger
from fedmkt_client_agent.store import AgentState, AgentStore
from test_private_training import CONFIG, LORA, SAMPLES, PrivacyGoal

store = AgentStore(Path({state!r}))
store.folder.mkdir(exist_ok=True)
ledger = store.load().privacy or PrivacyLedger()
budget = PrivacyBudget(
    PrivacyGoal(epsilon=0.5, rounds=2),
    len(SAMPLES),
    ledger,
    lambda ledger: store.commit(AgentState(privacy=ledger)),
)
party = Party(load_base(Path({model!r}), device="cpu"), LORA, seed=0)
taken = party.optimizer.step

def step(*given):
    if party.steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return taken(*given)

party.optimizer.step = step
private_phase(party, SAMPLES, CONFIG, epochs=1, budget=budget)
"""


@pytest.mark.timeout(2 * START_S)
def test_kill_minus_nine_in_the_middle_of_a_step_forgets_nothing_that_was_spent(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    from fedmkt_client_agent.store import AgentStore

    code = textwrap.dedent(KILLED).format(path=sys.path, state=str(tmp_path / "state"), model=str(folders("llama")))
    spent = []
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=START_S, check=False
        )
        assert ended.returncode == -9, ended.stderr
        ledger = AgentStore(tmp_path / "state").load().privacy
        assert ledger is not None
        spent.append(sum(steps for _, _, steps in ledger.steps))
    assert spent == [3, 6], "the step that was killed between its charge and its end is charged"


# ------------------------------------------------------------------------------------------------- without the extra


@pytest.mark.timeout(START_S)
def test_the_rest_works_without_opacus_and_noise_without_it_is_an_error() -> None:
    code = textwrap.dedent(
        """
        import sys
        sys.modules["opacus"] = None  # as if it were not installed
        import fedmkt.ml.phases, fedmkt_client_agent.main, fedmkt_client_agent.tasks
        from fedmkt_client_agent.privacy import open_budget
        from fedmkt.privacy import PrivacyGoal, PrivacyRefused
        try:
            open_budget(PrivacyGoal(epsilon=8, rounds=2), None, 100, None, lambda ledger: None)
        except PrivacyRefused as error:
            print(error)
        """
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=START_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "pip install 'fedmkt[privacy]'" in ended.stdout
