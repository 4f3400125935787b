"""A short cut of the API's fuzzing, as every role and as nobody; `make fuzz-api` is the long run."""

from pathlib import Path

import pytest

from api_fuzz import ROLES, coordinator, fuzz

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]
CUT = ["--max-time", "4"]


def test_no_request_of_any_role_breaks_the_api_or_its_description(tmp_path: Path) -> None:
    log = tmp_path / "coordinator.log"
    with coordinator(log) as target:
        for role in reversed(ROLES):  # the operator last: it destroys what the others need
            result = fuzz(target, role, tmp_path, CUT)
            said = f"{result.text[-20_000:]}\n{log.read_text()[-5_000:]}"
            assert result.passed, f"as {role}, {result.cases} cases:\n{said}"
            assert result.cases >= 20, said  # a loaded machine gets through the examples alone
