"""A party on disk: one folder, complete or not there, whose party.json names the digest of every other file."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ValidationError

from fedmkt.errors import Refusal
from fedmkt.protocol import Digest, LoraConfig, Message

ABOUT_NAME = "party.json"


class PartyFolderRefused(Refusal):
    code: ClassVar[str] = "party.unreadable"
    title: ClassVar[str] = "The saved party cannot be used"


class About(Message):
    """party.json."""

    format_version: Literal[1] = 1
    model_id: str
    vocabulary: Digest
    lora: LoraConfig | None
    seed: int
    steps: int
    files: dict[str, Digest]


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def write_party(folder: Path, about: About, files: Mapping[str, bytes]) -> None:
    """Replace `folder` whole. A crash leaves the old folder, or between two renames its copy at `folder`.old."""
    text = about.model_dump_json(indent=2) + "\n"
    new, old = folder.with_name(folder.name + ".new"), _old(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, data in {**files, ABOUT_NAME: text.encode()}.items():
        (new / name).write_bytes(data)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_about(folder: Path) -> tuple[Path, About]:
    """The folder to read from, and its party.json. Raises PartyFolderRefused."""
    folder = folder if folder.is_dir() else _old(folder)
    try:
        return folder, About.model_validate_json((folder / ABOUT_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        raise PartyFolderRefused(f"{folder} has no {ABOUT_NAME} that this program reads: {error}") from error


def read_file(folder: Path, about: About, name: str) -> bytes:
    """A file that party.json names, with the digest it gives. Raises PartyFolderRefused."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise PartyFolderRefused(f"{folder} lacks {name}: {error}; restore the folder from a backup") from error
    found, expected = hashlib.sha256(data).hexdigest(), about.files.get(name)
    if found != expected:
        raise PartyFolderRefused(
            f"{folder / name} has SHA-256 {found}, {ABOUT_NAME} names {expected}; restore the folder from a backup"
        )
    return data


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
