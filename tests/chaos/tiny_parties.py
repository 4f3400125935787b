"""Entry of a process of the nursery that knows torch: makes the models and texts of a small federation."""

import json
from collections.abc import Sequence
from pathlib import Path

from tiny_models import save_tiny, story

ARCHITECTURES = {"worker": "llama", "north": "gpt2", "south": "qwen2"}
PRIVATE, PUBLIC = 20, 40  # texts


def save(arguments: Sequence[str]) -> None:
    """<folder>/<party>/ are model folders, <site>.jsonl private texts, public.jsonl the public set."""
    folder = Path(arguments[0])
    for seed, (name, architecture) in enumerate(ARCHITECTURES.items()):
        save_tiny(folder / name, architecture, seed=seed)
        (folder / f"{name}.jsonl").write_bytes(_texts(1000 * (1 + seed), PRIVATE))
    (folder / "public.jsonl").write_bytes(_texts(0, PUBLIC))


def _texts(start: int, count: int) -> bytes:
    lines = [json.dumps({"id": f"s{number}", "text": story(number)}) for number in range(start, start + count)]
    return "\n".join(lines).encode() + b"\n"
