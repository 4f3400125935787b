"""`fedmkt knowledge inspect`: what is in a blob, as text for people and as JSON for scripts."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedmkt.cli import app
from fedmkt.knowledge import Knowledge, KnowledgeHeader, encode
from fedmkt.knowledge_commands import NothingNamed
from fedmkt.knowledge_report import view
from fedmkt.outbox import Outbox
from fedmkt.public_set import PublicSet
from fedmkt.vocabulary import Vocabulary
from random_knowledge import random_header
from small_tokenizers import word_table

WORDS = Vocabulary.from_tokenizer(word_table({"the": 0, " cat": 1, " sat": 2, " ran": 3, "<s>": 4, "</s>": 5}))
PUBLIC = PublicSet.from_jsonl(
    b'{"id": "a", "text": "nothing"}\n{"id": "b", "prompt": "the", "completion": " cat sat"}\n'
)


def blob() -> bytes:
    """Of public sample 1: after "the" comes " cat" (0.5 of it, " ran" 0.25), after "the cat" " sat" (0.125, cut)."""
    header = KnowledgeHeader(
        **{
            **vars(random_header(vocabulary_size=WORDS.size, top_k=2)),
            "vocabulary_fingerprint": WORDS.fingerprint,
            "public_set_digest": PUBLIC.digest,
        }
    )
    return encode(
        Knowledge(
            header=header,
            samples=np.array([1], np.int32),
            row_splits=np.array([0, 2], np.int32),
            context_ends=np.array([3, 7], np.int32),
            gold_logprobs=np.log(np.array([0.5, 0.125], np.float32)),
            entry_splits=np.array([0, 2, 3], np.int32),
            token_ids=np.array([1, 3, 5], np.int32),
            logprobs=np.log(np.array([0.5, 0.25, 0.5], np.float32)),
        )
    )


def test_rows_are_shown_with_their_context_and_their_tokens_as_text() -> None:
    seen = view(blob(), vocabulary=WORDS, public_set=PUBLIC)
    assert (seen.samples, seen.rows, seen.entries, seen.entries_a_row) == (1, 2, 3, (1, 1.5, 2))
    (sample,) = seen.shown
    assert (sample.number, sample.sample_id, sample.rows) == (1, "b", 2)
    first, second = sample.shown
    assert first.after == "the"
    assert [guess.token for guess in first.guesses] == [" cat", " ran"]
    assert [guess.probability for guess in first.guesses] == pytest.approx([0.5, 0.25], rel=0.05)
    assert second.after == "the cat"
    assert [guess.token for guess in second.guesses] == ["<eos>"]
    assert second.next_probability == pytest.approx(0.125, rel=0.1)


def test_without_vocabulary_and_public_set_ids_and_offsets_are_shown() -> None:
    (sample,) = view(blob(), rows=1, entries=1).shown
    assert sample.sample_id is None
    assert [(row.after, [guess.token for guess in row.guesses]) for row in sample.shown] == [("byte 3", ["#1"])]


def agent_folder(tmp_path: Path) -> Path:
    (tmp_path / "vocabulary").write_bytes(WORDS.to_bytes())
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / PUBLIC.digest).write_bytes(PUBLIC.to_jsonl())
    return tmp_path


def test_the_command_finds_what_waits_in_the_agents_folder(tmp_path: Path) -> None:
    outbox = Outbox(agent_folder(tmp_path))
    about = outbox.put(outbox.begin("rnd_0123456789abcdef", 3), "knowledge", blob())
    outbox.put(about, "report", b'{"bytes_up": 5}')
    arguments = ["knowledge", "inspect", "--pending", "--state-dir", str(tmp_path)]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "round 3 (rnd_0123456789abcdef), not approved" in said
    assert "after 'the': ' cat' 50" in said
    assert 'report: {"bytes_up": 5}' in said
    assert "guarantee nothing" in said
    outbox.approve(outbox.pending())
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).output)
    assert shown["approved"] is True
    assert shown["knowledge"]["header"]["top_k"] == 2
    assert shown["knowledge"]["not_contained"][0].startswith("private text")


def test_a_file_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(blob())
    arguments = ["knowledge", "inspect", str(tmp_path / "blob"), "--state-dir", str(tmp_path)]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "knowledge of round 3, slice 2" in said
    with pytest.raises(NothingNamed, match="name a file, or ask for --pending"):
        CliRunner().invoke(app, ["knowledge", "inspect"], catch_exceptions=False)
