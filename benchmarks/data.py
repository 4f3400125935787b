"""What is measured on: real tokenizers, models and texts where FEDMKT_DATA_DIR has them, generated ones elsewhere."""

import functools
import gzip
import json
import os
import pydoc_data.topics
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.vocabulary import Vocabulary

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = {"gpt2": 50_257, "llama2": 32_000, "llama3": 128_256, "gpt-neox-20b": 50_277}
SHOWN = {"gpt2": "GPT-2", "llama2": "Llama-2", "llama3": "Llama-3", "gpt-neox-20b": "GPT-NeoX"}
TEXTS = ("text/c4_demo", "dialogsum/dialogsum.train", "gsm8k/train", "instruct/alpaca_en_demo", "arc-easy/train")
SAMPLE_CHARACTERS = 1200


def data_folder() -> Path | None:
    """The folder with real data; None where there is none, and then everything is generated."""
    named = os.environ.get("FEDMKT_DATA_DIR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if (folder / "tokenizers").is_dir() else None


# ------------------------------------------------------------------------------------------------ vocabularies


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    """A real vocabulary by folder name, or a generated one of the same size."""
    folder = data_folder()
    if folder is not None:
        return Vocabulary.from_tokenizer(folder / "tokenizers" / name)
    return generated_vocabulary(SIZES[name], seed=list(SIZES).index(name))


def shown(name: str) -> str:
    """A vocabulary in the words of a table."""
    return f"{SHOWN[name] if data_folder() else 'generated'} {vocabulary(name).size:,}"


@functools.cache
def cut_vocabulary(name: str, size: int) -> Vocabulary:
    """The vocabulary that a real byte-level BPE tokenizer had when it had learned `size` tokens; or a generated one."""
    folder = data_folder()
    if folder is None:
        return generated_vocabulary(size, seed=list(SIZES).index(name))
    content = json.loads((folder / "tokenizers" / name / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    kept = {token: index for token, index in model["vocab"].items() if index < size}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
    content["model"] = model | {"vocab": kept, "merges": merges}
    content["added_tokens"] = [added for added in content["added_tokens"] if added["id"] < size]
    content["post_processor"] = None
    return Vocabulary.from_tokenizer(Tokenizer.from_str(json.dumps(content)))


@functools.cache
def generated_vocabulary(size: int, seed: int) -> Vocabulary:
    """Whole words of English documentation and made-up ones, byte-level; two seeds have part of them in common."""
    rng = random.Random(seed)
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokens |= {word: None for word in _documentation_words() if rng.random() < 0.7}
    common, own = random.Random(-1), rng
    while len(tokens) < size - 2:
        tokens[_made_up_word(common if rng.random() < 0.5 else own)] = None
    table = {token: index for index, token in enumerate([*list(tokens)[: size - 2], "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(table, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Vocabulary.from_tokenizer(tokenizer)


def _documentation_words() -> list[str]:
    words = re.findall(r" [A-Za-z]+", " ".join(pydoc_data.topics.topics.values()))
    return ["Ġ" + word[1:] for word in dict.fromkeys(words)]


_ONSETS = ("b", "c", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr")
_SYLLABLES = [onset + vowel for onset in _ONSETS for vowel in "aeiou"]
_ENDINGS = ("", "", "s", "n", "r", "ed", "ing", "ly", "er", "tion")


def _made_up_word(rng: random.Random) -> str:
    syllables = "".join(rng.choices(_SYLLABLES, k=rng.choice((1, 2, 2, 3, 3, 4))))
    return rng.choice(("", "Ġ", "Ġ")) + syllables + rng.choice(_ENDINGS)


# ------------------------------------------------------------------------------------------------ texts


def texts(characters: int) -> list[str]:
    """Texts of about SAMPLE_CHARACTERS each and `characters` in all, from several sources in equal parts."""
    sources = list(_sources())
    share = characters // len(sources)
    found: list[str] = []
    for source in sources:
        body = source[:share]
        found += [body[start : start + SAMPLE_CHARACTERS] for start in range(0, len(body), SAMPLE_CHARACTERS)]
    return [text for text in found if text.strip()]


def _sources() -> Iterator[str]:
    folder = data_folder()
    if folder is None or not (folder / "datasets").is_dir():
        yield "\n".join(pydoc_data.topics.topics.values())
        return
    for name in TEXTS:
        with gzip.open(folder / "datasets" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        yield "\n".join(value for row in rows for value in row.values() if isinstance(value, str))
    with gzip.open(folder / "datasets" / "text" / "grimms_fairy_tales.txt.gz", "rt", encoding="utf-8") as file:
        yield file.read()


def public_set(characters: int) -> PublicSet:
    return as_public_set(texts(characters))


def as_public_set(chosen: Sequence[str]) -> PublicSet:
    """Every token of every text is a response row."""
    return PublicSet(tuple(PublicSample(f"{index:05d}", text, 0, False) for index, text in enumerate(chosen)))
