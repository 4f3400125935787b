"""Numbers and bools on the wire are JSON's own, wherever in a message they stand."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedmkt.protocol import (
    AdapterRollback,
    DistillationConfig,
    Evaluation,
    JobFailure,
    Message,
    ModelCard,
    PublicSetReceipt,
    SelectionReport,
    SiteModel,
    UploadState,
)

CARD: dict[str, Any] = {"model_id": "m", "architecture": "a", "parameters": 1}
STATE: dict[str, Any] = {"upload_id": f"upload_{'0' * 20}", "missing": [0], "complete": False}


@pytest.mark.parametrize(
    ("message", "given", "where"),
    [
        (PublicSetReceipt, {"digest": "1" * 64, "samples": True}, "samples"),
        (PublicSetReceipt, {"digest": "1" * 64, "samples": "5"}, "samples"),
        (SiteModel, {"model": {**CARD, "parameters": False}, "private_samples": 1}, "model.parameters"),
        (SelectionReport, {"taught": {"north": "3"}}, "taught.north"),
        (UploadState, {**STATE, "missing": [True]}, "missing.0"),
        (AdapterRollback, {"to_version": "1"}, "to_version"),
        (DistillationConfig, {"margin_nats_per_byte": "0.1"}, "margin_nats_per_byte"),
        (DistillationConfig, {"residual_bucket": "no"}, "residual_bucket"),
        (JobFailure, {"attempt": 1, "reason": "why", "retry": 0}, "retry"),
    ],
)
def test_what_only_looks_like_a_number_is_refused(message: type[Message], given: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        message.model_validate(given)
    places = [".".join(str(part) for part in each["loc"]) for each in refusal.value.errors()]
    assert places == [where]
    assert "is needed" in refusal.value.errors()[0]["msg"]


def test_numbers_of_every_kind_pass() -> None:
    assert AdapterRollback.model_validate({"to_version": 1.0}).to_version == 1
    assert AdapterRollback.model_validate({"to_version": None}).to_version is None
    assert DistillationConfig.model_validate({"margin_nats_per_byte": 1}).margin_nats_per_byte == 1.0
    made = Evaluation(bits_per_byte=np.float32(0.5), accuracy=np.float64(1), samples=np.int64(3))  # type: ignore[arg-type] # as numpy gives them
    assert (made.bits_per_byte, made.samples) == (0.5, 3)


class Counts(Message):
    by_number: dict[int, int]


def test_keys_of_json_objects_are_text_and_may_stand_for_numbers() -> None:
    assert Counts.model_validate_json('{"by_number": {"3": 10}}').by_number == {3: 10}
    with pytest.raises(ValidationError):
        Counts.model_validate_json('{"by_number": {"3": "10"}}')


def test_the_schema_is_what_it_was() -> None:
    assert PublicSetReceipt.model_json_schema()["properties"]["samples"] == {
        "minimum": 0, "title": "Samples", "type": "integer"
    }  # fmt: skip
    assert ModelCard.model_validate(CARD).model_dump()["parameters"] == 1
