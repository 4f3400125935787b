"""The coordinator as it is deployed: a process in an environment that has no torch."""

from pathlib import Path

import pytest

from federation import Processes, SiteFiles, small_config

pytestmark = [pytest.mark.e2e, pytest.mark.services]

HEAVY = ("torch", "transformers", "peft", "accelerate")


def test_the_coordinator_serves_a_federation_where_torch_is_not_installed(
    tmp_path: Path, public_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden"
    for name in HEAVY:
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text(f"raise ModuleNotFoundError({name!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    sites = {name: SiteFiles(tmp_path, tmp_path) for name in ("north", "south")}
    with Processes(tmp_path / "run", tmp_path, sites) as running:
        running.start("coordinator")
        with running.client() as operator:
            assert operator.ready().status == "ok"
            made = operator.create_federation(small_config(list(sites)))
            assert operator.put_public_set(made.federation_id, public_set).samples == 60
            waits_for = operator.request_rounds(made.federation_id).waits_for
    assert "an LLM server to register its model and vocabulary" in waits_for
