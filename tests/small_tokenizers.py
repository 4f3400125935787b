"""Small real tokenizers of every kind that matters, trained on a few kB of text and cached per process.

`vocabulary(name)` gives the `Vocabulary` of any of NAMES; the functions give the `tokenizers.Tokenizer` itself.
"""

import functools
import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fedmkt.vocabulary import Vocabulary

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
FOREIGN = "Das Übermaß an Größe. Où est l'été ? 日本語のテキスト。 한국어 문장. Привет, мир! مرحبا 😀🎉 1234567890\n"


@functools.cache
def prose(characters: int = 8000) -> str:
    """English about Python: text that needs no data folder."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in ("assignment", "strings", "for", "class", "naming"))[:characters]


@functools.cache
def byte_level(size: int = 500, characters: int = 8000, digits_apart: bool = False) -> Tokenizer:
    """Byte-level BPE as in GPT-2: no unknown text, `<|endoftext|>` begins and ends a text."""
    tokenizer = Tokenizer(models.BPE())
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_pieces])
        if digits_apart
        else byte_pieces
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(characters), FOREIGN], trainer)
    return tokenizer


@functools.cache
def sentencepiece_bpe(size: int = 400, characters: int = 8000) -> Tokenizer:
    """BPE as in Llama-2: a dummy space before the text, spaces as U+2581, unknown characters as bytes."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    learned.train_from_iterator([prose(characters)], trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if piece != "<unk>"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {piece: index for index, piece in enumerate(names)}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def unigram(size: int = 400, characters: int = 8000) -> Tokenizer:
    """Unigram as in T5 and XLM-R: a metaspace pre-tokenizer, NFKC, no byte fallback, so foreign text is unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator(prose(characters).split("\n"), trainer)
    return tokenizer


@functools.cache
def word_piece(size: int = 400, characters: int = 8000) -> Tokenizer:
    """WordPiece as in BERT: lower-cased, accents stripped, [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    tokenizer.train_from_iterator([prose(characters)], trainer)
    return tokenizer


def word_table(tokens: dict[str, int], *, specials: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    """A hand-made byte-level tokenizer without merges rules but whole words: for literals worked by hand.

    `tokens`: byte-level spellings and ids; a word between spaces that is in the table is one token (`ignore_merges`).
    """
    tokenizer = Tokenizer(models.BPE(tokens, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


_MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_level_small": lambda: byte_level(320, 3000, True),
    "sentencepiece": sentencepiece_bpe,
    "unigram": unigram,
    "word_piece": word_piece,
}
NAMES = tuple(_MAKERS)
BYTE_EXACT = ("byte_level", "byte_level_small", "sentencepiece")


@functools.cache
def real(folder: Path) -> Vocabulary:
    """A real tokenizer of the data folder, loaded once: the large ones take seconds."""
    return Vocabulary.from_tokenizer(folder)


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary.from_tokenizer(_MAKERS[name]())
