"""Making knowledge, against the model's forward pass alone on the same batches."""

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import data
from benchmarks.harness import Growth, Paired, at_most, ratio_at_most
from benchmarks.models import WIDE, demo_llm, random_party
from fedmkt.knowledge import Knowledge
from fedmkt.ml.batches import by_length, collate, tokenize
from fedmkt.ml.extraction import extract
from fedmkt.ml.inference import CPU_BATCH_TOKENS
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.public_set import PublicSet
from fedmkt.tokenized_set import REMEMBERED

SAMPLES = (55, 220, 880)  # of the demo's public set
MAX_TOKENS = 256
WIDE_TEXTS = 6


def forward_pass(party: Party, public_set: PublicSet, batch_tokens: int) -> Callable[[], None]:
    """The bare model, its own LM head on every position included, on the batches that extraction makes.

    Inference mode, no cache of keys and values, no normalisation; texts already cut into tokens and collated.
    """
    samples = tokenize(party.vocabulary, public_set.samples, MAX_TOKENS)
    chosen = [[samples[index] for index in indices] for indices in by_length(samples, batch_tokens)]
    batches = [collate(batch, party.device) for batch in chosen]

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                party.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    return run


def extraction(party: Party, public_set: PublicSet, batch_tokens: int) -> Callable[[], object]:
    """From texts to knowledge, cutting them into tokens included."""

    def run() -> Knowledge:
        REMEMBERED.clear()
        return extract(
            party,
            public_set,
            range(len(public_set)),
            federation_id="fed_" + "0" * 16,
            round_number=0,
            slice_index=0,
            adapter_version=0,
            top_k=64,
            top_p=0.98,
            max_tokens=MAX_TOKENS,
            batch_tokens=batch_tokens,
        )

    return run


def _rows(party: Party, texts: Sequence[str]) -> tuple[PublicSet, int]:
    found = data.as_public_set(texts)
    return found, sum(len(sample.rows) for sample in tokenize(party.vocabulary, found.samples, MAX_TOKENS))


@pytest.mark.parametrize("samples", SAMPLES)
def bench_extraction_demo_llm(paired: Paired, samples: int) -> None:
    demo = demo_llm()
    party = Party(load_base(demo.folder, device="cpu"), None, seed=0)
    public_set, rows = _rows(party, demo.texts[:samples])
    paired(
        f"extraction, demo LLM, {samples} samples, against a bare forward pass",
        extraction(party, public_set, CPU_BATCH_TOKENS),
        forward_pass(party, public_set, CPU_BATCH_TOKENS),
        size=f"V {party.vocabulary.size:,}, {rows:,} rows, k 64, top_p 0.98",
        unit="s",
        goal=ratio_at_most(1.15),
        growth=Growth("extraction, seconds over samples (demo LLM)", samples, at_most(1.1)),
    )


def bench_extraction_wide(paired: Paired) -> None:
    vocabulary = data.vocabulary("llama3")
    party = random_party(WIDE, vocabulary)
    public_set, rows = _rows(party, data.texts(20_000)[:WIDE_TEXTS])
    batch_tokens = 1024
    paired(
        "extraction, 4 layers, d 1,024, V 128k, against a bare forward pass",
        extraction(party, public_set, batch_tokens),
        forward_pass(party, public_set, batch_tokens),
        size=f"V {vocabulary.size:,}, {rows:,} rows, k 64, top_p 0.98, random weights",
        unit="s",
        rounds=3,
        goal=ratio_at_most(1.15),
    )
