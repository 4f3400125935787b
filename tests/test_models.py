"""Loading base models and putting LoRA into them, on tiny real models of six architectures."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, ByT5Tokenizer

from fedmkt.knowledge import encode
from fedmkt.ml.extraction import extract
from fedmkt.ml.lora import NoSuchTarget, add_lora, reset_lora, trainable
from fedmkt.ml.memory import peak_bytes
from fedmkt.ml.models import (
    LoadedModel,
    ModelRefused,
    NoSafetensors,
    SlowTokenizer,
    UnknownArchitecture,
    UnpinnedModel,
    VocabularyTooLarge,
    configure_torch,
    load_base,
    max_positions,
    pick_device,
    pick_dtype,
)
from fedmkt.ml.party import Party
from fedmkt.ml.training import train_private
from fedmkt.protocol import LoraConfig, OptimizerConfig
from fedmkt.public_set import PublicSample, PublicSet
from tiny_models import ARCHITECTURES, PADDED_HEAD, POSITIONS, save_tiny, story


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {architecture: save_tiny(root / architecture, architecture) for architecture in ARCHITECTURES}


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Llama folder that a test may spoil."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


def tiny(folder: Path, dtype: str = "auto") -> LoadedModel:
    return load_base(folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_from_a_folder(folders: dict[str, Path], architecture: str) -> None:
    loaded = tiny(folders[architecture])
    assert not loaded.model.training
    assert loaded.card.model_id == architecture  # the folder's name, not its path
    assert loaded.card.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.card.device == "cpu"
    assert loaded.model.get_output_embeddings().weight.shape[0] == loaded.vocabulary.size + PADDED_HEAD
    assert max_positions(loaded.model) == (None if architecture == "bloom" else POSITIONS)
    assert next(loaded.model.parameters()).dtype == torch.float32


def test_a_hub_id_needs_a_full_commit() -> None:
    for revision in (None, "main", "v1.0", "abc1234"):
        with pytest.raises(UnpinnedModel, match="full commit hash"):
            load_base("someone/some-model", revision=revision)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelRefused, match="neither a folder nor a hub id"):
        load_base(Path("nowhere/model"))
    with pytest.raises(ModelRefused, match="neither a folder nor a hub id"):
        load_base("./nowhere/model")


def test_pickled_weights_are_never_read(broken: Path) -> None:
    weights = broken / "model.safetensors"
    torch.save({}, broken / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(NoSafetensors, match=r"no \*\.safetensors file"):
        tiny(broken)


def test_remote_code_is_never_run(broken: Path) -> None:
    (broken / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((broken / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
    }
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownArchitecture, match="'homemade'"):
        tiny(broken)


@pytest.mark.parametrize("content", ["not json", "[]", '{"model_type": 3}'])
def test_a_broken_config_is_refused_with_the_reason(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(ModelRefused, match=r"not JSON|model_type"):
        tiny(broken)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"no config\.json"):
        tiny(tmp_path)


def test_a_tokenizer_without_fast_backend_is_refused(broken: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (broken / name).unlink(missing_ok=True)
    ByT5Tokenizer().save_pretrained(broken)
    with pytest.raises(SlowTokenizer, match="without a fast backend"):
        tiny(broken)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(broken: Path) -> None:
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    size = json.loads((broken / "config.json").read_text())["vocab_size"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": size, "content": "<extra>", **flags})
    first_free = max(tokenizer["model"]["vocab"].values()) + 1
    for index in range(first_free, size):
        tokenizer["model"]["vocab"][f"filler{index}"] = index
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(VocabularyTooLarge, match=f"{size + 1} ids but {size} embeddings"):
        tiny(broken)


def test_a_model_that_is_no_language_model_is_refused(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    config = BertConfig(
        vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(broken)
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "vit"}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="does not load as a causal language model"):
        tiny(broken)


def test_device_and_dtype_are_chosen_by_the_machine() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cuda", "mps", "cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ModelRefused, match="dtype is 'int8'"):
        pick_dtype("int8", torch.device("cpu"))


def test_threads_are_set_when_a_program_asks_for_it() -> None:
    before = torch.get_num_threads()
    try:
        configure_torch(1)
        assert torch.get_num_threads() == 1
    finally:
        configure_torch(before)


EXPECTED_TARGETS = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "qwen2": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],  # not project_in and project_out
    "bloom": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}
LAYERS_PER_BLOCK = {"llama": 7, "qwen2": 7, "gpt2": 4, "opt": 6, "bloom": 4, "gpt_neox": 4}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_names_every_linear_layer_of_the_blocks_gets_lora_and_the_head_none(
    folders: dict[str, Path], architecture: str
) -> None:
    model = tiny(folders[architecture]).model
    config = add_lora(model, LoraConfig(rank=4, alpha=8), "some-model")
    names = list(trainable(model))
    assert config["target_modules"] == EXPECTED_TARGETS[architecture]
    assert config["fan_in_fan_out"] is (architecture == "gpt2")
    assert config["base_model_name_or_path"] == "some-model"
    assert len(names) == 2 * 2 * LAYERS_PER_BLOCK[architecture]  # A and B, two blocks
    assert all("lora_" in name and "lm_head" not in name and "project_" not in name for name in names)


def test_lora_changes_nothing_until_b_moves_and_then_does(folders: dict[str, Path]) -> None:
    for architecture in ARCHITECTURES:
        model = tiny(folders[architecture]).model
        ids = torch.arange(1, 20)[None]
        with torch.no_grad():
            before = model(input_ids=ids).logits
            add_lora(model, LoraConfig(rank=4), "m")
            torch.testing.assert_close(model(input_ids=ids).logits, before)
            for name, parameter in trainable(model).items():
                if "lora_B" in name:
                    parameter.fill_(0.05)
            assert (model(input_ids=ids).logits - before).abs().max() > 1e-3


def test_names_choose_the_modules_and_unknown_names_list_what_there_is(folders: dict[str, Path]) -> None:
    model = tiny(folders["llama"]).model
    add_lora(model, LoraConfig(rank=2, targets=("q_proj", "0.mlp.up_proj")), "m")
    adapted = {name.split(".lora_")[0] for name in trainable(model)}
    assert adapted == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }
    with pytest.raises(NoSuchTarget, match=r"names c_attn, .*it has: .*q_proj, up_proj, v_proj"):
        add_lora(tiny(folders["llama"]).model, LoraConfig(targets=("q_proj", "c_attn")), "m")
    with pytest.raises(NoSuchTarget, match="names input_layernorm"):
        add_lora(tiny(folders["llama"]).model, LoraConfig(targets=("input_layernorm",)), "m")


def test_lora_is_float32_on_a_half_precision_base(folders: dict[str, Path]) -> None:
    model = tiny(folders["llama"], "bfloat16").model
    add_lora(model, LoraConfig(rank=2), "m")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert next(model.parameters()).dtype == torch.bfloat16


def test_initial_values_follow_from_seed_and_name_alone(folders: dict[str, Path]) -> None:
    first, second = tiny(folders["gpt2"]).model, tiny(folders["gpt2"]).model
    add_lora(first, LoraConfig(rank=2), "m")
    torch.manual_seed(123)
    add_lora(second, LoraConfig(rank=2), "m")
    reset_lora(first, 7)
    reset_lora(second, 7)
    for name, parameter in trainable(first).items():
        assert torch.equal(parameter, trainable(second)[name])
        bound = parameter.shape[1] ** -0.5
        if ".lora_A." in name:
            assert 0.5 * bound < parameter.abs().max() <= bound
        else:
            assert not parameter.any()
    reset_lora(second, 8)
    name = next(name for name in trainable(first) if ".lora_A." in name)
    assert not torch.equal(trainable(first)[name], trainable(second)[name])


# ------------------------------------------------------------------------------------------------ every architecture


TEXTS = PublicSet(tuple(PublicSample(f"s{number}", story(number), 0, True) for number in range(8)))


def know(party: Party) -> bytes:
    return encode(
        extract(
            party,
            TEXTS,
            range(len(TEXTS)),
            federation_id="fed_0123456789abcdef",
            round_number=1,
            slice_index=0,
            adapter_version=0,
            top_k=8,
            top_p=0.9,
            max_tokens=POSITIONS,
        )
    )


def learn(party: Party, epochs: float = 1) -> list[float]:
    """Losses by step, and the adapter's weights behind them."""
    losses: list[float] = []
    config = OptimizerConfig(learning_rate=0.01, batch_size=4, warmup_steps=0)
    progress = partial(_note, losses)
    train_private(
        party, TEXTS.samples, optimizer=config, epochs=epochs, seed=0, micro_batch_tokens=8192, progress=progress
    )
    return losses


def _note(losses: list[float], done: int, total: int, loss: float) -> None:
    losses.append(loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_side_on_which_a_tokenizer_pads_changes_nothing(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    found = []
    for side in ("left", "right"):
        folder = Path(shutil.copytree(folders[architecture], tmp_path / side / "model"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
        loaded = tiny(folder)
        assert loaded.tokenizer.padding_side == side
        party = Party(loaded, LoraConfig(rank=2), seed=0)
        found.append((know(party), learn(party), party.adapter_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_takes_less_memory_and_the_same_steps(
    folders: dict[str, Path], architecture: str
) -> None:
    plain, saving = (
        Party(tiny(folders[architecture]), LoraConfig(rank=2), seed=0, gradient_checkpointing=saves)
        for saves in (False, True)
    )
    peaks = [peak_bytes(party.device, partial(learn, party)) for party in (plain, saving)]
    assert peaks[1] < 0.8 * peaks[0]
    assert learn(saving) == pytest.approx(learn(plain), rel=1e-4)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(saving.weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "babyllama-361"])
def test_real_models_learn_with_lora_and_checkpointing(data_dir: Path, name: str) -> None:
    loaded = tiny(data_dir / "models" / name)
    party = Party(loaded, LoraConfig(rank=4, alpha=8), seed=0, gradient_checkpointing=True)
    assert {weight.split(".lora_")[0].rsplit(".", 1)[-1] for weight in party.weights} == set(EXPECTED_TARGETS["llama"])
    losses = learn(party, epochs=6)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "babyllama-361"])
def test_real_models_load(data_dir: Path, name: str) -> None:
    loaded = tiny(data_dir / "models" / name)
    assert loaded.card.model_id == name
    assert loaded.vocabulary.size == loaded.model.config.vocab_size
