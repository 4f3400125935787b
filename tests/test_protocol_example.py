"""The worked example of docs/protocol.md, decoded from the page by a second, slow decoder written from the page alone.

The slow decoder uses nothing of the project: it is also the twin that the fast one is held against.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from fedmkt.knowledge import decode, encode
from random_knowledge import random_knowledge

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "protocol.md").read_text()
Row = tuple[int, int, dict[int, float], float]  # sample, context end, log-probabilities, the realised token's


# ------------------------------------------------------------------------------------------------ the second decoder


def slow_decode(blob: bytes) -> tuple[dict[str, Any], list[Row]]:
    assert blob[:9] == b"FEDMKT-K\x02"
    frames, position = [], 9
    while position < len(blob):
        length = int.from_bytes(blob[position : position + 4], "little")
        frames.append(slow_tensors(zstandard.decompress(blob[position + 4 : position + 4 + length])))
        position += 4 + length
    index = json.loads(frames[0]["index"])
    samples, sample = [], -1
    for gap, more_rows in zip(integers(frames[0], "samples"), integers(frames[0], "rows"), strict=True):
        sample += gap + 1
        samples += [(sample, first) for first in [True] + [False] * more_rows]
    rows: list[Row] = []
    for frame in frames[1:]:
        rows += slow_rows(frame, samples[len(rows) :], rows[-1][1] if rows else 0, index["header"]["vocabulary_size"])
    return index, rows


def slow_tensors(content: bytes) -> dict[str, bytes]:
    data = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:data])
    return {name: content[data:][slice(*tensor["data_offsets"])] for name, tensor in table.items()}


def integers(tensors: dict[str, bytes], name: str) -> list[int]:
    planes = [tensors[f"{name}.{plane}"] for plane in range(4) if f"{name}.{plane}" in tensors]
    return [sum(byte << 8 * plane for plane, byte in enumerate(bytes_)) for bytes_ in zip(*planes, strict=True)]


def slow_rows(frame: dict[str, bytes], places: list[tuple[int, bool]], end: int, vocabulary_size: int) -> list[Row]:
    heights, ids = iter(integers(frame, "heights")), slow_ids(frame)
    columns = [integers(frame, name) for name in ("offset_steps", "entries", "floors", "tails", "gold_levels")]
    rows: list[Row] = []
    for (sample, first), tokens, step, more, floor, tail, gold in zip(places, ids, *columns, strict=False):
        end = step if first else end + step
        distances = {token: nats_below(floor - next(heights)) for token in tokens}
        missing = 0.0 if more + 1 == vocabulary_size else 1 / (1 + math.exp((110 - tail) / 10))
        top = math.log(1 - missing) - math.log(sum(math.exp(-distance) for distance in distances.values()))
        kept = {token: top - distance for token, distance in distances.items()}
        rows.append((sample, end, kept, top - nats_below(gold)))
    return rows


def slow_ids(frame: dict[str, bytes]) -> list[list[int]]:
    """Ascending ids by row. Own ids are told in the order of all rows, so a first walk finds those that stand alone."""
    references, sizes = integers(frame, "references"), [more + 1 for more in integers(frame, "entries")]
    alone = [row for row, number in enumerate(references) if number == 0]
    bits = iter([byte >> bit & 1 for byte in frame["shared.0"] for bit in range(8)])
    flags = [[next(bits) for _ in range(sizes[alone[number - 1]])] if number else [] for number in references]
    gaps = iter(integers(frame, "id_gaps"))
    own: list[list[int]] = []
    for size, shared in zip(sizes, flags, strict=True):
        ids, token = [], -1
        for _ in range(size - sum(shared)):
            token += next(gaps) + 1
            ids.append(token)
        own.append(ids)
    found = []
    for ids, shared, number in zip(own, flags, references, strict=True):
        others = own[alone[number - 1]] if number else []
        found.append(sorted(ids + [token for token, bit in zip(others, shared, strict=True) if bit]))
    return found


def nats_below(level: int) -> float:
    return float((1 + level / 22) ** 2 - 1)


# ------------------------------------------------------------------------------------------------ the page


def example_blob() -> bytes:
    (block,) = re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL)
    return bytes.fromhex(block)


def table_after(heading: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(heading) :].split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def probabilities(cell: str) -> dict[int, float]:
    return {int(token): float(p) for token, p in (pair.split(":") for pair in cell.split(","))}


def test_the_page_decodes_to_what_the_page_says() -> None:
    _, rows = slow_decode(example_blob())
    stated = table_after("What the sample blob decodes to")
    assert len(stated) == len(rows) == 3
    for (sample, end, kept, gold), (page_sample, page_end, page_kept, page_gold) in zip(rows, stated, strict=True):
        assert (sample, end) == (int(page_sample), int(page_end))
        assert {token: math.exp(p) for token, p in kept.items()} == pytest.approx(probabilities(page_kept), abs=1e-5)
        assert math.exp(gold) == pytest.approx(float(page_gold), abs=1e-5)


def test_the_page_decodes_to_what_was_put_in_within_a_tenth() -> None:
    _, rows = slow_decode(example_blob())
    for (_, end, kept, gold), (_, page_end, page_kept, page_gold) in zip(
        rows, table_after("Two samples of the public set"), strict=True
    ):
        assert end == int(page_end)
        assert {token: math.exp(p) for token, p in kept.items()} == pytest.approx(probabilities(page_kept), rel=0.1)
        assert math.exp(gold) == pytest.approx(float(page_gold.split()[0]), rel=0.1)


def test_the_columns_that_the_page_lists_are_those_of_its_blob() -> None:
    blob = example_blob()
    length = int.from_bytes(blob[9:13], "little")
    frames = [zstandard.decompress(blob[13 : 13 + length]), zstandard.decompress(blob[17 + length :])]
    tensors = {name: list(values) for frame in frames for name, values in slow_tensors(frame).items()}
    (index,) = re.findall(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
    assert bytes(tensors.pop("index")).decode() == index
    listed = {name.strip("`"): [int(v) for v in values.split()] for name, values in table_after("columns of both")}
    assert tensors == listed


def test_the_library_reads_the_page_too_and_writes_the_same_codes() -> None:
    received = decode(example_blob())
    same(received, slow_decode(example_blob())[1])
    same(decode(encode(received)), slow_decode(example_blob())[1])


@pytest.mark.parametrize("seed", range(5))
def test_the_library_agrees_with_the_slow_decoder(seed: int) -> None:
    sent = random_knowledge(seed, samples=12, rows_per_sample=30, vocabulary_size=[80, 500, 70_000][seed % 3])
    blob = encode(sent)
    index, rows = slow_decode(blob)
    assert (index["samples"], index["rows"], index["entries"]) == (12, sent.rows, sent.entries)
    same(decode(blob), rows)


def same(received: Any, rows: list[Row]) -> None:
    assert received.context_ends.tolist() == [end for _, end, _, _ in rows]
    counts = np.diff(received.row_splits)
    assert np.repeat(received.samples, counts).tolist() == [sample for sample, _, _, _ in rows]
    assert np.diff(received.entry_splits).tolist() == [len(kept) for _, _, kept, _ in rows]
    assert received.token_ids.tolist() == [token for _, _, kept, _ in rows for token in kept]
    assert received.logprobs == pytest.approx([p for _, _, kept, _ in rows for p in kept.values()], abs=1e-5)
    assert received.gold_logprobs == pytest.approx([gold for *_, gold in rows], abs=1e-5)
