"""A base model in 4 or 8 bits under LoRA layers. What needs bitsandbytes skips where it is not installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fedmkt.ml.adapters import CARD_NAME
from fedmkt.ml.evaluation import evaluate
from fedmkt.ml.merge import QuantizedBase, merge_adapter
from fedmkt.ml.model_card import CardFacts
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.quantization import Bits, NoQuantization, quantized
from fedmkt.ml.training import train_private
from fedmkt.protocol import LoraConfig, OptimizerConfig
from fedmkt.public_set import PublicSample
from tiny_models import save_tiny, story

TEXTS = [PublicSample(f"s{number}", story(number), 0, True) for number in range(16)]
BITS: tuple[Bits, ...] = ("4bit", "8bit")


def installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


needs_library = pytest.mark.skipif(not installed(), reason="bitsandbytes is not installed")


def in_fewer_bits(folder: Path, bits: Bits, lora: LoraConfig | None) -> Party:
    return Party(load_base(folder, device="cpu", quantize=bits), lora, seed=0)


@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_learns_on_a_base_in_fewer_bits(tmp_path: Path, architecture: str, bits: Bits) -> None:
    folder = save_tiny(tmp_path / architecture, architecture)
    party = in_fewer_bits(folder, bits, LoraConfig(rank=4, alpha=8))
    whole = Party(load_base(folder, device="cpu"), LoraConfig(rank=4, alpha=8), seed=0)
    assert quantized(party.model) == bits
    assert party.card.device == f"cpu, {bits}"
    assert party.card.parameters == whole.card.parameters
    assert {parameter.dtype for parameter in party.weights.values()} == {torch.float32}
    assert list(party.weights) == list(whole.weights)
    before = evaluate(party, TEXTS)["all"].bits_per_byte
    train_private(
        party, TEXTS, optimizer=OptimizerConfig(learning_rate=0.02, batch_size=4, warmup_steps=2), epochs=12, seed=0
    )
    assert evaluate(party, TEXTS)["all"].bits_per_byte < 0.9 * before
    party.save(tmp_path / "party")
    again = Party.load(tmp_path / "party", load_base(folder, device="cpu", quantize=bits))
    assert again.adapter_bytes() == party.adapter_bytes()
    assert evaluate(again, TEXTS) == evaluate(party, TEXTS)
    party.reset()
    assert evaluate(party, TEXTS)["all"].bits_per_byte == before, "the base is as it was"


@needs_library
def test_a_base_in_fewer_bits_is_not_trained_itself(tmp_path: Path) -> None:
    with pytest.raises(NoQuantization, match="can only be trained by LoRA layers on top"):
        in_fewer_bits(save_tiny(tmp_path / "llama", "llama"), "4bit", None)


@pytest.mark.skipif(installed(), reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", BITS)
def test_without_the_library_the_setting_is_refused_with_the_extra_to_install(tmp_path: Path, bits: Bits) -> None:
    with pytest.raises(NoQuantization, match=r"pip install 'fedmkt\[quantization\]'"):
        in_fewer_bits(save_tiny(tmp_path / "llama", "llama"), bits, LoraConfig())


def test_a_folder_of_quantized_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NoQuantization, match="holds weights in fewer bits already"):
        load_base(folder, device="cpu")


def test_an_adapter_that_was_trained_on_fewer_bits_is_not_merged(tmp_path: Path) -> None:
    folder, adapter = save_tiny(tmp_path / "llama", "llama"), tmp_path / "adapter"
    Party(load_base(folder, device="cpu"), LoraConfig(rank=2), seed=0).save(adapter)
    facts = CardFacts(base_config=None, base_vocabulary="0" * 64, federation="fed", round=1, quantized="4bit")
    (adapter / CARD_NAME).write_text(f"---\nfedmkt: {facts.model_dump_json()}\n---\n")
    with pytest.raises(QuantizedBase, match="trained, and its quality measured, on a base in 4bit"):
        merge_adapter(adapter, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
