"""`fedmkt vocab-map`: what a map and the alignment carry, as a table and on a text, and the map as a file."""

import hashlib
import json
import pydoc_data.topics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedmkt.alignment import align_set, gold_transfer
from fedmkt.coverage import Coverage
from fedmkt.protocol import MapMethod
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.tokenized_set import tokenize_set
from fedmkt.vocab_map import VocabMap, build_vocab_map
from fedmkt.vocabulary import Vocabulary

OWN_TEXT_CHARACTERS, OWN_SAMPLE_CHARACTERS = 60_000, 1200
MAX_TOKENS = 1 << 20  # nothing is cut


@dataclass(frozen=True, slots=True)
class Carried:
    """What maps and alignment carry on a text; shares between 0 and 1.

    supervised: of the student's rows, those whose context ends where one of the teacher's does; exact_mass: of the
    teacher's realised tokens, those with an equal in the student; gold_transfer: of the supervised rows, those in which
    the mass of the teacher's realised token reaches the student's, through the map alone and with the chain rule.
    """

    text: str
    text_bytes: int
    rows: int
    supervised: float
    exact_mass: float
    gold_transfer: float
    gold_transfer_chain_rule: float


def build_and_show(
    teacher: Path, student: Path, method: MapMethod, out: Path | None, text: Path | None = None, *, as_json: bool
) -> None:
    """Build the map, write its artifact to `out`, and print what it covers, alone and on `text` (public set, JSONL).

    Raises the Refusals of vocabularies, maps and public sets.
    """
    sender, receiver = Vocabulary.from_tokenizer(teacher), Vocabulary.from_tokenizer(student)
    name, samples = _text(text)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("building the map", total=None)
        built = build_vocab_map(
            sender, receiver, method, progress=lambda done, total: bars.update(bar, completed=done, total=total)
        )
        bars.update(bar, description=f"cutting {name}", total=None)
        carried = carry(built, sender, receiver, name, samples)
    target = out or Path(f"{_name(teacher)}-{_name(student)}-{method}.safetensors")
    data = built.to_bytes()
    target.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    if as_json:
        print(json.dumps(_as_json(built, carried, target, digest, len(data)), indent=2))
    else:
        _print_table(built, carried, target, digest, len(data))


def carry(built: VocabMap, teacher: Vocabulary, student: Vocabulary, name: str, text: PublicSet) -> Carried:
    """Cut a text with both vocabularies and see what the map and the alignment carry."""
    theirs, own = (tokenize_set(each, text, range(len(text)), MAX_TOKENS) for each in (teacher, student))
    return Carried(
        name,
        text_bytes=sum(len(sample.text.encode()) for sample in text.samples),
        rows=own.rows,
        supervised=float(np.mean(align_set(theirs, own) >= 0)) if own.rows else 0.0,
        exact_mass=float(np.mean(built.distances[theirs.gold_ids] == 0)) if theirs.rows else 0.0,
        gold_transfer=gold_transfer(theirs, own, built, chain_rule=False),
        gold_transfer_chain_rule=gold_transfer(theirs, own, built, chain_rule=True),
    )


def _text(file: Path | None) -> tuple[str, PublicSet]:
    """A public set, or else English that every Python carries."""
    if file is not None:
        return file.name, PublicSet.from_jsonl(file.read_bytes())
    topics = "\n".join(pydoc_data.topics.topics.values())[:OWN_TEXT_CHARACTERS]
    starts = range(0, len(topics), OWN_SAMPLE_CHARACTERS)
    pieces = [topics[start : start + OWN_SAMPLE_CHARACTERS] for start in starts]
    samples = tuple(PublicSample(f"{number:03d}", piece, 0, False) for number, piece in enumerate(pieces))
    return "Python's documentation", PublicSet(samples)


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _rows(built: VocabMap) -> dict[str, Coverage]:
    assert built.audit is not None, "build_vocab_map audits"
    return {**built.audit.classes, "all tokens": built.audit.total}


def _as_json(built: VocabMap, carried: Carried, target: Path, digest: str, size_bytes: int) -> dict[str, object]:
    return {
        "file": str(target),
        "sha256": digest,
        "size_bytes": size_bytes,
        "method": built.method,
        "teacher_fingerprint": built.teacher_fingerprint,
        "student_fingerprint": built.student_fingerprint,
        "coverage": {
            name: {"ids": each.ids, "exact": each.exact, "unmapped": each.unmapped}
            for name, each in _rows(built).items()
        },
        "on_text": asdict(carried),
    }


def _print_table(built: VocabMap, carried: Carried, target: Path, digest: str, size_bytes: int) -> None:
    table = Table("teacher's tokens", box=None, header_style="dim")
    for heading in ("tokens", "exact", "approximate", "unmapped"):
        table.add_column(heading, justify="right")
    for name, each in _rows(built).items():
        near = 1 - each.exact_share - each.unmapped_share if each.ids else 0.0
        table.add_row(name, str(each.ids), f"{each.exact_share:.1%}", f"{near:.1%}", f"{each.unmapped_share:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"On {carried.text} ({carried.text_bytes} bytes, {carried.rows} rows of the student; --text FILE.jsonl takes "
        f"your public set): {carried.supervised:.1%} of the rows supervised, {carried.exact_mass:.1%} of the teacher's "
        f"mass mapped exactly, gold transfer {carried.gold_transfer:.3f}, with the chain rule "
        f"{carried.gold_transfer_chain_rule:.3f}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"{target}: {size_bytes} bytes, SHA-256 {digest}", highlight=False, soft_wrap=True)
