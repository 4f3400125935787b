"""docs/troubleshooting.md is what the source says, and says for every code what to do."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from fedmkt.errors import Refusal

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "deploy" / "troubleshooting.py"
PAGE = REPOSITORY / "docs" / "troubleshooting.md"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("troubleshooting", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["troubleshooting"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_source_says() -> None:
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True, timeout=110, check=True
    ).stdout
    assert PAGE.read_text(encoding="utf-8") == printed, "run `make troubleshooting`"


def test_every_code_says_what_to_do(generator: ModuleType) -> None:
    assert [code for code, entry in generator.entries().items() if not entry.helps] == []


def test_every_code_in_the_source_has_its_place_on_the_page() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8") for root in ("src", "services") for path in (REPOSITORY / root).rglob("*.py")
    )
    classes = set(re.findall(r'^    code(?:: ClassVar\[str\])? = "([\w.]+)"$', text, re.MULTILINE)) - {"refused"}
    others = set(re.findall(r'Known\(\s*\d+,\s*"([\w.]+)"', text))
    assert {"round.closed", "policy.not_approved", "model.unpinned", "state.changed"} <= classes
    assert {"internal", "body.too_large", "http.not_found"} <= others
    placed = re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(placed) == sorted(classes | others | {"artifacts.unavailable", "database.unavailable"})


def test_an_entry_has_titles_messages_and_remedies_of_both_sides(generator: ModuleType) -> None:
    entry = generator.entries()["protocol.mismatch"]
    assert entry.titles == ["Coordinator and client speak different protocols"]
    assert entry.statuses == [426]
    assert {message.partition(" speaks")[0] for message in entry.messages} >= {
        "the coordinator",
        "the coordinator (fedmkt ...)",
    }
    assert entry.remedies == ["Upgrade the older side: `pip install --upgrade fedmkt`, or the newer image."]


def test_messages_that_stand_in_a_table_beside_their_class_are_found(generator: ModuleType) -> None:
    assert "send it to the federation it was made for" in generator.entries()["knowledge.wrong_federation"].messages


def test_a_refusal_that_leaves_the_reader_alone_is_seen(generator: ModuleType) -> None:
    class Mute(Refusal):
        code: ClassVar[str] = "test.mute"

    entry = generator.Entry(messages=["the number is ..., at most ... is allowed"])
    assert not entry.helps
    assert generator.Entry(messages=["the number is ...; take a smaller one"]).helps
    assert generator.Entry(remedies=["Take a smaller one."]).helps
    assert Mute.remedy == ""
    assert Mute not in generator._classes()  # a test's own
