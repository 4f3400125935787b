"""A party's state: the same from the same seed, in memory, on disk and on the wire; and adapters from strangers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedmkt.ml.adapters import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    TENSORS_NAME,
    Adapter,
    AdapterNotFinite,
    AdaptersDiffer,
    AdapterTooLarge,
    MalformedAdapter,
    pack_adapter,
    unpack_adapter,
)
from fedmkt.ml.averaging import Contribution, average_adapters
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.party_folder import PartyFolderRefused
from fedmkt.protocol import LoraConfig
from tiny_models import ARCHITECTURES, save_tiny

LORA = LoraConfig(rank=2, alpha=4)
IDS = torch.arange(1, 20)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {architecture: save_tiny(root / architecture, architecture) for architecture in ARCHITECTURES}


def party(folder: Path, lora: LoraConfig | None = LORA, seed: int = 0) -> Party:
    return Party(load_base(folder, device="cpu"), lora, seed=seed)


def step(trained: Party, times: int = 1) -> None:
    """Optimizer steps on a fixed batch: enough to fill weights and moments with something that is not zero."""
    for group in trained.optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(times):
        trained.model(input_ids=IDS, labels=IDS).loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        trained.steps += 1


def logits(of: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = of(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("lora", [LORA, None])
def test_the_same_seed_and_steps_give_the_same_bytes(folders: dict[str, Path], lora: LoraConfig | None) -> None:
    first, second = (party(folders["llama"], lora, seed=3) for _ in range(2))
    step(first, 2)
    step(second, 2)
    assert first.adapter_bytes() == second.adapter_bytes()
    other = party(folders["llama"], lora, seed=3)
    step(other, 3)
    assert first.adapter_bytes() != other.adapter_bytes()


def test_the_card_counts_what_trains(folders: dict[str, Path]) -> None:
    small = party(folders["opt"], LoraConfig(rank=1, targets=("fc1",)))
    assert small.card.trainable_parameters == 2 * (32 + 48)  # two blocks, A 1 x 32 and B 48 x 1
    full = party(folders["opt"], None)
    assert full.card.trainable_parameters == full.card.parameters


@pytest.mark.parametrize("lora", [LORA, None])
def test_restore_goes_back_bit_for_bit_and_goes_on_as_before(folders: dict[str, Path], lora: LoraConfig | None) -> None:
    trained = party(folders["gpt2"], lora)
    step(trained, 2)
    snapshot, at_snapshot = trained.snapshot(), trained.adapter_bytes()
    step(trained, 2)
    ahead = trained.adapter_bytes()
    assert ahead != at_snapshot
    trained.restore(snapshot)
    assert (trained.adapter_bytes(), trained.steps) == (at_snapshot, 2)
    step(trained, 2)
    assert trained.adapter_bytes() == ahead  # the optimizer's moments came back too


@pytest.mark.parametrize("lora", [LORA, None])
def test_reset_is_the_bare_base_again(folders: dict[str, Path], lora: LoraConfig | None) -> None:
    trained = party(folders["qwen2"], lora)
    bare, before = trained.adapter_bytes(), logits(trained.model)
    step(trained)
    trained.reset()
    assert trained.adapter_bytes() == bare
    assert torch.equal(logits(trained.model), before)
    assert trained.steps == 0
    assert not trained.optimizer.state


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_saved_party_goes_on_where_it_stopped(
    folders: dict[str, Path], tmp_path: Path, lora: LoraConfig | None
) -> None:
    trained = party(folders["bloom"], lora, seed=5)
    step(trained, 2)
    trained.save(tmp_path / "party")
    loaded = Party.load(tmp_path / "party", load_base(folders["bloom"], device="cpu"))
    assert (loaded.lora, loaded.seed, loaded.steps) == (lora, 5, 2)
    assert loaded.adapter_bytes() == trained.adapter_bytes()
    step(trained, 2)
    step(loaded, 2)
    assert loaded.adapter_bytes() == trained.adapter_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
# PEFT 0.21 reads a property that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_folder_is_an_ordinary_peft_folder(folders: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    trained = party(folders[architecture])
    step(trained, 2)
    trained.save(tmp_path / "party")
    base = load_base(folders[architecture], device="cpu").model
    assert (logits(base) - logits(trained.model)).abs().max() > 1e-4
    theirs = PeftModel.from_pretrained(base, tmp_path / "party")
    torch.testing.assert_close(logits(theirs), logits(trained.model))


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    trained = party(folders["llama"])
    trained.save(tmp_path / "party")
    step(trained)
    trained.save(tmp_path / "party")
    assert [path.name for path in tmp_path.iterdir()] == ["party"]
    assert Party.load(tmp_path / "party", load_base(folders["llama"], device="cpu")).steps == 1
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in (tmp_path / "party").iterdir())


def test_a_crash_between_the_renames_leaves_the_old_folder_in_use(folders: dict[str, Path], tmp_path: Path) -> None:
    trained = party(folders["llama"])
    step(trained)
    trained.save(tmp_path / "party")
    (tmp_path / "party").rename(tmp_path / "party.old")
    assert Party.load(tmp_path / "party", load_base(folders["llama"], device="cpu")).steps == 1


def test_a_torn_or_foreign_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def reload(name: str = "llama") -> Party:
        return Party.load(tmp_path / "party", load_base(folders[name], device="cpu"))

    with pytest.raises(PartyFolderRefused, match=r"no party\.json"):
        reload()
    party(folders["llama"]).save(tmp_path / "party")
    with pytest.raises(PartyFolderRefused, match="made for llama"):
        reload("qwen2")
    weights = tmp_path / "party" / TENSORS_NAME
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(PartyFolderRefused, match=f"{TENSORS_NAME} has SHA-256"):
        reload()
    weights.unlink()
    with pytest.raises(PartyFolderRefused, match=f"lacks {TENSORS_NAME}"):
        reload()


def test_adapter_bytes_carry_the_weights_to_another_process_and_name_no_path(folders: dict[str, Path]) -> None:
    trained, other = party(folders["gpt_neox"], seed=1), party(folders["gpt_neox"], seed=2)
    step(trained, 2)
    other.load_adapter_bytes(trained.adapter_bytes())
    assert torch.equal(logits(trained.model), logits(other.model))
    assert str(folders["gpt_neox"].parent).encode() not in trained.adapter_bytes()
    with tarfile.open(fileobj=io.BytesIO(trained.adapter_bytes())) as archive:
        assert archive.getnames() == [CONFIG_NAME, TENSORS_NAME]
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}


def test_full_fine_tuning_sends_only_what_differs_from_the_base(folders: dict[str, Path]) -> None:
    trained, other = party(folders["llama"], None), party(folders["llama"], None)
    assert load_tensors(trained.adapter_bytes()) == {}
    with torch.no_grad():
        trained.weights["model.norm.weight"].add_(1)
    assert list(load_tensors(trained.adapter_bytes())) == ["model.norm.weight"]
    with torch.no_grad():
        other.weights["lm_head.weight"].zero_()  # goes back to the base: the other side did not change it
    other.load_adapter_bytes(trained.adapter_bytes())
    assert torch.equal(logits(trained.model), logits(other.model))
    with pytest.raises(AdaptersDiffer, match=r"the first is 'nonsense'"):
        other.load_adapter_bytes(save_tensors({"nonsense": np.zeros(2, np.float32)}))


# ------------------------------------------------------------------------------------------------ strangers' adapters


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def claiming(size: int) -> bytes:
    info = tarfile.TarInfo(TENSORS_NAME)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


CONFIG = member(CONFIG_NAME, b"{}")
HOSTILE = {
    "empty": b"",
    "text": b"hello" * 200,
    "an absolute path": CONFIG + member("/etc/passwd", b"x"),
    "a path upwards": CONFIG + member(f"../{TENSORS_NAME}", b"x"),
    "a link": CONFIG + member(TENSORS_NAME, b"", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": CONFIG + member(TENSORS_NAME, b"", tarfile.LNKTYPE, CONFIG_NAME),
    "a sparse file": CONFIG + member(TENSORS_NAME, b"x", tarfile.GNUTYPE_SPARSE),
    "a pax header": member("x", b"30 path=elsewhere\n", tarfile.XHDTYPE) + CONFIG,
    "a directory": member(TENSORS_NAME, b"", tarfile.DIRTYPE) + CONFIG,
    "a pickle": CONFIG + member("adapter_model.bin", b"x"),
    "one name twice": CONFIG + CONFIG,
    "a member missing": CONFIG,
    "more bytes than there are": CONFIG + claiming(10**6) + b"x" * 512,
    "a negative size": CONFIG + claiming(-5) + b"x" * 512,
    "a cut header": CONFIG + member(TENSORS_NAME, b"x")[:300],
    "a config that is no object": member(CONFIG_NAME, b"[]") + member(TENSORS_NAME, save_tensors({})),
    "a config that is no JSON": member(CONFIG_NAME, b"{") + member(TENSORS_NAME, save_tensors({})),
    "a config nested without end": member(CONFIG_NAME, b"[" * 60_000) + member(TENSORS_NAME, save_tensors({})),
    "tensors that are none": CONFIG + member(TENSORS_NAME, b"x" * 100),
    "another dtype": CONFIG + member(TENSORS_NAME, save_tensors({"a": np.zeros(2, np.float64)})),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_refused(what: str) -> None:
    with pytest.raises(MalformedAdapter):
        unpack_adapter(HOSTILE[what])


def test_every_byte_of_a_header_matters_or_is_ignored_but_never_crashes() -> None:
    good = pack_adapter(Adapter({"r": 1}, {"a": np.ones((2, 2), np.float32)}))
    random = np.random.default_rng(0)
    for _ in range(300):
        spoiled = bytearray(good)
        for place in random.integers(0, len(good), 3):
            spoiled[place] = random.integers(256)
        try:
            unpack_adapter(bytes(spoiled))
        except MalformedAdapter:
            continue


def test_a_config_without_bound_is_refused() -> None:
    config = json.dumps({"r": "x" * MAX_CONFIG_BYTES}).encode()
    with pytest.raises(AdapterTooLarge, match=f"at most {MAX_CONFIG_BYTES}"):
        unpack_adapter(member(CONFIG_NAME, config) + member(TENSORS_NAME, save_tensors({})))


def test_an_adapter_that_does_not_fit_changes_nothing(folders: dict[str, Path]) -> None:
    mine = party(folders["llama"])
    step(mine)
    before = mine.adapter_bytes()
    good = unpack_adapter(before)
    name = next(iter(good.tensors))
    poisoned = {**good.tensors, name: np.full_like(good.tensors[name], np.nan)}
    with pytest.raises(AdapterNotFinite, match="not finite"):
        mine.load_adapter_bytes(pack_adapter(Adapter(good.config, poisoned)))
    reshaped = {**good.tensors, name: good.tensors[name].T.copy()}
    with pytest.raises(AdaptersDiffer, match="has shape"):
        mine.load_adapter_bytes(pack_adapter(Adapter(good.config, reshaped)))
    fewer = {key: value for key, value in good.tensors.items() if key != name}
    with pytest.raises(AdaptersDiffer, match="1 names differ"):
        mine.load_adapter_bytes(pack_adapter(Adapter(good.config, fewer)))
    with pytest.raises(AdaptersDiffer, match="r is 64, expected 2"):
        mine.load_adapter_bytes(pack_adapter(Adapter({**good.config, "r": 64}, good.tensors)))
    assert mine.adapter_bytes() == before


def test_averaged_parties_predict_between_the_two(folders: dict[str, Path]) -> None:
    first, second, mean = (party(folders["llama"]) for _ in range(3))
    step(first, 3)
    given = [Contribution(name, each.adapter_bytes(), 1) for name, each in (("first", first), ("second", second))]
    average = average_adapters(given).blob
    assert average is not None
    mean.load_adapter_bytes(average)
    a, b, between = (each.weights["model.layers.0.mlp.up_proj.lora_B.default.weight"] for each in (first, second, mean))
    torch.testing.assert_close(between, (a + b) / 2)
