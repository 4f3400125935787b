"""Real text that every installation carries: the documentation inside the installed packages, one package a domain.

Sources are read as text and parsed with `ast`; nothing is imported. The result depends only on the installed files:
the walk is sorted, duplicates are dropped, and the split follows the hash of each chunk, so no chunk is in two parts.
"""

import ast
import hashlib
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmkt.errors import Refusal

CHUNK_TARGET_BYTES = 256
CHUNK_LEAST_BYTES = 120
SHORTEST_STRING = 120  # characters; shorter constants are messages and keys, not documentation
SKIPPED_FOLDERS = frozenset({"tests", "test", "testing", "site-packages", "idlelib", "lib2to3", "pydoc_data"})
DOMAIN_SPARE = 2.2  # text read for each chunk of a domain that is wanted, so that it comes from many files
GENERAL_SPARE = 1.15  # some chunks occur in two sources


WORD = re.compile(r"\S+")
UNWANTED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f\\ud800-\\udfff]")


class NotEnoughText(Refusal):
    code = "demo.not_enough_text"
    title = "The installed packages hold too little text for the demo"


@dataclass(frozen=True, slots=True)
class Source:
    """A domain and where its text lies: a folder or file below site-packages or the standard library."""

    domain: str
    root: str  # key of sysconfig.get_path
    path: str
    shortest: int = SHORTEST_STRING


DOMAINS = (
    Source("reference", "stdlib", "pydoc_data/topics.py"),
    Source("numerics", "purelib", "numpy"),
    Source("algebra", "purelib", "sympy"),
    Source("databases", "purelib", "sqlalchemy"),
    Source("graphs", "purelib", "networkx"),  # stands in when one of the others is missing or too small
)
GENERAL = (Source("general", "stdlib", "."), Source("general", "purelib", "torch"))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Chunks of about 256 bytes by part. Every mapping is domain -> chunks, in hash order; no chunk is in two parts."""

    private: dict[str, tuple[str, ...]]
    public: dict[str, tuple[str, ...]]
    pretraining: dict[str, tuple[str, ...]]
    general: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole corpus; models trained on it are kept under a name that contains it."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()  # domains stay in their order, which the recipes follow

    @classmethod
    def from_json(cls, data: bytes) -> "Corpus":
        parts = json.loads(data)
        tables = {
            name: {domain: tuple(chunks) for domain, chunks in parts[name].items()}
            for name in ("private", "public", "pretraining")
        }
        return cls(general=tuple(parts["general"]), **tables)


def build_corpus(
    *, domains: int = 4, private: int = 1000, public: int = 220, pretraining: int = 300, general: int = 9000
) -> Corpus:
    """The first `domains` domains that have enough text, cut into parts; counts are chunks per domain.

    Raises NotEnoughText when fewer domains can be filled.
    """
    needed = private + public + pretraining
    found: dict[str, list[str]] = {}
    for source in DOMAINS:
        chunks = _chunks_of(source, round(DOMAIN_SPARE * needed * CHUNK_TARGET_BYTES))
        if len(chunks) >= needed:
            found[source.domain] = chunks
        if len(found) == domains:
            break
    if len(found) < domains:
        raise NotEnoughText(
            f"{len(found)} of {domains} domains have {needed} chunks of text here ({', '.join(found) or 'none'}); "
            "install fedmkt with its extras: pip install 'fedmkt[coordinator,llm-server,client-agent]'"
        )
    taken = {chunk for chunks in found.values() for chunk in chunks}
    share = round(GENERAL_SPARE * general * CHUNK_TARGET_BYTES / len(GENERAL))
    background = [c for source in GENERAL for c in _chunks_of(source, share) if c not in taken]
    return Corpus(
        private={d: tuple(c[:private]) for d, c in found.items()},
        public={d: tuple(c[private : private + public]) for d, c in found.items()},
        pretraining={d: tuple(c[private + public : needed]) for d, c in found.items()},
        general=tuple(_by_hash(dict.fromkeys(background))[:general]),
    )


def public_jsonl(public: dict[str, tuple[str, ...]]) -> bytes:
    """The public set as JSON lines `{id, text, domain}`."""
    lines = (
        json.dumps({"id": f"{domain}-{number:04d}", "text": text, "domain": domain}, ensure_ascii=False)
        for domain, chunks in public.items()
        for number, text in enumerate(chunks)
    )
    return ("\n".join(lines) + "\n").encode()


def private_jsonl(chunks: tuple[str, ...]) -> bytes:
    """A site's private text as JSON lines `{text}`."""
    return ("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in chunks) + "\n").encode()


def chunk(text: str) -> list[str]:
    """Cut at whitespace into pieces of CHUNK_TARGET_BYTES or a little less; a rest below CHUNK_LEAST_BYTES is dropped.

    A single word longer than the target becomes a piece of its own.
    """
    pieces: list[str] = []
    start = end = size = 0  # the open piece is text[start:end] with `size` bytes
    for word_start, word_end in (word.span() for word in WORD.finditer(text)):
        grown = size + _bytes(text[end:word_end])
        if end > start and grown > CHUNK_TARGET_BYTES:
            pieces.append(text[start:end])
            start, size = word_start, 0
            grown = _bytes(text[word_start:word_end])
        end, size = word_end, grown
    pieces.append(text[start:end])
    return [piece for piece in pieces if _bytes(piece) >= CHUNK_LEAST_BYTES]


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _chunks_of(source: Source, limit_bytes: int) -> list[str]:
    """Distinct chunks of a source in hash order; empty when the source is not installed."""
    found: dict[str, None] = {}
    total = 0
    for text in _documents(source):
        for piece in chunk(text):
            if piece not in found and _is_prose(piece):
                found[piece] = None
                total += len(piece)
        if total >= limit_bytes:
            break
    return _by_hash(found)


def _by_hash(chunks: dict[str, None]) -> list[str]:
    return sorted(chunks, key=lambda text: hashlib.sha256(text.encode()).digest())


def _is_prose(text: str) -> bool:
    """Keeps words; drops rulers, tables of numbers, encoded data and what UTF-8 cannot carry."""
    letters = sum(character.isalpha() for character in text)
    return 2 * letters >= len(text) and UNWANTED.search(text) is None


def _documents(source: Source) -> Iterator[str]:
    """Long string constants of the source's files: docstrings, and documentation added by calls."""
    root = Path(sysconfig.get_path(source.root)) / source.path
    for path in _files(root):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escape sequences in other people's files
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few installed files are templates or samples of bad code
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= source.shortest:
                yield inspect.cleandoc(node.value)


def _files(root: Path) -> list[Path]:
    """Python files below `root` in an order that mixes its folders: by the hash of the relative path."""
    if root.is_file():
        return [root]
    paths = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)]
    return sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
