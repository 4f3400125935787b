"""One model folder out of a base model and an adapter, for programs that know nothing of adapters."""

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedmkt.errors import Refusal
from fedmkt.ml.adapters import CARD_NAME, CONFIG_NAME, AdaptersDiffer, MalformedAdapter, check_shapes, read_tensors
from fedmkt.ml.model_card import config_digest, merged_card, read_facts
from fedmkt.ml.models import LoadedModel, load_base, pick_dtype
from fedmkt.ml.party import WEIGHTS_NAME, Party
from fedmkt.protocol import LoraConfig


class QuantizedBase(Refusal):
    code: ClassVar[str] = "adapter.quantized_base"
    title: ClassVar[str] = "The adapter was trained on a base in fewer bits"


class OtherBase(Refusal):
    code: ClassVar[str] = "adapter.other_base"
    title: ClassVar[str] = "The adapter was made for another base model"


def merge_adapter(
    adapter: Path, base: str | Path, out: Path, *, revision: str | None = None, dtype: str = "float32"
) -> list[str]:
    """Write `out`, which must not exist, as `save_pretrained` does: the base with `adapter` in its weights, a
    tokenizer, a card. Returns the names of its files.

    adapter: a PEFT folder, or one with the weights of full training. The sum is made on the CPU in float32 and rounded
    to `dtype` once. Raises ModelRefused, AdaptersDiffer; QuantizedBase or OtherBase where the adapter's card names
    another base.
    """
    rounded = pick_dtype(dtype, torch.device("cpu"))
    loaded = load_base(base, revision=revision, device="cpu", dtype="float32")
    card = _checked_card(adapter, loaded)
    model = with_adapter(adapter, loaded)
    nn.Module.to(model, rounded)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as beside:
        draft = Path(beside) / "model"
        model.save_pretrained(draft)
        loaded.tokenizer.save_pretrained(draft)
        if card is not None:
            (draft / CARD_NAME).write_text(merged_card(card, dtype), encoding="utf-8")
        draft.rename(out)
    return sorted(path.name for path in out.iterdir())


def load_party(model: str, adapter: Path | None, device: str) -> Party:
    """A folder or hub id (ID@COMMIT), with an adapter or as it is, to look at: a fresh party's LoRA changes nothing."""
    name, _, commit = (model, "", "") if Path(model).is_dir() else model.partition("@")
    loaded = load_base(name, revision=commit or None, device=device)
    if adapter is not None:
        loaded = replace(loaded, model=with_adapter(adapter, loaded))
    return Party(loaded, LoraConfig(rank=1), seed=0)


def with_adapter(adapter: Path, loaded: LoadedModel) -> PreTrainedModel:
    """The loaded model itself with `adapter` added to its weights. Raises AdaptersDiffer, MalformedAdapter."""
    return _with_lora(adapter, loaded) if (adapter / CONFIG_NAME).is_file() else _with_weights(adapter, loaded)


def _checked_card(adapter: Path, loaded: LoadedModel) -> str | None:
    """The adapter's card, if it has one, after what it says of the base has been compared with the base given."""
    path = adapter / CARD_NAME
    if not path.is_file():
        return None
    card = path.read_text(encoding="utf-8")
    facts = read_facts(card)
    if facts is None:
        return card
    if facts.quantized is not None:
        raise QuantizedBase(
            f"{path} says that the adapter was trained, and its quality measured, on a base in {facts.quantized}; with "
            "the full weights it makes another model. Load the base in as many bits, and the adapter beside it"
        )
    for what, named, given in (
        ("vocabulary fingerprint", facts.base_vocabulary, loaded.vocabulary.fingerprint),
        ("config.json with SHA-256", facts.base_config, config_digest(loaded)),
    ):
        if named is not None and named != given:
            raise OtherBase(
                f"{path} names a base model with {what} {named}, {loaded.card.model_id} has {given}; give the folder "
                "or revision that the LLM server used"
            )
    return card


def _with_lora(adapter: Path, loaded: LoadedModel) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5.23 deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = PeftModel.from_pretrained(loaded.model, str(adapter))
    except RuntimeError as error:  # torch: shapes that differ
        raise AdaptersDiffer(f"{adapter} does not fit {loaded.card.model_id}: {error}") from error
    merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    return merged


def _with_weights(adapter: Path, loaded: LoadedModel) -> PreTrainedModel:
    path = adapter / WEIGHTS_NAME
    if not path.is_file():
        raise MalformedAdapter(f"{adapter} has neither {CONFIG_NAME} nor {WEIGHTS_NAME}; download the adapter again")
    changed = read_tensors(path.read_bytes())
    parameters = dict(loaded.model.named_parameters())
    check_shapes(changed, {name: tuple(parameters[name].shape) for name in changed if name in parameters})
    with torch.no_grad():
        for name, tensor in changed.items():
            parameters[name].copy_(torch.from_numpy(tensor))
    return loaded.model
