"""`fedmkt vocab-map`: the audit of a vocabulary map as a table, and the map as a file."""

import hashlib
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedmkt.coverage import Coverage
from fedmkt.protocol import MapMethod
from fedmkt.vocab_map import VocabMap, build_vocab_map
from fedmkt.vocabulary import Vocabulary


def build_and_show(teacher: Path, student: Path, method: MapMethod, out: Path | None, *, as_json: bool) -> None:
    """Build the map, write its artifact to `out`, and print what it covers. Raises the vocabularies' Refusals."""
    sender, receiver = Vocabulary.from_tokenizer(teacher), Vocabulary.from_tokenizer(student)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("building the map", total=None)
        built = build_vocab_map(
            sender, receiver, method, progress=lambda done, total: bars.update(bar, completed=done, total=total)
        )
    target = out or Path(f"{_name(teacher)}-{_name(student)}-{method}.safetensors")
    data = built.to_bytes()
    target.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    if as_json:
        print(json.dumps(_as_json(built, target, digest, len(data)), indent=2))
    else:
        _print_table(built, target, digest, len(data))


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _rows(built: VocabMap) -> dict[str, Coverage]:
    assert built.audit is not None, "build_vocab_map audits"
    return {**built.audit.classes, "all tokens": built.audit.total}


def _as_json(built: VocabMap, target: Path, digest: str, size_bytes: int) -> dict[str, object]:
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
    }


def _print_table(built: VocabMap, target: Path, digest: str, size_bytes: int) -> None:
    table = Table("teacher's tokens", box=None, header_style="dim")
    for heading in ("tokens", "exact", "approximate", "unmapped"):
        table.add_column(heading, justify="right")
    for name, each in _rows(built).items():
        near = 1 - each.exact_share - each.unmapped_share if each.ids else 0.0
        table.add_row(name, str(each.ids), f"{each.exact_share:.1%}", f"{near:.1%}", f"{each.unmapped_share:.1%}")
    console = Console()
    console.print(table)
    console.print(f"{target}: {size_bytes} bytes, SHA-256 {digest}", highlight=False, soft_wrap=True)
