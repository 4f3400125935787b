"""What one seed trains and measures on: every part is drawn anew, and no text is in two parts."""

import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from experiments.setting import Setting
from fedmkt.demo.setup import cached_corpus
from fedmkt.demo.texts import NotEnoughText, chunk, private_jsonl, public_jsonl
from fedmkt.errors import Refusal
from fedmkt.private_set import PrivateSet
from fedmkt.public_set import PublicSample, PublicSet

ELSEWHERE = "elsewhere"  # the domain of a public set off the sites' domains
Chunks = tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """All text there is: domain -> chunks, and general text without a domain."""

    domains: Mapping[str, Chunks]
    general: Chunks


@dataclass(frozen=True)
class Texts:
    """One seed's draw. domain -> chunks of each part; private text is that of the site that works in the domain."""

    general: Chunks
    pretraining: Mapping[str, Chunks]
    private: Mapping[str, PrivateSet]
    public: PublicSet
    test: tuple[PublicSample, ...]

    def seen(self, domains: Sequence[str], chunks: int) -> Chunks:
        """What a model is pre-trained on. Domain text last, of which its tokenizer takes a share from the end."""
        return self.general + tuple(text for domain in domains for text in self.pretraining[domain][:chunks])


class NoRealTexts(Refusal):
    code = "experiments.no_real_texts"
    title = "The real texts are not on this machine"


# Files below datasets/ of the data folder, and the fields of their lines that make a text.
REAL_DOMAINS = {
    "dialogues": ("dialogsum/dialogsum.train.jsonl.gz", ("dialogue",)),
    "problems": ("gsm8k/train.jsonl.gz", ("question", "answer")),
    "questions": ("boolq/train.jsonl.gz", ("instruction", "output")),
    "shakespeare": ("text/tinyshakespeare.txt.gz", ()),
}
REAL_GENERAL = (
    ("text/c4_demo.jsonl.gz", ("text",)),
    ("instruct/alpaca_en_demo.jsonl.gz", ("instruction", "output")),
    ("text/grimms_fairy_tales.txt.gz", ()),
)
REAL_CHUNKS = 1500  # of each domain


def real_folder() -> Path | None:
    """Where the real texts lie, if they are here."""
    named = os.environ.get("FEDMKT_DATA_DIR")
    return Path(named) / "datasets" if named and (Path(named) / "datasets").is_dir() else None


@cache
def real_pool() -> Pool:
    """The data sets in the folder that FEDMKT_DATA_DIR names. Raises NoRealTexts."""
    folder = real_folder()
    if folder is None:
        raise NoRealTexts("FEDMKT_DATA_DIR names no folder with datasets/ in it; set it, or take source = 'installed'")
    domains = {name: _chunks(folder / file, fields)[:REAL_CHUNKS] for name, (file, fields) in REAL_DOMAINS.items()}
    taken = {text for chunks in domains.values() for text in chunks}
    general = [text for file, fields in REAL_GENERAL for text in _chunks(folder / file, fields) if text not in taken]
    return Pool(domains, tuple(general))


def _chunks(path: Path, fields: Sequence[str]) -> Chunks:
    """Distinct chunks of a file in the order of their hashes."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [file.read()] if not fields else list(file)
    rows = [json.loads(line) for line in lines] if fields else []
    texts = ["\n".join(str(row[field]) for field in fields) for row in rows] or lines
    found = {piece for text in texts for piece in chunk(text)}
    return tuple(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))


@cache
def demo_pool(cache_folder: Path) -> Pool:
    """The texts that every installation carries; read from the packages once and kept."""
    corpus = cached_corpus(cache_folder, lambda name, done, total: None)
    domains = {
        name: corpus.private[name] + corpus.public[name] + corpus.pretraining[name] for name in sorted(corpus.private)
    }
    return Pool(domains, corpus.general)


def draw(setting: Setting, pool: Pool, seed: int) -> Texts:
    """Raises NotEnoughText."""
    wanted, sizes = setting.texts, _sizes(setting)
    rng = np.random.default_rng([seed, 0])
    general = _cut("general text", pool.general, {"pretraining": wanted.general, "public": _elsewhere(setting)}, rng)
    parts = {
        domain: _cut(f"domain {domain!r}", pool.domains[domain], sizes, rng)
        for domain in list(pool.domains)[: wanted.domains]
    }
    if len(parts) < wanted.domains:
        raise NotEnoughText(f"there are {len(parts)} domains, {wanted.domains} wanted")
    public = {domain: part["public_holdout"] + part["slices"] for domain, part in parts.items()}
    if wanted.public == "off_domain":
        public = {ELSEWHERE: general["public"]}
    return Texts(
        general["pretraining"],
        {domain: part["pretraining"] for domain, part in parts.items()},
        {domain: PrivateSet(_samples(part["private"]), _samples(part["holdout"])) for domain, part in parts.items()},
        PublicSet.from_jsonl(public_jsonl(public)),
        PublicSet.from_jsonl(public_jsonl({domain: part["test"] for domain, part in parts.items()})).samples,
    )


def _sizes(setting: Setting) -> dict[str, int]:
    wanted = setting.texts
    in_domain = wanted.public != "off_domain"
    return {
        "test": wanted.test,
        "private": wanted.private,
        "holdout": wanted.private_holdout,
        "public_holdout": wanted.public_holdout if in_domain else 0,
        "slices": wanted.slice * setting.rounds if in_domain else 0,
        "pretraining": max(model.domain_chunks for model in (setting.llm, *setting.site_models)),
    }


def _elsewhere(setting: Setting) -> int:
    return setting.public_samples if setting.texts.public == "off_domain" else 0


def _cut(name: str, chunks: Chunks, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Chunks]:
    if len(chunks) < sum(sizes.values()):
        raise NotEnoughText(f"{name} has {len(chunks)} chunks, {sum(sizes.values())} wanted: {dict(sizes)}")
    order = iter(rng.permutation(len(chunks)).tolist())
    return {part: tuple(chunks[next(order)] for _ in range(size)) for part, size in sizes.items()}


def _samples(chunks: Chunks) -> tuple[PublicSample, ...]:
    return PublicSet.from_jsonl(private_jsonl(chunks)).samples
