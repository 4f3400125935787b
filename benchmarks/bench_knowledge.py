"""The knowledge blob: speed, bytes and distortion, against pickled lists of floats."""

import functools
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from benchmarks.contenders import pickle_lists
from benchmarks.harness import Growth, Paired, Results, at_least, at_most
from benchmarks.models import demo_llm
from benchmarks.random_rows import random_rows, uniform_ids
from fedmkt.knowledge import Knowledge, decode, encode, quantised
from fedmkt.ml.extraction import extract
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party

ROWS = (5_000, 20_000, 80_000)
VOCABULARY = 128_256
TOP_KS = (32, 64, 128)
REAL_MODELS = ("stories260K", "babyllama-105", "babyllama-361")
DEMO = "demo LLM"
REAL_CHARACTERS = 40_000


@functools.cache
def _rows(rows: int, top_k: int) -> Knowledge:
    return random_rows(rows, VOCABULARY, top_k=top_k)


@functools.cache
def _blob(rows: int, top_k: int) -> bytes:
    return encode(_rows(rows, top_k))


@pytest.mark.parametrize("rows", ROWS)
def bench_encode(paired: Paired, rows: int) -> None:
    knowledge = _rows(rows, 64)
    paired(
        f"encode at k 64, {rows:,} rows, against pickled lists",
        lambda: encode(knowledge),
        lambda: pickle_lists(knowledge),
        size=f"V {VOCABULARY:,}, {knowledge.rows:,} rows",
        unit="rows/s",
        amount=knowledge.rows,
        goal=at_least(1e5),
        growth=Growth("encode, seconds over rows", knowledge.rows, at_most(1.1)),
    )


@pytest.mark.parametrize("rows", ROWS)
def bench_decode(paired: Paired, rows: int) -> None:
    knowledge, blob = _rows(rows, 64), _blob(rows, 64)
    pickled = pickle_lists(knowledge)
    paired(
        f"decode at k 64 with every check, {rows:,} rows, against pickled lists",
        lambda: decode(blob),
        lambda: pickle.loads(pickled),
        size=f"V {VOCABULARY:,}, {knowledge.rows:,} rows",
        unit="rows/s",
        amount=knowledge.rows,
        goal=at_least(3e5),
        growth=Growth("decode, seconds over rows", knowledge.rows, at_most(1.1)),
    )


@pytest.mark.parametrize("top_k", TOP_KS)
def bench_blob_size_without_truncation(results: Results, top_k: int) -> None:
    knowledge, blob = _rows(ROWS[1], top_k), _blob(ROWS[1], top_k)
    size = f"V {VOCABULARY:,}, {knowledge.entries / knowledge.rows:.1f} entries a row"
    ours, pickled = len(blob) / knowledge.rows, len(pickle_lists(knowledge)) / knowledge.rows
    goal = at_most(330) if top_k == TOP_KS[-1] else None
    name = f"blob at k {top_k} without truncation, against pickled lists"
    results.add(name, "bytes/row", ours, pickled, size=size, goal=goal)
    results.grew(Growth("blob bytes over k", top_k), ours, pickled, f"k {top_k}")


def bench_blob_size_of_ids_without_any_pattern(results: Results) -> None:
    """The worst case: every id equally likely, so that nothing but the order within a row can be saved."""
    knowledge = uniform_ids(_rows(ROWS[0], TOP_KS[-1]))
    results.add(
        f"blob at k {TOP_KS[-1]}, ids drawn uniformly, against pickled lists",
        "bytes/row",
        len(encode(knowledge)) / knowledge.rows,
        len(pickle_lists(knowledge)) / knowledge.rows,
        size=f"V {VOCABULARY:,}, {knowledge.entries / knowledge.rows:.1f} entries a row",
        goal=at_most(330),
    )


def bench_blob_distortion(results: Results) -> None:
    knowledge = _rows(ROWS[1], TOP_KS[-1])
    halved = knowledge.logprobs.astype(np.float16).astype(np.float32)
    results.add(
        f"blob at k {TOP_KS[-1]}: distortion, against float16 log-probabilities",
        "nats (mean KL)",
        _distortion(knowledge, quantised(knowledge).logprobs),
        _distortion(knowledge, halved),
        size=f"V {VOCABULARY:,}, {knowledge.entries / knowledge.rows:.1f} entries a row",
        goal=at_most(1e-3),
    )


def _distortion(knowledge: Knowledge, logprobs: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    """Mean over rows of KL(sent || received) in nats, what a row does not keep counted as one more event."""
    starts = knowledge.entry_splits[:-1]
    sent, received = knowledge.logprobs.astype(np.float64), logprobs.astype(np.float64)
    kept = np.add.reduceat(np.exp(sent) * (sent - received), starts)
    tails = [np.maximum(1 - np.add.reduceat(np.exp(values), starts), 1e-12) for values in (sent, received)]
    return float(np.mean(kept + tails[0] * np.log(tails[0] / tails[1])))


# ------------------------------------------------------------------------------------------------ real distributions


@dataclass(frozen=True)
class Source:
    """A model folder, and text that it can read."""

    folder: Path
    texts: list[str]


def _demo() -> Source:
    model = demo_llm()
    return Source(model.folder, list(model.texts))


def _real(name: str) -> Source:
    folder = data.data_folder()
    if folder is None:
        pytest.skip("no real models here: set FEDMKT_DATA_DIR to measure their blobs")
    return Source(folder / "models" / name, data.texts(REAL_CHARACTERS))


@pytest.mark.parametrize("name", [*REAL_MODELS, DEMO])
def bench_blob_size_at_the_defaults(results: Results, name: str) -> None:
    knowledge = _extracted(name)
    results.add(
        f"blob at the defaults, {name}, against pickled lists",
        "bytes/row",
        len(encode(knowledge)) / knowledge.rows,
        len(pickle_lists(knowledge)) / knowledge.rows,
        size=_size(knowledge),
        goal=at_most(64),
    )


@pytest.mark.parametrize("samples", [25, 100])
def bench_blob_size_of_a_few_samples(results: Results, samples: int) -> None:
    """A small blob has fewer rows to refer to."""
    knowledge = _extracted(DEMO).take(np.arange(samples))
    results.add(
        f"blob of {samples} samples at the defaults, {DEMO}, against pickled lists",
        "bytes/row",
        len(encode(knowledge)) / knowledge.rows,
        len(pickle_lists(knowledge)) / knowledge.rows,
        size=_size(knowledge),
    )


def bench_blob_distortion_at_the_defaults(results: Results) -> None:
    knowledge = _extracted(DEMO)
    results.add(
        f"blob at the defaults, {DEMO}: distortion, against float16 log-probabilities",
        "nats (mean KL)",
        _distortion(knowledge, quantised(knowledge).logprobs),
        _distortion(knowledge, knowledge.logprobs.astype(np.float16).astype(np.float32)),
        size=_size(knowledge),
        goal=at_most(1e-3),
    )


def bench_encode_rows_that_refer(paired: Paired) -> None:
    """Rows with much in common are compared with each other; random ones of a wide vocabulary are not."""
    knowledge = _extracted(DEMO)
    paired(
        f"encode at the defaults, {DEMO}, against pickled lists",
        lambda: encode(knowledge),
        lambda: pickle_lists(knowledge),
        size=_size(knowledge),
        unit="rows/s",
        amount=knowledge.rows,
        goal=at_least(1e5),
    )


def bench_decode_rows_that_refer(paired: Paired) -> None:
    knowledge = _extracted(DEMO)
    blob, pickled = encode(knowledge), pickle_lists(knowledge)
    paired(
        f"decode at the defaults with every check, {DEMO}, against pickled lists",
        lambda: decode(blob),
        lambda: pickle.loads(pickled),
        size=_size(knowledge),
        unit="rows/s",
        amount=knowledge.rows,
        goal=at_least(3e5),
    )


def _size(knowledge: Knowledge) -> str:
    entries = knowledge.entries / knowledge.rows
    return f"V {knowledge.header.vocabulary_size:,}, {knowledge.rows:,} rows, {entries:.1f} entries a row"


@functools.cache
def _extracted(name: str) -> Knowledge:
    source = _demo() if name == DEMO else _real(name)
    party = Party(load_base(source.folder, device="cpu"), None, seed=0)
    found = data.as_public_set(source.texts)
    return extract(
        party,
        found,
        range(len(found)),
        federation_id="fed_" + "0" * 16,
        round_number=0,
        slice_index=0,
        adapter_version=0,
        top_k=64,
        top_p=0.98,
        max_tokens=party.usable_tokens(512),
    )
