"""Small federations for whole-round tests: tiny models of unlike architectures and tokenizers, a few dozen texts."""

from pathlib import Path

import pytest

from federation import SiteFiles, jsonl, stories
from tiny_models import save_tiny

SITES = {"north": "gpt2", "south": "qwen2", "west": "opt", "east": "bloom"}


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm") / "model", "llama")


@pytest.fixture(scope="session")
def tiny_sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteFiles]:
    """Four sites with a model and 40 private texts each."""
    folder = tmp_path_factory.mktemp("sites")
    files = {}
    for at, (name, architecture) in enumerate(SITES.items()):
        private = folder / f"{name}.jsonl"
        private.write_bytes(jsonl(stories(1000 + 100 * at, 40)))
        files[name] = SiteFiles(save_tiny(folder / name, architecture, seed=at), private)
    return files


@pytest.fixture(scope="session")
def public_set() -> bytes:
    """60 public texts of two domains."""
    return jsonl(stories(0, 30, domain="first") + stories(30, 30, domain="second"))
