"""Base models: loaded from a local folder or a pinned hub revision, safetensors only, never remote code."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedmkt.errors import Refusal
from fedmkt.ml.quantization import Bits, NoQuantization, keep_trainable, quantization_config, quantized
from fedmkt.ml.team import ALONE, Team
from fedmkt.protocol import ModelCard
from fedmkt.vocabulary import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelRefused(Refusal):
    code: ClassVar[str] = "model.unusable"
    title: ClassVar[str] = "The base model cannot be used"


class UnpinnedModel(ModelRefused):
    code: ClassVar[str] = "model.unpinned"
    title: ClassVar[str] = "A hub model needs a pinned revision"


class NoSafetensors(ModelRefused):
    code: ClassVar[str] = "model.no_safetensors"
    title: ClassVar[str] = "The base model has no safetensors weights"


class UnknownArchitecture(ModelRefused):
    code: ClassVar[str] = "model.unknown_architecture"
    title: ClassVar[str] = "The base model needs code that is not in transformers"


class SlowTokenizer(ModelRefused):
    code: ClassVar[str] = "model.slow_tokenizer"
    title: ClassVar[str] = "The base model has no fast tokenizer"


class VocabularyTooLarge(ModelRefused):
    code: ClassVar[str] = "model.vocabulary_too_large"
    title: ClassVar[str] = "The tokenizer has ids that the model lacks"


@dataclass(frozen=True)
class LoadedModel:
    """A base model in evaluation mode, ready for one `Party`, which changes it in place."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    card: ModelCard
    team: Team = ALONE

    @property
    def device(self) -> torch.device:
        return self.team.device or next(self.model.parameters()).device


def configure_torch(threads: int) -> None:
    """Processor threads of this process. A decision of the program that starts, so the library never makes it."""
    torch.set_num_threads(threads)


def pick_device(device: str = "auto") -> torch.device:
    """auto: the process's current CUDA device (set by `accelerate launch` where it is used), else MPS, else CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype is {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_base(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Bits | None = None,
    team: Team = ALONE,
) -> LoadedModel:
    """Load a causal language model, its fast tokenizer and its vocabulary.

    `source` is a local folder, or a hub id with `revision` a full commit hash, since tags and branches can move. Ids
    beyond the tokenizer (padded heads) never leave: everywhere in `fedmkt.ml` logits are cut to `vocabulary.size` and
    normalised over those ids. `quantize` holds the linear layers in so many bits, for LoRA on top. In a `team` the
    device is the process's own; a model to be sharded waits in the machine's memory. Raises ModelRefused or one of its
    kinds, NoQuantization.
    """
    name, revision = _checked_source(source, revision)
    place = team.device or pick_device(device)
    where, what = torch.device("cpu") if team.sharded else place, pick_dtype(dtype, place)
    if quantize is not None and team.sharded:
        raise NoQuantization(f"a sharded model cannot be held in {quantize}; leave one of quantize and shard out")
    fewer = {} if quantize is None else {"quantization_config": quantization_config(quantize, what)}
    tokenizer = _load_tokenizer(name, revision)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=what,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": where} if fewer else None,
            **fewer,
        )
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{name} does not load as a causal language model: {error}") from error
    _check_head(name, model, vocabulary)
    if fewer:
        keep_trainable(model)
    else:
        nn.Module.to(model, where)  # from_pretrained leaves it in evaluation mode
    devices = f"{team.size} x {place.type}" if team.size > 1 else str(place)
    return LoadedModel(model, tokenizer, vocabulary, _card(_model_id(source, revision), model, devices), team)


def _checked_source(source: str | Path, revision: str | None) -> tuple[str, str | None]:
    if Path(source).is_dir():
        _check_folder(Path(source))
        return str(source), None
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ModelRefused(f"{source} is neither a folder nor a hub id; give a folder with config.json and safetensors")
    if revision is None or not _COMMIT.fullmatch(revision):
        raise UnpinnedModel(
            f"{source} is no local folder, and revision {revision!r} is not a full commit hash of 40 hexadecimal "
            "digits; give the commit that every run should use, or a folder"
        )
    return source, revision


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} has no config.json; give a folder written by save_pretrained")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{folder}/config.json is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UnknownArchitecture(
            f"{folder} has model_type {kind!r}, which this transformers does not know; remote code is never run, so "
            "use a newer transformers or another model"
        )
    if config.get("quantization_config") is not None:
        raise NoQuantization(
            f"{folder} holds weights in fewer bits already; give the folder they were made from, and the setting "
            "quantize where memory is short"
        )
    if not any(folder.glob("*.safetensors")):
        raise NoSafetensors(
            f"{folder} has no *.safetensors file; pickled weights are never read, so convert them with "
            "save_pretrained(safe_serialization=True)"
        )


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise SlowTokenizer(
            f"{name} has no tokenizer that loads without remote code: {error}; convert it to tokenizer.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise SlowTokenizer(
            f"{name} has a {type(tokenizer).__name__}, a tokenizer without a fast backend; convert it to tokenizer.json"
        )
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _check_head(name: str, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    head = output_head(model)
    if head is None:
        raise ModelRefused(f"{name} ({type(model).__name__}) has no LM head; give a causal language model")
    rows, embedded = (len(module.get_parameter("weight")) for module in (head, model.get_input_embeddings()))
    if vocabulary.size > min(rows, embedded):
        raise VocabularyTooLarge(
            f"{name} has a tokenizer with {vocabulary.size} ids but {embedded} embeddings and {rows} rows in its head; "
            "resize the model's embeddings to the tokenizer or remove the added tokens"
        )


def _model_id(source: str | Path, revision: str | None) -> str:
    """A folder's own name, never its path, which is nobody else's business; a hub id with its commit."""
    if revision is None:
        return Path(source).resolve().name[:200]
    return f"{source}@{revision[:12]}"


def _card(model_id: str, model: PreTrainedModel, device: str) -> ModelCard:
    return ModelCard(
        model_id=model_id,
        architecture=type(model).__name__,
        parameters=int(model.num_parameters()),  # of a quantized model those that it stands for
        trainable_parameters=0,
        device=f"{device}, {bits}" if (bits := quantized(model)) else device,
    )


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers' own gap
    return head


def parameter_count(model: nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens that the model was made for; None where positions are not bounded (ALiBi)."""
    config: Any = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
