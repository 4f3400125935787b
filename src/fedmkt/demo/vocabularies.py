"""Tokenizers of different families and sizes, trained on the demo's text."""

import json
from collections.abc import Sequence
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
SPM_ALPHABET = 150  # characters with a token of their own; the rest is written in bytes
UNIGRAM_TEXTS = 1500  # its training is the slowest by far, and more text hardly changes it

TokenizerKind = Literal["byte_bpe", "byte_bpe_digits", "unigram", "sentencepiece_bpe"]


def train_tokenizer(kind: TokenizerKind, size: int, texts: Sequence[str]) -> Tokenizer:
    """A tokenizer with `size` tokens; <s> is id 0 and </s> is id 1. All but 'unigram' write any text without loss."""
    match kind:
        case "byte_bpe":
            return _byte_bpe(size, texts, digits=False)
        case "byte_bpe_digits":
            return _byte_bpe(size, texts, digits=True)
        case "unigram":
            return _unigram(size, texts)
        case "sentencepiece_bpe":
            return _sentencepiece_bpe(size, texts)


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Ready for `save_pretrained` beside a model."""
    unknown = UNKNOWN if tokenizer.token_to_id(UNKNOWN) is not None else None
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own gap
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=unknown
    )
    return made


def _byte_bpe(size: int, texts: Sequence[str], *, digits: bool) -> Tokenizer:
    """As GPT-2's; with `digits`, every digit is a token, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one_by_one = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([one_by_one, by_bytes]) if digits else by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(size: int, texts: Sequence[str]) -> Tokenizer:
    """As T5's: probabilities of pieces, spaces as U+2581, rare characters as <unk>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=[BOS, EOS, UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    step = max(1, len(texts) // UNIGRAM_TEXTS)
    tokenizer.train_from_iterator(texts[::step], trainer)
    return tokenizer


def _sentencepiece_bpe(size: int, texts: Sequence[str]) -> Tokenizer:
    """As Llama 2's: merges of characters, spaces as U+2581, what has no token as <0xNN> bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 256,
        special_tokens=[BOS, EOS, UNKNOWN],
        limit_alphabet=SPM_ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_bytes(tokenizer)


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The same with the 256 byte tokens at the end: ordinary ones, which a trainer can only add as special ones."""
    content = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    first = len(vocabulary)
    vocabulary |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    made: Tokenizer = Tokenizer.from_str(json.dumps(content))
    return made
