"""Tiny real models for tests: six architectures from configs with small tokenizers, saved as ordinary HF folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from small_tokenizers import byte_level, sentencepiece_bpe

ARCHITECTURES = ("llama", "gpt2", "opt", "bloom", "gpt_neox", "qwen2")
MORE_AROUND_THE_HEAD = ("gemma2", "cohere")  # a soft cap on the logits; a factor on the logits
POSITIONS = 96
PADDED_HEAD = 11  # rows of every head beyond the tokenizer

_ANIMALS = ("cat", "dog", "bird", "fish", "fox", "hen", "cow", "mouse")
_PLACES = ("house", "garden", "river", "forest", "school", "big red barn")
_DEEDS = ("sat down", "ran away", "found a ball", "saw a friend", "said hello", "was very happy")


def story(number: int) -> str:
    """A short text that differs by number; a few hundred of them have about thirty words in common."""
    animal, place, deed = (
        words[(number * step) % len(words)] for words, step in ((_ANIMALS, 1), (_PLACES, 5), (_DEEDS, 7))
    )
    again = _DEEDS[(number * 11 + 3) % len(_DEEDS)]
    return (
        f"One day the {animal} went to the {place} and {deed}. Then the {animal} {again}, and it was day {number % 17}."
    )


def _config(architecture: str, vocabulary_size: int, bos: int, eos: int) -> PretrainedConfig:
    common = {"vocab_size": vocabulary_size, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    grouped = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    }
    kinds: dict[str, Callable[[], PretrainedConfig]] = {
        "llama": lambda: LlamaConfig(**common, **grouped, num_key_value_heads=2, tie_word_embeddings=False),
        "qwen2": lambda: Qwen2Config(**common, **grouped, num_key_value_heads=2, tie_word_embeddings=True),
        "gemma2": lambda: Gemma2Config(
            **common, **grouped, head_dim=8, num_key_value_heads=2, final_logit_softcapping=5.0
        ),
        "cohere": lambda: CohereConfig(**common, **grouped, num_key_value_heads=2, logit_scale=0.25),
        "gpt_neox": lambda: GPTNeoXConfig(**common, **grouped, hidden_dropout=0.1, tie_word_embeddings=False),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS),
        "opt": lambda: OPTConfig(
            **common,
            hidden_size=32,
            word_embed_proj_dim=24,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
        ),
        "bloom": lambda: BloomConfig(**common, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1),
    }
    return kinds[architecture]()


def save_tiny(folder: Path, architecture: str, *, seed: int = 0, vocabulary: int = 400) -> Path:
    """A model folder with config, safetensors and tokenizer. Weights are random and several times as
    large as fresh ones, so that distributions are far from uniform and differences show.
    """
    if architecture in ("llama", *MORE_AROUND_THE_HEAD):
        tokenizer = sentencepiece_bpe(vocabulary - 259)  # and 256 bytes, <s>, </s>
        specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer = byte_level(vocabulary)
        specials = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **specials)
    fast.save_pretrained(folder)
    config = _config(architecture, len(fast) + PADDED_HEAD, fast.bos_token_id, fast.eos_token_id)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            model.get_output_embeddings().weight.mul_(6)
    model.save_pretrained(folder)
    return folder
