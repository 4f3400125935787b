"""A base model in 4 or 8 bits, by bitsandbytes: LoRA is trained on top of it, as in QLoRA (arXiv 2305.14314)."""

from importlib.util import find_spec
from typing import ClassVar, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from fedmkt.errors import Refusal

Bits = Literal["4bit", "8bit"]


class NoQuantization(Refusal):
    code: ClassVar[str] = "model.quantization_unavailable"
    title: ClassVar[str] = "The base model cannot be held in fewer bits"


def quantization_config(bits: Bits, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Of the linear layers; embeddings, norms and head keep their dtype. Raises NoQuantization without the library."""
    if find_spec("bitsandbytes") is None:
        raise NoQuantization(
            f"a base model in {bits} needs bitsandbytes, which is not installed; run "
            "pip install 'fedmkt[quantization]', or leave the setting quantize out"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]  # transformers' own gap
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers' own gap
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(model: nn.Module) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes repacks a 4-bit layer when it is first evaluated, and has no
    backward pass through what it made.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False


def quantized(model: nn.Module) -> str | None:
    """ "4bit" or "8bit" where the model's linear layers are held in so many, else None."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(model, "is_loaded_in_8bit", False) else None
