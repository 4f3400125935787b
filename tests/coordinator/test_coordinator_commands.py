"""The operator's commands for rounds and adapters, against the coordinator behind a real socket."""

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator_world import TOKENS, World, served
from fedmkt.cli import app
from fedmkt.errors import Refusal
from fedmkt.operator_commands import BadTime, seconds

pytestmark = [pytest.mark.anyio, pytest.mark.services]

CONFIG, TENSORS = b'{"r": 4}', b"the tensors of round 1"


@dataclass
class Operator:
    """Types commands; each ends before the next begins."""

    world: World
    url: str

    async def run(self, *words: str) -> str:
        result = await self._invoke(*words)
        assert result.exit_code == 0, (result.output, result.exception)
        return str(result.output).strip()

    async def read(self, *words: str) -> Any:
        return json.loads(await self.run(*words, "--json"))

    async def refused(self, *words: str) -> str:
        result = await self._invoke(*words)
        assert isinstance(result.exception, Refusal), result.output
        return result.exception.detail

    async def _invoke(self, group: str, command: str, *words: str) -> Any:
        arguments = [group, command, self.world.federation_id, *words]
        arguments += ["--coordinator", self.url, "--token", TOKENS["operator"]]
        return await asyncio.to_thread(CliRunner().invoke, app, arguments)


@pytest.fixture
async def operator(ready: World) -> AsyncIterator[Operator]:
    async with served(ready) as url:
        yield Operator(ready, url)


async def test_rounds_are_scheduled_paused_resumed_and_cancelled(operator: Operator) -> None:
    world = operator.world
    said = await operator.run("rounds", "start", "--every", "12h", "--count", "3")
    assert said == (
        "0 of 1 rounds finished; round 1 is collecting; every 43200 s, 2 left, next at 2031-05-04 15:02:01 UTC"
    )
    assert "paused once it has ended: fedmkt rounds resume" in await operator.run("rounds", "pause")
    await world.play_round(1)
    paused = await operator.read("rounds", "pause")
    assert paused["waits_for"] == ["the operator to resume: rounds are paused since 2031-05-04T03:02:01+00:00"]
    assert "waits for" not in await operator.run("rounds", "resume")
    assert (await operator.read("rounds", "start", "--count", "2"))["rounds_requested"] == 3
    assert await operator.run("rounds", "cancel") == "2 of 2 rounds finished"
    assert (await world.round(2)).state == "cancelled"


async def test_an_adapter_is_listed_promoted_rolled_back_and_downloaded(operator: Operator, tmp_path: Path) -> None:
    world = operator.world
    await world.request_rounds(2)
    first = await world.round(1)
    for site in world.sites.values():
        await world.upload(site, first)
    await world.distill(adapter=await world.store_artifact(peft_folder()))
    for site in world.sites.values():
        await world.report(site, first)
    await world.play_round(2)
    listed = await operator.read("adapter", "list")
    assert [(each["version"], each["promoted"]) for each in listed] == [(2, True), (1, False), (0, False)]
    shown = [line.split()[:3] for line in (await operator.run("adapter", "list")).splitlines()]
    assert ["*", "2", "1"] in shown
    assert await operator.run("adapter", "rollback") == "version 1 is promoted: the next round starts from it"
    assert "version 2 is promoted" in await operator.run("adapter", "promote", "2")
    assert "version 0 is promoted" in await operator.run("adapter", "rollback", "--to", "0")
    folder = tmp_path / "clinic"
    assert "adapter_config.json" in await operator.run("adapter", "download", "1", "--out", str(folder))
    assert (folder / "adapter_config.json").read_bytes() == CONFIG
    assert (folder / "adapter_model.safetensors").read_bytes() == TENSORS
    assert names(tmp_path) == ["clinic"]
    assert "is there already" in await operator.refused("adapter", "download", "1", "--out", str(folder))
    assert "bare base model" in await operator.refused("adapter", "download", "--out", str(tmp_path / "other"))
    assert "has no adapter version 7" in await operator.refused("adapter", "promote", "7")


@pytest.mark.parametrize(("name", "kind"), [("../evil", tarfile.REGTYPE), ("adapter_config.json", tarfile.SYMTYPE)])
async def test_what_is_no_peft_folder_is_not_unpacked(
    operator: Operator, tmp_path: Path, name: str, kind: bytes
) -> None:
    world = operator.world
    await world.request_rounds()
    for site in world.sites.values():
        await world.upload(site, await world.round())
    await world.distill(adapter=await world.store_artifact(peft_folder(name, kind)))
    out = tmp_path / "downloads" / "adapter"
    out.parent.mkdir()
    assert "which no PEFT folder has" in await operator.refused("adapter", "download", "1", "--out", str(out))
    assert (names(out.parent), names(tmp_path)) == ([], ["downloads"])


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def peft_folder(name: str = "adapter_config.json", kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for each, content in ((name, CONFIG), ("adapter_model.safetensors", TENSORS)):
            member = tarfile.TarInfo(each)
            if each == name:
                member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_times_are_read_with_their_unit_and_nothing_else() -> None:
    assert [seconds(each) for each in ("90", "90s", "1.5m", "12h", "1d")] == [90, 90, 90, 43200, 86400]
    for wrong in ("", "soon", "-5m", "1w", "1h30m", "1e3"):
        with pytest.raises(BadTime, match="for example 90s, 15m, 12h or 1d"):
            seconds(wrong)
