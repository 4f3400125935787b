"""LoRA layers in a base model: which modules get one, the same initial values from the same seed, names on disk."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmkt.errors import Refusal
from fedmkt.ml.models import output_head
from fedmkt.protocol import LoraConfig

ADAPTER = "default"
FILE_PREFIX = "base_model.model."  # what PEFT puts before a module's name in adapter_model.safetensors


class NoSuchTarget(Refusal):
    code: ClassVar[str] = "lora.no_such_target"
    title: ClassVar[str] = "LoRA names modules that the model lacks"


def add_lora(model: PreTrainedModel, lora: LoraConfig, model_id: str) -> dict[str, Any]:
    """Put LoRA layers into `model`, in place; only they stay trainable, in float32 whatever the base's dtype.

    No targets: every linear layer inside the blocks (GPT-2's Conv1D included), never the LM head. Returns the content
    of adapter_config.json. Raises NoSuchTarget.
    """
    linear = _linear_layers(model)
    targets = _chosen(linear, lora) if lora.targets else _in_blocks(model, linear)
    modules = [module for name, module in linear.items() if _matches(name, targets)]
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return _config_on_disk(config, model_id)


def reset_lora(model: nn.Module, seed: int) -> None:
    """A uniform in +-1 / sqrt(fan_in) as PEFT draws it, B zero; every tensor from the seed and its own name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if ".lora_A." not in name:
                parameter.zero_()
                continue
            generator = torch.Generator().manual_seed(_named_seed(name, seed))
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def on_disk(name: str) -> str:
    """A parameter's name in adapter_model.safetensors."""
    return FILE_PREFIX + name.replace(f".{ADAPTER}.", ".")


def _named_seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _in_blocks(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> list[str]:
    """Last parts of the names where those single the blocks' layers out, full names otherwise."""
    head = output_head(model)
    wanted = [name for name, module in linear.items() if module is not head and _numbered(name)]
    if not wanted:
        raise NoSuchTarget(
            f"{type(model).__name__} has no linear layers in numbered blocks; name them in lora.targets, it has: "
            f"{_available(linear)}"
        )
    short = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    matched = [name for name in linear if _matches(name, short)]
    return short if len(matched) == len(wanted) else wanted


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _chosen(linear: Mapping[str, nn.Module], lora: LoraConfig) -> list[str]:
    missing = [target for target in lora.targets if not any(_matches(name, [target]) for name in linear)]
    if missing:
        raise NoSuchTarget(
            f"lora.targets names {', '.join(missing)}, of which the model has no linear layer; it has: "
            f"{_available(linear)}"
        )
    return sorted(set(lora.targets))


def _available(linear: Mapping[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))


def _matches(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _config_on_disk(config: PeftLoraConfig, model_id: str) -> dict[str, Any]:
    """The same content for the same settings: sets sorted, the model's name instead of a path on this machine."""
    settings: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]  # PEFT's own gap
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    content |= {"base_model_name_or_path": model_id, "inference_mode": True}
    plain: dict[str, Any] = json.loads(json.dumps(content, sort_keys=True))
    return plain


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name -> trainable parameter, in the model's own order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
