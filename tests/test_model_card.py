"""The model card that travels with an adapter: what it says, that other programs read it, and that it never varies."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.numpy import load as load_tensors

from fedmkt.ml.adapters import (
    CARD_NAME,
    CONFIG_NAME,
    MAX_CARD_BYTES,
    TENSORS_NAME,
    AdapterTooLarge,
    unpack_adapter,
    with_card,
)
from fedmkt.ml.averaging import Contribution, average_adapters
from fedmkt.ml.model_card import adapter_card, config_digest, merged_card, read_facts
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import Distilled
from fedmkt.protocol import (
    DistillJob,
    Evaluation,
    GateReport,
    LoraConfig,
    SelectionReport,
    TrainingReport,
    UploadedKnowledge,
)
from live_coordinator import tiny_config
from tiny_models import save_tiny

LORA = LoraConfig(rank=2, alpha=4)
REASON = "the knowledge of 10.0.0.7 is in /home/nurse/secret"
KEPT = GateReport(decision="kept", before_bits_per_byte=2.5, after_bits_per_byte=2.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "big-llama", "llama")


def party(folder: Path, lora: LoraConfig | None = LORA, dtype: str = "float32") -> Party:
    return Party(load_base(folder, device="cpu", dtype=dtype), lora, seed=0)


def job(lora: LoraConfig | None = LORA, **changes: Any) -> DistillJob:
    def upload(site: str, digit: str) -> UploadedKnowledge:
        return UploadedKnowledge(
            site=site, knowledge=digit * 64, vocabulary="b" * 64, vocabulary_artifact="c" * 64, vocabulary_maps={}
        )

    values: dict[str, Any] = {
        "federation_id": "fed_0123456789abcdef",
        "round_id": "round_0123456789abcdef",
        "round_number": 3,
        "slice_index": 0,
        "config": tiny_config(("north", "south"), lora=lora),
        "public_set": "d" * 64,
        "adapter": "e" * 64,
        "uploads": (upload("north", "1"), upload("south", "2")),
        **changes,
    }
    return DistillJob(**values)


def distilled(**changes: Any) -> Distilled:
    values: dict[str, Any] = {
        "selection": SelectionReport(
            taught={"north": 9, "self": 7}, offered={"north": 16}, supervised_rows=10, rows=40
        ),
        "gate": KEPT,
        "before": {"all": quality(2.5, 0.25), "law": quality(3.0, 0.125)},
        "after": {"all": quality(2.25, 0.5), "law": quality(2.75, 0.375)},
        "training": TrainingReport(steps=2, samples=16, seconds=1.5),
        "tried": b"",
        **changes,
    }
    return Distilled(**values)


def quality(bits: float, accuracy: float) -> Evaluation:
    return Evaluation(bits_per_byte=bits, accuracy=accuracy, samples=8, bytes=800)


def card(folder: Path, lora: LoraConfig | None = LORA, **changes: Any) -> str:
    return adapter_card(job(lora), party(folder, lora), distilled(**changes), {"south": REASON})


def test_hugging_face_reads_the_front_matter(folder: Path) -> None:
    data = ModelCard(card(folder)).data
    assert data.base_model == "big-llama"
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "other")
    assert data.license_name == "same-as-base-model"
    assert data.tags == ["fedmkt", "federated-learning", "knowledge-distillation", "lora"]
    full = ModelCard(card(folder, None)).data
    assert (full.library_name, full.to_dict()["base_model_relation"]) == ("transformers", "finetune")


def test_a_card_says_base_data_lineage_and_quality(folder: Path) -> None:
    text = card(folder)
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    trained = party(folder)
    for line in (
        f"| SHA-256 of its config.json | `{config}` |",
        f"| vocabulary fingerprint | `{trained.vocabulary.fingerprint}` |",
        f"| public set, SHA-256 | `{'d' * 64}` |",
        "| slice | 1 of 2 |",
        "| response rows learned from others | 10 of 40 |",
        f"| `north` | `{'1' * 64}` | 16 | 9 |",
        f"| `south` | `{'2' * 64}` | 0 | left out |",
        "| all | 8 | 2.500000 | 2.250000 | 0.2500 | 0.5000 |",
        "| law | 8 | 3.000000 | 2.750000 | 0.1250 | 0.3750 |",
        f"| parent | the adapter with SHA-256 `{'e' * 64}` |",
        "| round | 3 (`round_0123456789abcdef`) |",
        "| sites | 1 of 2 uploads used |",
        "- Licence of the base model: *to be filled in by the operator*",
        f"| torch | {torch.__version__} |",
    ):
        assert line in text.splitlines(), line
    assert "Gate: kept." in text
    configuration = json.loads(text.split("```json\n")[1].split("```")[0])
    assert configuration["lora"] == {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": []}
    assert configuration["distillation"]["rule"] == "best_or_self"
    assert "sites" not in configuration


def test_a_first_version_has_the_bare_base_model_as_its_parent(folder: Path) -> None:
    text = adapter_card(job(adapter=None), party(folder), distilled(before={}, after={}, gate=None), {})
    assert "| parent | version 0, the bare base model |" in text
    assert "Not measured: the federation holds nothing out." in text


def test_a_version_that_the_gate_took_back_says_so(folder: Path) -> None:
    back = GateReport(decision="rolled_back", before_bits_per_byte=2.5, after_bits_per_byte=2.75, reason="0.25 | worse")
    assert "Gate: rolled back. 0.25 \\| worse" in card(folder, gate=back)
    same = {"all": quality(2.5, 0.25)}
    assert "| all | 8 | 2.500000 | not finite | 0.2500 | not finite |" in card(
        folder, gate=back, before=same, after=same
    )


def test_the_same_job_gives_the_same_card_however_long_it_took(folder: Path) -> None:
    slow = TrainingReport(steps=1, samples=8, seconds=999.0, first_loss_nats=3.0)  # as a job that was taken up again
    assert card(folder) == card(folder, training=slow)


def test_no_path_of_this_machine_and_no_reason_of_a_refusal_is_told(folder: Path) -> None:
    text = card(folder)
    assert str(folder.parent) not in text
    assert REASON not in text


def test_names_cannot_change_the_markup(folder: Path) -> None:
    strange = "law | 1\n\n# Licence: MIT <b>"
    evaluations = {"all": quality(2.0, 0.5), strange: quality(2.0, 0.5)}
    trained = party(folder)
    trained.card = trained.card.model_copy(update={"model_id": 'x": [1]` | # y'})
    text = adapter_card(job(), trained, distilled(before=evaluations, after=evaluations), {})
    assert ModelCard(text).data.base_model == 'x": [1]` | # y'
    (row,) = [line for line in text.splitlines() if line.startswith("| law")]
    assert row.replace("\\|", "").count("|") == 7
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# tiny, round 3"]


def test_facts_are_read_back(folder: Path) -> None:
    facts = read_facts(card(folder))
    assert facts is not None
    assert (facts.federation, facts.round) == ("fed_0123456789abcdef", 3)
    assert facts.base_config == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert read_facts("# A card by somebody else\n") is None


def test_the_digest_of_the_configuration_is_the_file_s_whatever_the_dtype(folder: Path, tmp_path: Path) -> None:
    assert config_digest(party(folder)) == config_digest(party(folder, dtype="bfloat16"))
    gone = save_tiny(tmp_path / "gone", "gpt2")
    loaded = load_base(gone, device="cpu")
    (gone / "config.json").unlink()
    assert config_digest(loaded) is None


def test_the_configuration_of_a_hub_model_is_that_of_its_pinned_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--org--tiny" / "snapshots"
    for commit, content in (("a" * 40, b"pinned"), ("b" * 40, b"newer")):
        (snapshots / commit).mkdir(parents=True)
        (snapshots / commit / "config.json").write_bytes(content)
    pinned = party(folder)
    pinned.model.config.name_or_path = "org/tiny"
    pinned.card = pinned.card.model_copy(update={"model_id": f"org/tiny@{'a' * 12}"})
    assert config_digest(pinned) == hashlib.sha256(b"pinned").hexdigest()
    text = adapter_card(job(), pinned, distilled(), {})
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_revision"]) == ("org/tiny", "a" * 12)
    (snapshots / ("a" * 40) / "config.json").unlink()
    assert config_digest(pinned) is None
    assert "| SHA-256 of its config.json | not found |" in adapter_card(job(), pinned, distilled(), {})


def test_a_merged_model_s_card_tells_how_to_load_it_and_keeps_the_rest(folder: Path) -> None:
    before, after = card(folder), merged_card(card(folder), "bfloat16")
    data = ModelCard(after).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")
    assert "has been merged into its base, in bfloat16" in after
    assert "PeftModel" not in after
    assert after.split("## Data")[1] == before.split("## Data")[1]


# ------------------------------------------------------------------------------------------------ in the artifact


def test_an_adapter_with_its_card_is_a_tar_of_three_files(folder: Path) -> None:
    bare = party(folder).adapter_bytes()
    blob = with_card(bare, "# Ä card\n")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        assert tar.getnames() == [CONFIG_NAME, TENSORS_NAME, CARD_NAME]
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
        content = tar.extractfile(CARD_NAME)
        assert content is not None
        assert content.read() == "# Ä card\n".encode()
    told, expected = unpack_adapter(blob), unpack_adapter(bare)
    assert told.config == expected.config
    assert all(np.array_equal(told.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert average_adapters([Contribution("north", blob, 1)]).blob == bare
    assert blob == with_card(bare, "# Ä card\n")


def test_weights_of_full_training_carry_their_card_in_their_metadata(folder: Path, tmp_path: Path) -> None:
    trained, other = party(folder, None), party(folder, None)
    with torch.no_grad():
        trained.weights["model.norm.weight"].add_(1)
        trained.weights["lm_head.weight"].mul_(2)
    bare = trained.adapter_bytes()
    for text in ("", "# Ä", "# a longer card\n" * 9):
        blob = with_card(bare, text)
        (tmp_path / "weights").write_bytes(blob)
        with safe_open(tmp_path / "weights", framework="numpy") as file:
            assert file.metadata() == {"format": "pt", CARD_NAME: text}
        told, expected = load_tensors(blob), load_tensors(bare)
        assert told.keys() == expected.keys() == {"model.norm.weight", "lm_head.weight"}
        assert all(np.array_equal(told[name], expected[name]) for name in expected)
    other.load_adapter_bytes(blob)
    assert other.adapter_bytes() == bare


def test_a_card_without_bound_is_refused(folder: Path) -> None:
    bare = party(folder).adapter_bytes()
    assert unpack_adapter(with_card(bare, "x" * MAX_CARD_BYTES)).tensors
    with pytest.raises(AdapterTooLarge, match=f"at most {MAX_CARD_BYTES}"):
        unpack_adapter(with_card(bare, "x" * (MAX_CARD_BYTES + 1)))


def test_ten_thousand_sites_have_room_in_a_card(folder: Path) -> None:
    one = job().uploads[0]
    sites = tuple(one.model_copy(update={"site": f"site-{number:04}-{'x' * 50}"}) for number in range(10_000))
    text = adapter_card(job(uploads=sites), party(folder), distilled(), {})
    assert len(text.encode()) < MAX_CARD_BYTES
