"""Adapters as the rest of the ecosystem meets them: every version of a federation, loaded by peft and transformers."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedmkt import cli
from fedmkt.errors import Refusal
from fedmkt.ml.adapters import AdaptersDiffer, MalformedAdapter, config_bytes, tensor_bytes, unpack_adapter
from fedmkt.ml.batches import tokenize
from fedmkt.ml.merge import OtherBase, merge_adapter
from fedmkt.ml.model_card import read_facts
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.protocol import AdapterView, FederationConfig, LoraConfig
from fedmkt.public_set import PublicSet
from fedmkt.vocabulary import Vocabulary
from fedmkt_client_agent.main import serve as serve_agent
from fedmkt_client_agent.settings import Settings as AgentSettings
from fedmkt_llm_server.main import serve as serve_llm
from fedmkt_llm_server.settings import Settings as LlmSettings
from live_coordinator import TOKENS, Background, LiveCoordinator, stories, tiny_config, until
from tiny_models import ARCHITECTURES, POSITIONS, save_tiny

PUBLIC = stories(0, 20, domain="first") + stories(20, 20, domain="second")
LORA = LoraConfig(rank=2, alpha=4)
IDS = torch.arange(1, 20)[None]


def logits(of: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = of(input_ids=IDS).logits
    return found.float()


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """To float32 rounding: a sum of two matrices times a vector, against the sum of two products."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


# ------------------------------------------------------------------------------------------------ a whole federation


@dataclass
class Federations:
    coordinator: LiveCoordinator
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "llm"

    def played(self, config: FederationConfig, rounds: int) -> tuple[str, list[AdapterView]]:
        """A federation with one live site after some rounds, and its versions but the bare one, oldest first."""
        federation_id = self.coordinator.create(config, PUBLIC)
        with self.coordinator.client() as operator:
            until(lambda: operator.federation(federation_id).llm is not None)
            values: dict[str, Any] = {
                "coordinator_url": self.coordinator.url,
                "model": str(self.folder / "site"),
                "private_file": self.folder / "site.jsonl",
                "state_dir": self.folder / federation_id,
                "enrolment_token": self.coordinator.enrolment_token(federation_id, "north"),
                "poll_s": 1,
            }
            agent = Background(serve_agent, AgentSettings(**values))
            operator.request_rounds(federation_id, rounds)
            self.coordinator.wait_for_rounds(federation_id, rounds)
            assert agent.end() is None
            versions = operator.adapters(federation_id).items
        return federation_id, sorted((each for each in versions if each.artifact), key=lambda each: each.version)

    def run(self, *arguments: str) -> Any:
        """`fedmkt adapter ... --json`, as the operator."""
        environment = {"FEDMKT_COORDINATOR_URL": self.coordinator.url, "FEDMKT_OPERATOR_TOKEN": TOKENS["operator"]}
        done = CliRunner(env=environment).invoke(cli.app, ["adapter", *arguments, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def federations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federations]:
    folder = tmp_path_factory.mktemp("federations")
    save_tiny(folder / "llm", "llama")
    save_tiny(folder / "site", "gpt2", seed=1)
    (folder / "site.jsonl").write_bytes(stories(100, 30))
    coordinator = LiveCoordinator(folder / "coordinator")
    coordinator.start()
    options: dict[str, Any] = {
        "coordinator_url": coordinator.url,
        "worker_token": TOKENS["worker"],
        "model": str(folder / "llm"),
        "state_dir": folder / "llm-server",
        "torch_threads": 1,
        "registration_interval_s": 0.1,
    }
    llm = Background(serve_llm, LlmSettings(**options))
    yield Federations(coordinator, folder)
    assert llm.end() is None
    coordinator.stop()


def held_out_bits_per_byte(model: torch.nn.Module, base: Path, config: FederationConfig) -> float:
    """The slow way: sample by sample, plain forward passes, the loss of each response token summed up."""
    public = PublicSet.from_jsonl(PUBLIC)
    parts = public.parts(config.public_set.slices, config.public_set.holdout_share)
    vocabulary = Vocabulary.from_tokenizer(base)
    nats, size = 0.0, 0
    for sample in tokenize(vocabulary, [public.samples[index] for index in parts.holdout], POSITIONS):
        ids = torch.tensor(sample.ids, dtype=torch.long)
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0, :, : vocabulary.size].double()
        for row in sample.rows.tolist():
            nats += float(F.cross_entropy(scores[row - 1], ids[row]))
        size += sample.response_bytes
    return nats / math.log(2) / size


@pytest.mark.services
@pytest.mark.timeout(240)
# PEFT 0.21 reads a property that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_every_version_loads_with_peft_and_is_as_good_as_reported_alone_and_merged(
    federations: Federations, tmp_path: Path
) -> None:
    config = tiny_config(("north",), name="lora")
    federation_id, versions = federations.played(config, 2)
    assert [version.version for version in versions] == [1, 2]
    bare = AutoModelForCausalLM.from_pretrained(federations.base)
    losses = [held_out_bits_per_byte(bare, federations.base, config)]
    for view in versions:
        folder, merged = tmp_path / f"adapter-{view.version}", tmp_path / f"merged-{view.version}"
        told = federations.run("download", federation_id, str(view.version), "--out", str(folder))
        assert told["files"] == ["adapter_config.json", "adapter_model.safetensors", "README.md"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(federations.base), str(folder))
        reported = view.evaluations["all"].bits_per_byte
        losses.append(held_out_bits_per_byte(model, federations.base, config))
        assert losses[-1] == pytest.approx(reported, rel=1e-5)
        card = (folder / "README.md").read_text()
        assert f"{reported:.6f}" in card
        assert f"| `north` | `{view.knowledge['north']}` |" in card
        base = ("--merge", "--base", str(federations.base))
        federations.run("export", federation_id, str(view.version), *base, "--out", str(merged))
        whole = AutoModelForCausalLM.from_pretrained(merged)
        assert_same(logits(whole), logits(model))
        assert held_out_bits_per_byte(whole, merged, config) == pytest.approx(reported, rel=1e-5)
    assert len({round(loss, 6) for loss in losses}) == 3, "bare, first and second version differ"
    first, second = ((tmp_path / f"adapter-{number}" / "README.md").read_text() for number in (1, 2))
    assert "| parent | version 0, the bare base model |" in first
    parent = versions[1].parent
    assert (f"`{versions[0].artifact}`" in second) == (parent == 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-1", "adapter-2", "merged-1", "merged-2"]


@pytest.mark.services
@pytest.mark.timeout(240)
def test_weights_of_full_training_are_exported_as_a_whole_model(federations: Federations, tmp_path: Path) -> None:
    config = tiny_config(("north",), name="full", lora=None)
    federation_id, (view,) = federations.played(config, 1)
    folder, merged = tmp_path / "weights", tmp_path / "new" / "merged"
    told = federations.run("download", federation_id, "1", "--out", str(folder))
    assert told["files"] == ["weights.safetensors", "README.md"]
    federations.run("export", str(folder), "--merge", "--base", str(federations.base), "--out", str(merged))
    reported = view.evaluations["all"].bits_per_byte
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert held_out_bits_per_byte(whole, merged, config) == pytest.approx(reported, rel=1e-5)
    bare = AutoModelForCausalLM.from_pretrained(federations.base)
    assert held_out_bits_per_byte(bare, federations.base, config) != pytest.approx(reported, rel=1e-4)


# ------------------------------------------------------------------------------------------------ merging


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {architecture: save_tiny(root / architecture, architecture) for architecture in ARCHITECTURES}


def adapted(base: Path) -> Party:
    """A party whose LoRA layers hold something that matters."""
    party = Party(load_base(base, device="cpu"), LORA, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in party.weights.values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return party


def peft_folder(party: Party, folder: Path, card: str | None = None) -> Path:
    adapter = unpack_adapter(party.adapter_bytes())
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config_bytes(adapter.config))
    (folder / "adapter_model.safetensors").write_bytes(tensor_bytes(adapter.tensors))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_gives_the_adapter_s_logits(bases: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    base = bases[architecture]
    party = adapted(base)
    files = merge_adapter(peft_folder(party, tmp_path / "adapter"), base, tmp_path / "merged")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(logits(merged), logits(party.model))
    bare = logits(AutoModelForCausalLM.from_pretrained(base))
    assert float((logits(merged) - bare).abs().max()) > 0.05 * float(bare.abs().max()), "the adapter matters"
    texts = [
        AutoTokenizer.from_pretrained(folder)("One day the cat ran away.") for folder in (base, tmp_path / "merged")
    ]
    assert texts[0]["input_ids"] == texts[1]["input_ids"]
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_merged_model_may_be_half_as_large(bases: dict[str, Path], tmp_path: Path) -> None:
    party = adapted(bases["llama"])
    merge_adapter(peft_folder(party, tmp_path / "adapter"), bases["llama"], tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exact = logits(party.model)
    assert float((logits(whole) - exact).abs().mean()) < 0.03 * float(exact.abs().mean())


CARD = '---\nfedmkt: {"base_config": %s, "base_vocabulary": "%s", "federation": "fed_0", "round": 1}\n---\n# Card\n'


def test_a_base_that_the_card_does_not_name_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    party = adapted(bases["llama"])
    vocabulary = party.vocabulary.fingerprint
    other_words = peft_folder(party, tmp_path / "a", CARD % ("null", "0" * 64))
    other_config = peft_folder(party, tmp_path / "b", CARD % (f'"{"1" * 64}"', vocabulary))
    nameless = peft_folder(party, tmp_path / "c", CARD % ("null", vocabulary))
    with pytest.raises(OtherBase, match=f"vocabulary fingerprint {'0' * 64}, llama has {vocabulary}"):
        merge_adapter(other_words, bases["llama"], tmp_path / "out")
    with pytest.raises(OtherBase, match=f"config.json with SHA-256 {'1' * 64}, llama has"):
        merge_adapter(other_config, bases["llama"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing half done is left"
    merge_adapter(nameless, bases["llama"], tmp_path / "out")
    facts = read_facts((tmp_path / "out" / "README.md").read_text())
    assert facts is not None
    assert facts.base_vocabulary == vocabulary


def test_a_folder_that_does_not_fit_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MalformedAdapter, match=r"neither adapter_config.json nor weights.safetensors"):
        merge_adapter(tmp_path / "empty", bases["llama"], tmp_path / "out")
    small = adapted(bases["gpt2"])
    adapter = unpack_adapter(small.adapter_bytes())
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "weights.safetensors").write_bytes(tensor_bytes(adapter.tensors))
    with pytest.raises(AdaptersDiffer, match="names differ"):
        merge_adapter(weights, bases["llama"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "written with --merge --base MODEL"),
        (("--merge",), "written with --merge --base MODEL"),
        (("--base", "llm"), "written with --merge --base MODEL"),
        (("--merge", "--base", "llm", "--out", "."), "is there already"),
    ],
)
def test_an_export_that_lacks_something_says_what(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=message):
        CliRunner().invoke(cli.app, ["adapter", "export", str(tmp_path), *arguments], catch_exceptions=False)
